// The kernels of widen_kernels.h over vectors of DMOE_LANES floats; no include guard, each instruction set includes it once.
// A vector holds four consecutive k of kLanes / 4 weight rows; against it stand four activations of a token, repeated.
// So weights need no transpose, only 16-byte loads, and a dot product ends in one sum over four lanes.
#include <cstdint>
#include <cstring>
#include <utility>

#include "elementwise.h"
#include "widen_kernels.h"

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarm inside GCC 12's AVX-512 intrinsics
#if defined(__AVX512F__) && DMOE_LANES == 16
#define DMOE_ZMM
#include <immintrin.h>
#elif defined(__AVX2__) && DMOE_LANES == 8
#define DMOE_YMM
#include <immintrin.h>
#endif

namespace dmoe::cpu {
namespace {

constexpr int kLanes = DMOE_LANES;
constexpr int kQuads = kLanes / 4;
// Twelve sums, two weight vectors and one activation fill the 16 registers of AVX2, and hide the latency of FMA.
constexpr int kVectors = 2;
constexpr int kTile = 6;
constexpr int kStoredTile = 5;                 // widening on the way takes two registers more
constexpr int kGroupRows = kVectors * kQuads;  // quad q of vector v is row q * kVectors + v
static_assert(kBlockRows % kGroupRows == 0);

using Vec = VectorOf<float, kLanes>::type;
using Bits = VectorOf<uint32_t, kLanes>::type;
using GroupRows = VectorOf<float, kGroupRows>::type;

// ---- Operations that need an instruction of their own to be fast.

void add_product(Vec& sum, Vec a, Vec b) {
#if defined(DMOE_ZMM) || defined(DMOE_YMM)
  // Left to itself GCC 12 picks forms that overwrite a factor, and then spills sums to the stack.
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#else
  sum += a * b;
#endif
}

Vec repeat(const float* four) {
#if defined(DMOE_ZMM)
  return _mm512_broadcast_f32x4(_mm_loadu_ps(four));
#elif defined(DMOE_YMM)
  return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(four));
#else
  Vec value;
  for (int q = 0; q < kQuads; ++q) std::memcpy(reinterpret_cast<char*>(&value) + 16 * q, four, 16);
  return value;
#endif
}

// 16 bytes from each of the rows of one vector.
Bits gather(const char* const* row, int64_t offset) {
#if defined(DMOE_ZMM) || defined(DMOE_YMM)
  const auto quad = [&](int q) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row[q * kVectors] + offset));
  };
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(quad(0)), quad(1), 1);
#if defined(DMOE_YMM)
  return reinterpret_cast<Bits>(low);
#else
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(quad(2)), quad(3), 1);
  return reinterpret_cast<Bits>(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
#endif
#else
  Bits value;
  for (int q = 0; q < kQuads; ++q)
    std::memcpy(reinterpret_cast<char*>(&value) + 16 * q, row[q * kVectors] + offset, 16);
  return value;
#endif
}

template <class F, class U>
F half_to_float(U half) {
  const U magnitude = half & 0x7fff;
  const U widened = reinterpret_cast<U>(reinterpret_cast<F>(magnitude << 13) * 0x1p112f);
  const U special = reinterpret_cast<U>(magnitude >= 0x7c00) & 0x7f800000;  // infinity, NaN
  return reinterpret_cast<F>(widened | special | (half & 0x8000) << 16);
}

// Four half-precision numbers from each of the rows of one vector.
Vec gather_halves(const char* const* row, int64_t offset) {
#if defined(DMOE_ZMM) || defined(DMOE_YMM)
  const auto pair = [&](int q) {
    const auto four = [&](int p) {
      return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row[p * kVectors] + offset));
    };
    return _mm_unpacklo_epi64(four(q), four(q + 1));
  };
#if defined(DMOE_YMM)
  return _mm256_cvtph_ps(pair(0));
#else
  return _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(pair(0)), pair(2), 1));
#endif
#else
  Bits value;
  for (int i = 0; i < kLanes; ++i) value[i] = load<uint16_t>(row[i / 4 * kVectors] + offset + i % 4 * 2);
  return half_to_float<Vec>(value);
