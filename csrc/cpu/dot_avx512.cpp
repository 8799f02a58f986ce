// vdpbf16ps, and vpdpbusd for int8: 16 sums of two, or four, products each. A tile is 4 rows against up to 6 tokens: 24 vectors
// of sums, 16 parts of each dot product.
#if defined(__x86_64__) || defined(DMOE_EMULATE)
#include <type_traits>

#include "dot_body.h"

#ifndef DMOE_EMULATE
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarm inside GCC 12's AVX-512 intrinsics
#include "decode_avx512.h"
#endif

namespace dmoe::cpu {
namespace {

constexpr int kTile = 6, kRows = 4;

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

void place(const char* const* line, int64_t offset, int64_t width, char* to) {
  for (int64_t t = 0; t < width; ++t) store(to + t * kStepBytes, load<Bits>(line[t] + offset));
}

// Rows of a quantised matrix as bf16, [rows] of `stride` bytes. They share the scales of fp8.
#ifdef DMOE_EMULATE
void unpack(const DotBlock& block, int64_t row, int64_t rows, char* to, int64_t stride) {
  const Matrix& matrix = *block.matrix;
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
template <class Decoder>
void unpack_as(const DotBlock& block, int64_t row, int64_t rows, char* to, int64_t stride) {
  constexpr int64_t kWeights = Decoder::kWeights;
  const Matrix& matrix = *block.matrix;
  Decoders<Decoder, kRows> decoders(block, row, rows);
  __m512i values[kWeights / kStepDepth];
  for (int64_t begin = 0; begin < matrix.depth; begin += kScaleGroup) {
    const int64_t end = begin + kScaleGroup < matrix.depth ? begin + kScaleGroup : matrix.depth;
    decoders.set(begin / kScaleGroup);
    for (int64_t r = 0; r < rows; ++r) {
      const char* from = matrix.row(row + r) + Decoder::bytes(begin);
      char* out = to + r * stride + begin * 2;
      int64_t k = begin;
      for (; k + kWeights <= end; k += kWeights, from += Decoder::bytes(kWeights), out += sizeof values) {
        decoders(r)(from, values);
        std::memcpy(out, values, sizeof values);
      }
      if (k == end) continue;
      char last[kStepBytes] = {};
      std::memcpy(last, from, Decoder::bytes(end - k));
      decoders(r)(last, values);
      std::memcpy(out, values, 2 * (end - k));
    }
  }
}

void unpack(const DotBlock& block, int64_t row, int64_t rows, char* to, int64_t stride) {
  if (block.matrix->weight.format == Format::fp8) unpack_as<E4m3>(block, row, rows, to, stride);
  if (block.matrix->weight.format == Format::int4) unpack_as<Int4>(block, row, rows, to, stride);
}
#endif

// Rows as bf16, or of int8 as they are.
Rows multiplied_rows(const DotBlock& block, int64_t row) {
  const Matrix& matrix = *block.matrix;
  if (block.parts != Parts::bf16 || !matrix.quantized()) return rows_of(block, row, kRows);
  const int64_t count = block.rows - row < kRows ? block.rows - row : kRows;
  const int64_t bytes = 2 * matrix.depth, stride = panel_stride(matrix.depth);
  unpack(block, block.row + row, count, block.panel, stride);
  for (int64_t r = 0; r < count; ++r) std::memset(block.panel + r * stride + bytes, 0, stride - bytes);
  return {block.panel, stride, count};
}

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

// Adds up the parts of a token's sums, and puts them where they go.
template <bool down>
void add_sums(const DotBlock& block, int64_t row, int64_t slot, const Vec (&parts)[kRows]) {
  put_sums<down>(block, row, slot, add_up(parts[0], parts[1], parts[2], parts[3]));
}

// Rows `row`, … of a block against the tokens of a tile, `x` and `slot` being the first one's.
template <int width, bool down>
__attribute__((noinline)) void tile(const DotBlock& block, const Rows& source, int64_t row, int64_t slot, const char* x,
                                    Ahead& next) {
  const char* weight[kRows];
  for (int r = 0; r < kRows; ++r) weight[r] = source(r);
  const int64_t steps = steps_of(block.matrix->depth, Parts::bf16);
  Ahead ahead = next;
  Vec sums[width][kRows] = {};
  for (int64_t k = 0; k < steps; ++k, x += width * kStepBytes) {
    ahead.fetch();
    Bits weights[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) weights[r] = load<Bits>(weight[r] + k * kStepBytes);
#pragma GCC unroll 6
    for (int t = 0; t < width; ++t) {
      const Bits token = load<Bits>(x + t * kStepBytes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) add_products(sums[t][r], weights[r], token);
    }
  }
  next = ahead;
#pragma GCC unroll 6
  for (int t = 0; t < width; ++t) add_sums<down>(block, row, slot + t, sums[t]);
}

// The same with int8 weights and integers of `parts` parts, for `width` tokens of a tile; a step of the tile has `stride` bytes.
template <int width, bool down, int parts>
__attribute__((noinline)) void integer_tile(const DotBlock& block, const Rows& source, int64_t row, int64_t slot,
                                            const char* x, int64_t stride, Ahead& next) {
  const char* weight[kRows];
  for (int r = 0; r < kRows; ++r) weight[r] = source(r);
  const int64_t steps = steps_of(block.matrix->depth, Parts::int8);
  Ahead ahead = next;
  Ints sums[width][parts][kRows] = {};
  const Bits offset = Bits{} + 0x80808080;  // weights go in as q + 128, which has no sign
  for (int64_t k = 0; k < steps; ++k, x += stride) {
    ahead.fetch();
    Bits weights[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) weights[r] = load<Bits>(weight[r] + k * kStepBytes) ^ offset;
#pragma GCC unroll 6
    for (int t = 0; t < width; ++t)
#pragma GCC unroll 2
      for (int p = 0; p < parts; ++p) {
        const Bits token = load<Bits>(x + (t * parts + p) * kStepBytes);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) add_products(sums[t][p][r], weights[r], token);
      }
  }
  next = ahead;
  float scale[kRows];
  for (int r = 0; r < kRows; ++r) scale[r] = block.matrix->scale_at(block.row + (row + r < block.rows ? row + r : row));
#pragma GCC unroll 6
  for (int t = 0; t < width; ++t) {
    Vec whole[kRows] = {};
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int p = 0; p < parts; ++p) {
        sums[t][p][r][0] -= 128 * block.x_sum[2 * (slot + t) + p];
        whole[r] = whole[r] * 256.f + __builtin_convertvector(sums[t][p][r], Vec);
      }
      whole[r] *= scale[r] * block.x_scale[slot + t];
    }
    add_sums<down>(block, row, slot + t, whole);
  }
}

