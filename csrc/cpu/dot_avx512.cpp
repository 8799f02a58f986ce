// vdpbf16ps (and vpdpbusd for int8): 16 sums of two (four) products each. A tile is 4 rows against up to 6 tokens, or 8 rows against up to 3: 24 vectors of
// sums, 16 parts of each dot product, which are added up at the very end.
#if defined(__x86_64__) || defined(DMOE_EMULATE)
#include <type_traits>

#include "dot_body.h"

#ifndef DMOE_EMULATE
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarm inside GCC 12's AVX-512 intrinsics
#include <immintrin.h>
#endif


namespace dmoe::cpu {
namespace {

constexpr int64_t kTile = 6;

using Bits = VectorOf<uint32_t, 16>::type;

// sum[i] += a[2i] * b[2i] + a[2i + 1] * b[2i + 1]
#ifdef DMOE_EMULATE
void add_products(Vec& sum, Bits a, Bits b) {
  for (int i = 0; i < 16; ++i) {
    const auto number = [](uint32_t bits) {
      float value;
      std::memcpy(&value, &bits, 4);
      return (bits & 0x7f800000) ? value : value * 0.f;  // the instruction takes subnormals for zero
    };
    float s = sum[i];
    s = __builtin_fmaf(number(a[i] << 16), number(b[i] << 16), s);
    s = __builtin_fmaf(number(a[i] & 0xffff0000), number(b[i] & 0xffff0000), s);
    sum[i] = s;
  }
}
#else
void add_products(Vec& sum, Bits a, Bits b) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
#endif

using Ints = VectorOf<int32_t, 16>::type;

// sum[i] += the four products of a's bytes, without a sign, and b's, with one.
#ifdef DMOE_EMULATE
void add_products(Ints& sum, Bits a, Bits b) {
  for (int i = 0; i < 16; ++i)
    for (int byte = 0; byte < 32; byte += 8)
      sum[i] += static_cast<int32_t>(a[i] >> byte & 255) * static_cast<int8_t>(b[i] >> byte & 255);
}
#else
void add_products(Ints& sum, Bits a, Bits b) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
#endif

void place(const char* line, int64_t step, int64_t token, int64_t width, char* to) {
  store(to + (step * width + token) * kStepBytes, load<Bits>(line));
}

#ifdef DMOE_EMULATE
void unpack(const Matrix& matrix, int64_t row, int64_t rows, char* to, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < matrix.depth; k += 8) {
      float eight[8] = {};
      const int64_t count = matrix.depth - k < 8 ? matrix.depth - k : 8;
      dequantize(matrix, row + r, k, k + count, eight);
      const EightShorts out = __builtin_convertvector(narrow_eight(load<Eight>(eight), Dtype::bf16), EightShorts);
      std::memcpy(to + r * stride + 2 * k, &out, 2 * count);
    }
}
#else
// 32 numbers at a time, each bf16(q * scale).
struct Int8 {
  __m512 scale;
  explicit Int8(float s) : scale(_mm512_set1_ps(s)) {}
  __m512i operator()(const char* q) const {
    const auto part = [&](const char* from) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), scale);
    };
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(part(q + 16), part(q)));
  }
};

struct Int4 {  // from a table of the 16 values, twice, as lookups go by five bits
  __m512i table;
  explicit Int4(float s) {
    const __m512 values = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
    const __m256i words = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_mul_ps(values, _mm512_set1_ps(s))));
    table = _mm512_inserti64x4(_mm512_castsi256_si512(words), words, 1);
  }
  __m512i operator()(const char* q) const {  // of each byte the low nibble is the low word's index, the high one the high's
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
    return _mm512_permutexvar_epi16(_mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12)), table);
  }
};

struct E4m3 {  // from a table of the 128 magnitudes
  __m512i table[4];
  explicit E4m3(float s) {
    for (int i = 0; i < 4; ++i) {
      const auto part = [&](int at) { return _mm512_mul_ps(_mm512_loadu_ps(kFp8.value + at), _mm512_set1_ps(s)); };
      table[i] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(part(32 * i + 16), part(32 * i)));
    }
  }
  __m512i operator()(const char* q) const {
    const __m512i codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(q)));
    const __m512i low = _mm512_permutex2var_epi16(table[0], codes, table[1]);
    const __m512i high = _mm512_permutex2var_epi16(table[2], codes, table[3]);
    const __m512i value = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(codes, _mm512_set1_epi16(64)), low, high);
    return _mm512_xor_si512(value, _mm512_and_si512(_mm512_slli_epi16(codes, 8), _mm512_set1_epi16(-32768)));
  }
};

