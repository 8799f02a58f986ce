// vdpbf16ps: 16 sums of two products each. A tile is 4 rows against up to 6 tokens, or 8 rows against up to 3: 24 vectors of
// sums, 16 parts of each dot product, which are added up at the very end.
#if defined(__x86_64__) || defined(DMOE_EMULATE)
#include "dot_body.h"


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

void place(const char* line, int64_t step, int64_t token, int64_t width, char* to) {
  store(to + (step * width + token) * kStepBytes, load<Bits>(line));
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


// The weights that come next, a few cache lines a step: memory works while the tiles compute, and a burst would stall them.
struct Ahead {
  const char* from;
  int64_t lines;
};

// Rows `row`, … of a block against the tile of tokens at `slot`. Sums of rows past the block's last one are written too:
// there is room for them, and nobody reads them.
template <int rows, int width, bool down>
__attribute__((noinline)) void tile(const DotBlock& block, const Rows& source, int64_t row, int64_t slot,
                                    Ahead ahead) {
  const char* weight[rows];
  for (int r = 0; r < rows; ++r) weight[r] = source(r);
  const int64_t steps = steps_of(block.depth);
  const char* x = block.x + slot * steps * kStepBytes;
  Vec sums[rows][width] = {};
  for (int64_t k = 0; k < steps; ++k, x += width * kStepBytes) {
    for (int64_t i = 0; i < ahead.lines; ++i, ahead.from += kStepBytes) __builtin_prefetch(ahead.from, 0, 2);  // into L2
    if constexpr (width <= 3) {
      Bits token[width];
#pragma GCC unroll 3
      for (int t = 0; t < width; ++t) token[t] = load<Bits>(x + t * kStepBytes);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const Bits weights = load<Bits>(weight[r] + k * kStepBytes);
#pragma GCC unroll 3
        for (int t = 0; t < width; ++t) add_products(sums[r][t], weights, token[t]);
      }
    } else {
      Bits weights[rows];
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) weights[r] = load<Bits>(weight[r] + k * kStepBytes);
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
    if constexpr (down) {
      const float scale = block.scale[slot + t];
      float* to = block.sums + (row * block.tokens + block.token[slot + t]) * 16;
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r, to += block.tokens * 16) store(to, load<Vec>(to) + sums[r][t] * scale);
    } else {
      float* to = block.out + (slot + t - block.tiles[0]) * block.out_stride + row;
#pragma GCC unroll 2
      for (int r = 0; r < rows; r += 4)
        store(to + r, add_up(sums[r][t], sums[r + 1][t], sums[r + 2][t], sums[r + 3][t]));
    }
  }
}

template <int rows, bool down>
void tiles(const DotBlock& block, const DotBlock& next) {
  for (int64_t row = 0; row < block.rows; row += rows) {
    const Rows source = rows_of(block, row, rows);
    const bool last = row + rows >= block.rows;
    Ahead ahead{last ? next.weight : block.weight + (row + rows) * block.stride, 0};
    if (!last || next.rows > 0) ahead.lines = (rows + block.n_tiles - 1) / block.n_tiles;
    for (int64_t i = 0; i < block.n_tiles; ++i, ahead.from += ahead.lines * steps_of(block.depth) * kStepBytes) {
      const int64_t slot = block.tiles[i], width = block.tiles[i + 1] - slot;
      if (width == 1) tile<rows, 1, down>(block, source, row, slot, ahead);
      if (width == 2) tile<rows, 2, down>(block, source, row, slot, ahead);
      if (width == 3) tile<rows, 3, down>(block, source, row, slot, ahead);
      if constexpr (rows == 4) {
        if (width == 4) tile<4, 4, down>(block, source, row, slot, ahead);
        if (width == 5) tile<4, 5, down>(block, source, row, slot, ahead);
        if (width == 6) tile<4, 6, down>(block, source, row, slot, ahead);
      }
    }
  }
}

template <bool down>
void multiply(const DotBlock& block, const DotBlock& next) {
  const int64_t count = block.tiles[block.n_tiles] - block.tiles[0];
  count <= 3 ? tiles<8, down>(block, next) : tiles<4, down>(block, next);
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

const DotKernels kDotAvx512 = {kTile, 16, pack, multiply<false>, multiply<true>, hidden, finish};

}  // namespace dmoe::cpu
#endif
