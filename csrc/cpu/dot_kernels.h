// What dot.cpp asks of an instruction set. dot_avx512.cpp compiles dot_body.h into one table.
//
// Depth is cut into steps of 64 bytes: 32 numbers of bf16, or 64 of int8. Activations are packed by tiles, a few tokens side
// by side: [step][token][64 bytes], so that a tile is read from front to back whatever the token's row was. Where slot s of
// a group begins a tile, the tile begins at s * steps * 64 bytes. The last step is padded with zeros.
//
// Quantised weights become bf16 in a panel, a few rows at a time: bf16(float(q) * scale). Against int8 activations int8
// weights are multiplied as they are, in exact integers.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace dmoe::cpu {

constexpr int64_t kStepBytes = 64;
constexpr int64_t kStepDepth = 32;  // bf16 numbers
constexpr int64_t kPanelRows = 8;
constexpr int64_t kDotRows = 32;    // rows of a block at most: as hidden values, those are one step

// Steps of 64 bytes that `depth` numbers take.
constexpr int64_t steps_of(int64_t depth, bool int8) {
  const int64_t numbers = int8 ? kStepBytes : kStepDepth;
  return (depth + numbers - 1) / numbers;
}

// Bytes from row to row of a panel: rows that are 4 KiB apart would share a few sets of L1.
constexpr int64_t panel_stride(int64_t depth) { return steps_of(depth, false) * kStepBytes + kStepBytes; }

// Some rows of one matrix against the tiles of a group's tokens.
struct DotBlock {
  const Matrix* matrix;
  int64_t row, rows;     // the block's first row, and how many
  bool int8;             // activations are int8, and so are the weights
  const int64_t* tiles;  // tile i has the slots from tiles[i] to tiles[i + 1]
  int64_t n_tiles;
  const char* x;  // the packed activations of slot 0
  char* panel;    // scratch: kPanelRows * panel_stride(depth) bytes
  // Of every slot, for int8 activations: their scale and their sum.
  const float* x_scale;
  const int32_t* x_sum;
  // Where the sums go, up:    out[(slot - tiles[0]) * out_stride + row] is written;
  float* out;
  int64_t out_stride;
  // down: sums[(row * tokens + token[slot]) * lanes ...] += scale[slot] * the parts of the dot product.
  float* sums;
  int64_t tokens;
  const int32_t* token;
  const float* scale;
};

struct DotKernels {
  int64_t tile;   // tokens of a tile at most
  int64_t lanes;  // parts in which `down` keeps a sum
  // `width` tokens of `bytes` bytes each into a tile.
  void (*pack)(const char* const* token, int64_t width, int64_t bytes, char* to);
  // Each fetches the first rows of `next` into L2 on the way; a `next` without rows fetches nothing.
  void (*up)(const DotBlock& block, const DotBlock& next);
  void (*down)(const DotBlock& block, const DotBlock& next);
  // Step `step` of a tile of hidden values: silu(gate) * up of `width` tokens and `rows` <= kDotRows, where a token's gate
  // begins at gate_up + token * stride and its up kDotRows behind.
  void (*hidden)(const float* gate_up, int64_t stride, int64_t rows, int64_t width, int64_t step, char* to);
  // The same in fp32, to[token * to_stride + row].
  void (*hidden_f32)(const float* gate_up, int64_t stride, int64_t rows, int64_t width, float* to, int64_t to_stride);
  // A row as int8: q = x / scale rounded half to even, scale = max |x| / 127 (1 where that is 0); their sum. A row with NaN or
  // infinity has the scale NaN.
  void (*quantize)(const void* x, Dtype dtype, int64_t n, int8_t* q, float* scale, int32_t* sum);
  // y[token * y_stride + row] = the sum of its parts, as bf16; clears the parts.
  void (*finish)(float* sums, int64_t rows, int64_t tokens, uint16_t* y, int64_t y_stride);
};

extern const DotKernels kDotAvx512;

}  // namespace dmoe::cpu