template <class Decoder>
void unpack_as(const Matrix& matrix, int64_t row, int64_t rows, char* to, int64_t stride) {
  constexpr int64_t bytes = std::is_same_v<Decoder, Int4> ? kStepDepth / 2 : kStepDepth;  // of a step
  for (int64_t begin = 0; begin < matrix.depth; begin += kScaleGroup) {
    const int64_t end = begin + kScaleGroup < matrix.depth ? begin + kScaleGroup : matrix.depth;
    float scale = matrix.scale(row, begin / kScaleGroup);
    Decoder decode(scale);
    for (int64_t r = 0; r < rows; ++r) {
      const float next = matrix.scale(row + r, begin / kScaleGroup);
      if (next != scale) decode = Decoder(scale = next);
      const char* from = matrix.row(row + r) + begin / kStepDepth * bytes;
      char* out = to + r * stride + begin * 2;
      int64_t k = begin;
      for (; k + kStepDepth <= end; k += kStepDepth, from += bytes, out += kStepBytes) _mm512_storeu_si512(out, decode(from));
      if (k == end) continue;
      char last[kStepDepth] = {};
      std::memcpy(last, from, std::is_same_v<Decoder, Int4> ? (end - k + 1) / 2 : end - k);
      const __m512i values = decode(last);
      std::memcpy(out, &values, 2 * (end - k));
    }
  }
}

void unpack(const Matrix& matrix, int64_t row, int64_t rows, char* to, int64_t stride) {
  switch (matrix.weight.format) {
    case Format::fp8: return unpack_as<E4m3>(matrix, row, rows, to, stride);
    case Format::int8: return unpack_as<Int8>(matrix, row, rows, to, stride);
    case Format::int4: return unpack_as<Int4>(matrix, row, rows, to, stride);
    case Format::plain: return;
  }
}
#endif

// In every quad: the sums of four vectors' quads.
Vec add_quads(Vec a, Vec b, Vec c, Vec d) {
  const auto pairs = [](Vec p, Vec q) {  // p0+p2, q0+q2, p1+p3, q1+q3
    return __builtin_shufflevector(p, q, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
           __builtin_shufflevector(p, q, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  };
  const Vec ab = pairs(a, b), cd = pairs(c, d);
  return __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
         __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}

using Four = VectorOf<float, 4>::type;

Four add_up(Vec a, Vec b, Vec c, Vec d) {
  const Vec quads = add_quads(a, b, c, d);
  const Eight halves = __builtin_shufflevector(quads, quads, 0, 1, 2, 3, 4, 5, 6, 7) +
                       __builtin_shufflevector(quads, quads, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(halves, halves, 0, 1, 2, 3) + __builtin_shufflevector(halves, halves, 4, 5, 6, 7);
}


// The weights that come next, a few cache lines a step: memory works while the tiles compute, and a burst would stall them.
struct Ahead {
  const char* from = nullptr;
  int64_t lines = 0;
};

// Rows `row`, … of a block against the tile of tokens at `slot`. Sums of rows past the block's last one are written too:
// there is room for them, and nobody reads them.
template <int rows, int width, bool down, bool int8>
__attribute__((noinline)) void tile(const DotBlock& block, const Rows& source, int64_t row, int64_t slot,
                                    Ahead ahead) {
  const char* weight[rows];
  for (int r = 0; r < rows; ++r) weight[r] = source(r);
  const int64_t steps = steps_of(block.matrix->depth, int8);
  const char* x = block.x + slot * steps * kStepBytes;
  std::conditional_t<int8, Ints, Vec> sums[rows][width] = {};
  const Bits offset = Bits{} + (int8 ? 0x80808080 : 0);  // int8 weights go in as q + 128, which has no sign
  for (int64_t k = 0; k < steps; ++k, x += width * kStepBytes) {
    for (int64_t i = 0; i < ahead.lines; ++i, ahead.from += kStepBytes) __builtin_prefetch(ahead.from, 0, 2);  // into L2
    if constexpr (width <= 3) {
      Bits token[width];
#pragma GCC unroll 3
      for (int t = 0; t < width; ++t) token[t] = load<Bits>(x + t * kStepBytes);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const Bits weights = load<Bits>(weight[r] + k * kStepBytes) ^ offset;
#pragma GCC unroll 3
        for (int t = 0; t < width; ++t) add_products(sums[r][t], weights, token[t]);
      }
    } else {
      Bits weights[rows];
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) weights[r] = load<Bits>(weight[r] + k * kStepBytes) ^ offset;
#pragma GCC unroll 6
      for (int t = 0; t < width; ++t) {
        const Bits token = load<Bits>(x + t * kStepBytes);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) add_products(sums[r][t], weights[r], token);
      }
    }
  }
#pragma GCC unroll 6
  for (int t = 0; t < width; ++t) {
    Vec parts[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      if constexpr (int8) {
        Ints whole = sums[r][t];
        whole[0] -= 128 * block.x_sum[slot + t];
        const float scale = block.matrix->scale(block.row + (row + r < block.rows ? row + r : row), 0);
        parts[r] = __builtin_convertvector(whole, Vec) * (scale * block.x_scale[slot + t]);
      } else {
        parts[r] = sums[r][t];
      }
    }
    if constexpr (down) {
      const float scale = block.scale[slot + t];
      float* to = block.sums + (row * block.tokens + block.token[slot + t]) * 16;
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r, to += block.tokens * 16) store(to, load<Vec>(to) + parts[r] * scale);
    } else {
      float* to = block.out + (slot + t - block.tiles[0]) * block.out_stride + row;
#pragma GCC unroll 2
      for (int r = 0; r < rows; r += 4) store(to + r, add_up(parts[r], parts[r + 1], parts[r + 2], parts[r + 3]));
    }
  }
}

