// What dot.cpp asks of an instruction set. dot_avx512.cpp and dot_amx.cpp compile dot_body.h into a table each.
//
// Depth is cut into steps of 64 bytes: 32 numbers of bf16, or 64 of int8. Activations are packed by tiles, a few tokens side
// by side: [step] of 64 bytes for every token and part, in the instruction set's own order, so that a tile is read from front
// to back whatever the token's row was. The last step is padded with zeros.
//
// Weights of bf16, and quantised ones that become bf16(float(q) * scale) on the way, meet bf16 activations (one part). Weights
// of int8 are multiplied as they are, in exact integers: activations are integers then, rounded to int8 (one part), or to
// 16 bits of their row's largest magnitude (two parts of int8, 256 * the first + the second), finer than bf16.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace dmoe::cpu {

constexpr int64_t kStepBytes = 64;
constexpr int64_t kStepDepth = 32;  // bf16 numbers
constexpr int64_t kMostTile = 16;   // tokens of a tile
constexpr int64_t kPanelRows = 32;  // at most
constexpr int64_t kUpRows =
    32;  // rows of gate, and as many of up, of a task of up: as hidden values, those are one step

// How activations are stored.
enum class Parts { bf16 = 0, int8 = 1, int16 = 2 };

constexpr int64_t depth_of_step(Parts parts) { return parts == Parts::bf16 ? kStepDepth : kStepBytes; }
constexpr int64_t lines_of(Parts parts) { return parts == Parts::int16 ? 2 : 1; }  // of 64 bytes, a step of a token
constexpr int64_t steps_of(int64_t depth, Parts parts) {
  return (depth + depth_of_step(parts) - 1) / depth_of_step(parts);
}
// Bytes of a packed token.
constexpr int64_t packed_bytes(int64_t depth, Parts parts) {
  return steps_of(depth, parts) * lines_of(parts) * kStepBytes;
}

// Bytes from row to row of a panel: rows that are 4 KiB apart would share a few sets of L1.
constexpr int64_t panel_stride(int64_t depth) { return packed_bytes(depth, Parts::bf16) + kStepBytes; }

// Bytes of the tables that decode the fp8 weights of a row: 128 numbers of bf16 for each group.
constexpr int64_t table_bytes(int64_t depth) { return (depth + kScaleGroup - 1) / kScaleGroup * 256; }

struct DotKernels;

// Some rows of one matrix against the tiles of a group's tokens.
struct DotBlock {
  const DotKernels* kernels;
  const Matrix* matrix;
  int64_t row, rows;     // the block's first row, and how many
  Parts parts;           // of the activations
  const int64_t* tiles;  // tile i has the slots from tiles[i] to tiles[i + 1]
  int64_t n_tiles;
  const char* x;  // the packed activations of slot 0; those of a tile begin at x + its first slot * packed_bytes
  // Scratch.
  char* panel;   // kPanelRows * panel_stride(depth) bytes
  char* tables;  // table_bytes(depth) bytes
  // Of every slot, where activations are integers: their scale, and the sum of each of two parts.
  const float* x_scale;
  const int32_t* x_sum;
  // Where the sums go, up:   out[(slot - tiles[0]) * out_stride + row] is written;
  //                    down: out[token[slot] * out_stride + row] += scale[slot] * the sum.
  // Rows go up to the next multiple of 16: there is room for them, and nobody reads them.
  float* out;
  int64_t out_stride;
  const int32_t* token;
  const float* scale;
};

struct DotKernels {
  int64_t tile;  // tokens of a tile at most
  bool even;     // the tiles of a group are about equal, otherwise full ones and the rest
  // `width` lines of `bytes` bytes each, of the tokens and their parts, into a tile.
  void (*pack)(const char* const* line, int64_t width, int64_t bytes, char* to);
  // Each fetches the rows of `next` into L2 on the way; a `next` without rows fetches nothing.
  void (*up)(const DotBlock& block, const DotBlock& next);
  void (*down)(const DotBlock& block, const DotBlock& next);
  // Step `step` of a tile of hidden values: activation(gate) * up of `width` tokens and `rows` <= kUpRows, where a token's
  // gate begins at gate_up + token * stride and its up kUpRows behind.
  void (*hidden)(Activation activation, const float* gate_up, int64_t stride, int64_t rows, int64_t width, int64_t step,
                 char* to);
  // The same in fp32, to[token * to_stride + row].
  void (*hidden_f32)(Activation activation, const float* gate_up, int64_t stride, int64_t rows, int64_t width,
                     float* to, int64_t to_stride);
  // A row of n numbers as integers, q[part][n] of int8, and the sum of each part: q = x / scale rounded half to even, scale =
  // max |x| / 127, of two parts / (127 * 256) (1 where that is 0). A row with NaN or infinity has the scale NaN.
  void (*quantize)(const void* x, Dtype dtype, int64_t n, Parts parts, int8_t* q, float* scale, int32_t sum[2]);
  // Rounds n sums to bf16.
  void (*narrow)(const float* sums, int64_t n, uint16_t* y);
};

extern const DotKernels kDotAvx512, kDotAmx;

}  // namespace dmoe::cpu