#ifndef DMOE_EMULATE
// The same with weights that are decoded on the way, of whole groups: where a block has one tile, so each is decoded once.
template <class Decoder, int width, bool down>
__attribute__((noinline)) void decoding_tile(const DotBlock& block, int64_t row, int64_t slot, const char* x,
                                             Ahead& next) {
  constexpr int kSteps = Decoder::kWeights / kStepDepth;
  const Matrix& matrix = *block.matrix;
  const int64_t count = block.rows - row < kRows ? block.rows - row : kRows;
  const char* weight[kRows];
  for (int r = 0; r < kRows; ++r) weight[r] = matrix.row(block.row + row + (r < count ? r : count - 1));
  Decoders<Decoder, kRows> decoders(block, block.row + row, count);
  Ahead ahead = next;
  Vec sums[width][kRows] = {};
  for (int64_t begin = 0; begin < matrix.depth; begin += kScaleGroup) {
    decoders.set(begin / kScaleGroup);
    for (int64_t k = begin; k < begin + kScaleGroup; k += Decoder::kWeights, x += kSteps * width * kStepBytes) {
      ahead.fetch();
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        __m512i values[kSteps];
        decoders(r)(weight[r] + Decoder::bytes(k), values);
#pragma GCC unroll 2
        for (int s = 0; s < kSteps; ++s)
#pragma GCC unroll 6
          for (int t = 0; t < width; ++t)
            add_products(sums[t][r], reinterpret_cast<Bits>(values[s]), load<Bits>(x + (s * width + t) * kStepBytes));
      }
    }
  }
  next = ahead;