#endif
}

// ---- Multiplication.

// Two sources of weights for tile(): vector v at depth k (a multiple of 8), the first or the second half of the activations.
template <Dtype dtype>
struct Stored {  // as they are in memory, widened on the way
  const char* row[kGroupRows];
  Vec operator()(int64_t k, int v, int half) const {
    if constexpr (dtype == Dtype::f32) return reinterpret_cast<Vec>(gather(row + v, (k + 4 * half) * 4));
    if constexpr (dtype == Dtype::f16) return gather_halves(row + v, (k + 4 * half) * 2);
    if constexpr (dtype == Dtype::bf16) {
      const Bits pairs = gather(row + v, k * 2);
      return reinterpret_cast<Vec>(half ? pairs & 0xffff0000 : pairs << 16);
    }
  }
};

struct Unpacked {  // fp32, in the order in which tile() reads
  const float* panel;
  static int64_t at(int64_t k, int v, int half) { return k * kGroupRows + (half * kVectors + v) * kLanes; }
  Vec operator()(int64_t k, int v, int half) const { return load<Vec>(panel + at(k, v, half)); }
};

template <size_t... i>
Vec add_pairs(Vec a, Vec b, std::index_sequence<i...>) {  // in every quad: a0+a2, b0+b2, a1+a3, b1+b3
  return __builtin_shufflevector(a, b, (i / 4 * 4 + i % 4 / 2 + i % 2 * kLanes)...) +
         __builtin_shufflevector(a, b, (i / 4 * 4 + i % 4 / 2 + i % 2 * kLanes + 2)...);
}

template <size_t... i>
GroupRows add_halves(Vec a, std::index_sequence<i...>) {  // from every quad: a0+a2, a1+a3
  return __builtin_shufflevector(a, a, (i / 2 * 4 + i % 2)...) +
         __builtin_shufflevector(a, a, (i / 2 * 4 + i % 2 + 2)...);
}

// The group of rows that comes next. tile() asks for it a cache line at a time, so that memory works while it computes:
// hardware follows neither from row to row nor from expert to expert, and a burst of requests would stall.
template <int64_t size>  // bytes of an element
struct Ahead {
  const char* row = nullptr;
  int64_t stride = 0;  // in bytes

  void fetch(int64_t k) const {  // as many lines as the group itself has in kPad of depth
    constexpr int64_t lines = (kGroupRows * kPad * size + 63) / 64;
    if (!row) return;
    for (int64_t i = k / kPad * lines; i < (k / kPad + 1) * lines; ++i)
      __builtin_prefetch(row + i % kGroupRows * stride + i / kGroupRows * 64, 0, 2);  // into L2
  }
};

// A group of rows times `width` tokens over `depth`, a multiple of kPad, from `begin` of the tokens on.
// Not inlined: the registers it needs are all there are.
template <int width, class Source, int64_t size>
__attribute__((noinline)) void tile(const Source& source, int64_t depth, const Token* tokens, int64_t begin, float* out,
                                    int64_t rows, Ahead<size> ahead) {
  const float* x[width];
  for (int t = 0; t < width; ++t) x[t] = tokens[t].x + begin;
  Vec sums[kVectors][width] = {};
  for (int64_t k = 0; k < depth; k += kPad) {
    ahead.fetch(k);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      Vec weights[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) weights[v] = source(k, v, half);
#pragma GCC unroll 6
      for (int t = 0; t < width; ++t) {
        const Vec activations = repeat(x[t] + k + 4 * half);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) add_product(sums[v][t], weights[v], activations);
      }
    }
  }
#pragma GCC unroll 6
  for (int t = 0; t < width; ++t) {
    const Vec pairs = add_pairs(sums[0][t], sums[1][t], std::make_index_sequence<kLanes>());
    const GroupRows dots = add_halves(pairs, std::make_index_sequence<kGroupRows>()) * tokens[t].scale;
    float* to = out + tokens[t].out;
    if (rows >= kGroupRows) {
      store(to, load<GroupRows>(to) + dots);
    } else {
      for (int r = 0; r < rows; ++r) to[r] += dots[r];
    }
  }
}