template <int rows, bool down, bool int8>
void tiles(const DotBlock& block, const DotBlock& next) {
  const int64_t tile_steps = steps_of(block.matrix->depth, int8), row_bytes = block.matrix->row_bytes();
  for (int64_t row = 0; row < block.rows; row += rows) {
    const Rows source = rows_of(block, row, rows);
    Ahead ahead{};
    const bool last = row + rows >= block.rows;
    if (!last) ahead.from = block.matrix->row(block.row + row + rows);
    if (last && next.rows > 0) ahead.from = next.matrix->row(next.row);
    if (ahead.from) ahead.lines = (rows * row_bytes / kStepBytes + block.n_tiles * tile_steps - 1) / (block.n_tiles * tile_steps);
    for (int64_t i = 0; i < block.n_tiles; ++i, ahead.from += ahead.lines * tile_steps * kStepBytes) {
      const int64_t slot = block.tiles[i], width = block.tiles[i + 1] - slot;
      if (width == 1) tile<rows, 1, down, int8>(block, source, row, slot, ahead);
      if (width == 2) tile<rows, 2, down, int8>(block, source, row, slot, ahead);
      if (width == 3) tile<rows, 3, down, int8>(block, source, row, slot, ahead);
      if constexpr (rows == 4) {
        if (width == 4) tile<4, 4, down, int8>(block, source, row, slot, ahead);
        if (width == 5) tile<4, 5, down, int8>(block, source, row, slot, ahead);
        if (width == 6) tile<4, 6, down, int8>(block, source, row, slot, ahead);
      }
    }
  }
}

template <bool down>
void multiply(const DotBlock& block, const DotBlock& next) {
  const bool few = block.tiles[block.n_tiles] - block.tiles[0] <= 3;
  if (block.int8) return few ? tiles<8, down, true>(block, next) : tiles<4, down, true>(block, next);
  few ? tiles<8, down, false>(block, next) : tiles<4, down, false>(block, next);
}

void finish(float* sums, int64_t rows, int64_t tokens, uint16_t* y, int64_t y_stride) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t row = 0; row < rows; row += 8) {
      Four four[2] = {};
      for (int half = 0; half < 2; ++half) {
        Vec parts[4] = {};
        for (int r = 0; r < 4; ++r) {
          if (row + 4 * half + r >= rows) continue;
          float* from = sums + ((row + 4 * half + r) * tokens + t) * 16;
          parts[r] = load<Vec>(from);
          store(from, Vec{});
        }
        four[half] = add_up(parts[0], parts[1], parts[2], parts[3]);
      }
      const EightShorts out = __builtin_convertvector(
          narrow_eight(__builtin_shufflevector(four[0], four[1], 0, 1, 2, 3, 4, 5, 6, 7), Dtype::bf16), EightShorts);
      std::memcpy(y + t * y_stride + row, &out, 2 * (rows - row < 8 ? rows - row : 8));
    }
}

}  // namespace

const DotKernels kDotAvx512 = {kTile, 16, pack, multiply<false>, multiply<true>, hidden, hidden_f32, quantize, finish};

}  // namespace dmoe::cpu
#endif