#pragma GCC unroll 6
  for (int t = 0; t < width; ++t) add_sums<down>(block, row, slot + t, sums[t]);
}
#endif

// call(width) with the width of a tile as a constant.
template <int most, class Call>
void with_width(int64_t width, const Call& call) {
  if (width == most) return call(std::integral_constant<int, most>());
  if constexpr (most > 1) with_width<most - 1>(width, call);
}

template <bool down, Parts parts>
void tiles(const DotBlock& block, const DotBlock& next) {
  constexpr int kLines = lines_of(parts), kMost = kTile / kLines;  // two parts take twice the sums
  const int64_t bytes = packed_bytes(block.matrix->depth, parts), slots = block.tiles[block.n_tiles] - block.tiles[0];
  const int64_t pieces = slots <= kMost * block.n_tiles ? block.n_tiles : kLines * block.n_tiles;  // roughly
  Ahead ahead(next, (block.rows + kRows - 1) / kRows * pieces * steps_of(block.matrix->depth, parts));
  for (int64_t row = 0; row < block.rows; row += kRows) {
    const Rows source = multiplied_rows(block, row);
    for (int64_t i = 0; i < block.n_tiles; ++i) {
      const int64_t begin = block.tiles[i], end = block.tiles[i + 1];
      const char* x = block.x + begin * bytes;
      for (int64_t slot = begin; slot < end; slot += kMost, x += kMost * kLines * kStepBytes)
        with_width<kMost>(end - slot < kMost ? end - slot : kMost, [&](auto width) {
          if constexpr (parts == Parts::bf16) tile<width, down>(block, source, row, slot, x, ahead);
          if constexpr (parts != Parts::bf16)
            integer_tile<width, down, kLines>(block, source, row, slot, x, (end - begin) * kLines * kStepBytes, ahead);
        });
    }
  }
}

#ifndef DMOE_EMULATE
template <class Decoder, bool down>
void decoding_tiles(const DotBlock& block, const DotBlock& next) {
  const int64_t slot = block.tiles[0], depth = block.matrix->depth;
  Ahead ahead(next, (block.rows + kRows - 1) / kRows * (depth / Decoder::kWeights));
  with_width<kTile>(block.tiles[1] - slot, [&](auto width) {
    for (int64_t row = 0; row < block.rows; row += kRows)
      decoding_tile<Decoder, width, down>(block, row, slot, block.x + slot * packed_bytes(depth, Parts::bf16), ahead);
  });
}
#endif

template <bool down>
void multiply(const DotBlock& block, const DotBlock& next) {
  if (block.parts == Parts::int8) return tiles<down, Parts::int8>(block, next);
  if (block.parts == Parts::int16) return tiles<down, Parts::int16>(block, next);
#ifndef DMOE_EMULATE
  const Matrix& matrix = *block.matrix;
  if (block.n_tiles == 1 && matrix.depth % kScaleGroup == 0) {
    if (matrix.weight.format == Format::fp8) return decoding_tiles<E4m3, down>(block, next);
    if (matrix.weight.format == Format::int4) return decoding_tiles<Int4, down>(block, next);
  }
#endif
  tiles<down, Parts::bf16>(block, next);
}

}  // namespace

const DotKernels kDotAvx512 = {kTile,  true,       pack,     multiply<false>, multiply<true>,
                               hidden, hidden_f32, quantize, narrow};

}  // namespace dmoe::cpu
#endif