// The last columns of a group, with zeros up to kPad.
template <Dtype dtype>
struct Rest {
  char bytes[kGroupRows][kPad * 4] = {};
  Stored<dtype> rows;

  Rest(const Stored<dtype>& group, int64_t k, int64_t count) {
    for (int r = 0; r < kGroupRows; ++r) {
      std::memcpy(bytes[r], group.row[r] + k * size_of(dtype), count * size_of(dtype));
      rows.row[r] = bytes[r];
    }
  }
};

template <class Source, int64_t size>
void tile(const Source& source, int64_t depth, const Token* tokens, int64_t width, int64_t begin, float* out,
          int64_t rows, Ahead<size> ahead) {
  static_assert(kTile == 6);
  switch (width) {
    case 1:
      return tile<1>(source, depth, tokens, begin, out, rows, ahead);
    case 2:
      return tile<2>(source, depth, tokens, begin, out, rows, ahead);
    case 3:
      return tile<3>(source, depth, tokens, begin, out, rows, ahead);
    case 4:
      return tile<4>(source, depth, tokens, begin, out, rows, ahead);
    case 5:
      return tile<5>(source, depth, tokens, begin, out, rows, ahead);
    default:
      return tile<6>(source, depth, tokens, begin, out, rows, ahead);
  }
}

// Rows past the last repeat it; their sums are never stored.
template <Dtype dtype>
Stored<dtype> group_of(const Block& block, int64_t first) {
  Stored<dtype> group;
  for (int r = 0; r < kGroupRows; ++r) {
    const int64_t row = first + r < block.rows ? first + r : block.rows - 1;
    group.row[r] = static_cast<const char*>(block.weight) + (row * block.stride + block.begin) * size_of(dtype);
  }
  return group;
}

template <Dtype dtype>
void unpack(const Stored<dtype>& group, int64_t depth, float* panel) {
  for (int64_t k = 0; k < depth; k += kPad)
    for (int half = 0; half < 2; ++half)
      for (int v = 0; v < kVectors; ++v) store(panel + Unpacked::at(k, v, half), group(k, v, half));
}

template <int64_t size>
Ahead<size> ahead_of(const Block& block, int64_t first) {
  if (first >= block.rows) return {};
  return {static_cast<const char*>(block.weight) + (first * block.stride + block.begin) * size, block.stride * size};
}

// Few tokens: weights come as they are stored, and what a group of rows needs stays in L1 from one tile to the next.
template <Dtype dtype, int64_t size = size_of(dtype)>
void multiply_stored(const Block& block, const Block& next) {
  const int64_t depth = block.end - block.begin, whole = depth / kPad * kPad;
  const int64_t tiles = (block.count + kStoredTile - 1) / kStoredTile;
  for (int64_t first = 0; first < block.rows; first += kGroupRows) {
    const bool last = first + kGroupRows >= block.rows;
    const Stored<dtype> group = group_of<dtype>(block, first);
    Ahead<size> ahead = last ? ahead_of<size>(next, 0) : ahead_of<size>(block, first + kGroupRows);
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t begin = block.count * i / tiles, width = block.count * (i + 1) / tiles - begin;
      const Token* tokens = block.tokens + begin;
      tile(group, whole, tokens, width, block.begin, block.out + first, block.rows - first, ahead);
      ahead = {};
      if (whole < depth)
        tile(Rest<dtype>(group, whole, depth - whole).rows, kPad, tokens, width, block.begin + whole, block.out + first,
             block.rows - first, ahead);
    }
  }
}

