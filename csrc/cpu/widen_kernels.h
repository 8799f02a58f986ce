// What widen.cpp and decoder.cpp ask of an instruction set. widen_{plain,avx2,avx512}.cpp each compile widen_body.h into one
// table.
#pragma once

#include "experts.h"

namespace dmoe::cpu {

// A block for few tokens is multiplied as it is stored, over the whole depth. One for more tokens is first widened to fp32,
// which takes 16 KiB, half of L1. Tuned on 2 cores of AMD Zen 3; `dmoe bench layer --device cpu --tokens 32` repeats it.
constexpr int64_t kFewTokens = 15;
constexpr int64_t kBlockRows = 8;
constexpr int64_t kBlockDepth = 512;

// Activations are fp32, and padded with zeros to a multiple of 8. Against bf16 weights each 8 are stored as 0 2 4 6 1 3 5 7:
// the even and the odd halves of eight packed bf16 widen with one shift and one mask.
constexpr int64_t kPad = 8;
constexpr int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

struct Token {
  const float* x;  // its activations, from depth 0
  int64_t out;     // where its sums go, counted from Block::out
  float scale;
};

// out[token.out + r] += token.scale * sum_k weight[r, k] * token.x[k] for r < rows and k in [begin, end), tokens in order.
struct Block {
  Dtype dtype;
  const void* weight;        // row 0, from depth 0
  int64_t stride;            // elements from row to row
  int64_t rows, begin, end;  // rows <= kBlockRows; end - begin <= kBlockDepth unless tokens are few; begin % kPad == 0
  const Token* tokens;
  int64_t count;
  float* out;
};

struct WidenKernels {
  const char* name;
  // Fetches the first rows of `next` into L2 on the way; a `next` without rows fetches nothing.
  void (*multiply)(const Block& block, const Block& next);
  // h = activation(gate) * up, stored as activations against `weight` expect them; n is a multiple of kPad.
  void (*hidden)(Activation activation, const float* gate, const float* up, int64_t n, Dtype weight, float* h);
  void (*widen)(const void* from, Dtype dtype, int64_t n, Dtype weight, float* to);  // to activations, padding included
  void (*narrow)(const float* from, int64_t n, Dtype dtype, void* to);               // rounds to nearest even
  // Over n numbers, a multiple of kPad: the largest that is not NaN, and the sum of exp(x - max), NaN where an x is.
  float (*max_of)(const float* x, int64_t n);
  float (*sum_exp)(const float* x, int64_t n, float max);
};

extern const WidenKernels kWidenPlain, kWidenAvx2, kWidenAvx512;

const WidenKernels& widen_kernels();  // those of `isa()`

}  // namespace dmoe::cpu