// Many tokens: weights are widened once for all of them.
template <Dtype dtype, int64_t size = size_of(dtype)>
void multiply_unpacked(const Block& block, const Block& next) {
  alignas(64) float panel[kBlockRows * kBlockDepth];
  const int64_t depth = block.end - block.begin, whole = depth / kPad * kPad, padded = (depth + kPad - 1) / kPad * kPad;
  for (int64_t first = 0; first < block.rows; first += kGroupRows) {
    const Stored<dtype> group = group_of<dtype>(block, first);
    float* to = panel + first * padded;
    unpack(group, whole, to);
    if (whole < depth) unpack(Rest<dtype>(group, whole, depth - whole).rows, kPad, to + whole * kGroupRows);
  }
  const int64_t tiles = (block.count + kTile - 1) / kTile;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t begin = block.count * i / tiles, width = block.count * (i + 1) / tiles - begin;
    for (int64_t first = 0; first < block.rows; first += kGroupRows) {
      const bool turn = i == first / kGroupRows % tiles;  // one tile of every group fetches
      tile(Unpacked{panel + first * padded}, padded, block.tokens + begin, width, block.begin, block.out + first,
           block.rows - first, turn ? ahead_of<size>(next, first) : Ahead<size>{});
    }
  }
}

template <Dtype dtype>
void multiply(const Block& block, const Block& next) {
  block.count <= kFewTokens ? multiply_stored<dtype>(block, next) : multiply_unpacked<dtype>(block, next);
}

void multiply_any(const Block& block, const Block& next) {
  switch (block.dtype) {
    case Dtype::f32:
      return multiply<Dtype::f32>(block, next);
    case Dtype::bf16:
      return multiply<Dtype::bf16>(block, next);
    case Dtype::f16:
      return multiply<Dtype::f16>(block, next);
  }
}

// ---- Activations.

void store_activations(float* to, Eight x, Dtype weight) {
  store(to, weight == Dtype::bf16 ? __builtin_shufflevector(x, x, 0, 2, 4, 6, 1, 3, 5, 7) : x);
}

void hidden(Activation activation, const float* gate, const float* up, int64_t n, Dtype weight, float* h) {
  for (int64_t i = 0; i < n; i += kPad)
    store_activations(h + i, gated(load<Eight>(gate + i), load<Eight>(up + i), activation), weight);
}

Eight widen_eight(const char* from, Dtype dtype) {
  if (dtype == Dtype::f32) return load<Eight>(from);
  const EightBits bits = __builtin_convertvector(load<EightShorts>(from), EightBits);
  return dtype == Dtype::bf16 ? reinterpret_cast<Eight>(bits << 16) : half_to_float<Eight>(bits);
}

void widen(const void* from, Dtype dtype, int64_t n, Dtype weight, float* to) {
  const char* bytes = static_cast<const char*>(from);
  int64_t i = 0;
  for (; i + kPad <= n; i += kPad) store_activations(to + i, widen_eight(bytes + i * size_of(dtype), dtype), weight);
  if (i == n) return;
  char rest[kPad * 4] = {};
  std::memcpy(rest, bytes + i * size_of(dtype), (n - i) * size_of(dtype));
  store_activations(to + i, widen_eight(rest, dtype), weight);
}

void narrow(const float* from, int64_t n, Dtype dtype, void* to) {
  if (dtype == Dtype::f32) {
    std::memcpy(to, from, n * 4);
    return;
  }
  uint16_t* shorts = static_cast<uint16_t*>(to);
  for (int64_t i = 0; i < n; i += kPad) {
    float eight[kPad] = {};
    const int64_t count = n - i < kPad ? n - i : kPad;
    std::memcpy(eight, from + i, count * 4);
    const EightShorts rounded = __builtin_convertvector(narrow_eight(load<Eight>(eight), dtype), EightShorts);
    std::memcpy(shorts + i, &rounded, count * 2);
  }
}

float max_of(const float* x, int64_t n) {
  Eight best = Eight{} - __builtin_inff();
  for (int64_t i = 0; i < n; i += kPad) {
    const Eight each = load<Eight>(x + i);
    best = each > best ? each : best;
  }
  float most = best[0];
  for (int i = 1; i < kPad; ++i) most = best[i] > most ? best[i] : most;
  return most;
}

float sum_exp(const float* x, int64_t n, float max) {
  Eight sum{};
  for (int64_t i = 0; i < n; i += kPad) sum += exp(load<Eight>(x + i) - max);
  float total = 0;
  for (int i = 0; i < kPad; ++i) total += sum[i];
  return total;
}

}  // namespace
}  // namespace dmoe::cpu
