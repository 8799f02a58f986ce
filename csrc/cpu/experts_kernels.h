// What experts.cpp asks of an instruction set. experts_{plain,avx2,avx512}.cpp each compile experts_body.h into one table.
#pragma once

#include "experts.h"

namespace dmoe::cpu {

// One call multiplies at most this many weight rows over this much depth: unpacked to fp32 they take 16 KiB, half of L1.
constexpr int64_t kBlockRows = 16;
constexpr int64_t kBlockDepth = 256;

// Activations are fp32, and padded with zeros to a multiple of 8. Against bf16 weights each 8 are stored as 0 2 4 6 1 3 5 7:
// the even and the odd halves of eight packed bf16 widen with one shift and one mask.
constexpr int64_t kPad = 8;

struct Token {
  const float* x;  // its activations, from depth 0
  int64_t out;     // where its sums go, counted from Block::out
  float scale;
};

// out[token.out + r] += token.scale * sum_k weight[r, k] * token.x[k] for r < rows and k in [begin, end), tokens in order.
struct Block {
  Dtype dtype;
  const void* weight;         // row 0, from depth 0
  int64_t stride;             // elements from row to row
  int64_t rows, begin, end;   // rows <= kBlockRows, end - begin <= kBlockDepth, begin a multiple of kPad
  const Token* tokens;
  int64_t count;
  float* out;
};

struct Kernels {
  const char* name;
  // Fetches `next` into the cache on the way. The sum of a token depends neither on the other tokens nor on their number.
  void (*multiply)(const Block& block, const Block& next);
  // h = silu(gate) * up, stored as activations against `weight` expect them; n is a multiple of kPad.
  void (*silu_mul)(const float* gate, const float* up, int64_t n, Dtype weight, float* h);
  void (*widen)(const void* from, Dtype dtype, int64_t n, Dtype weight, float* to);  // to activations, padding included
  void (*narrow)(const float* from, int64_t n, Dtype dtype, void* to);               // rounds to nearest even
};

extern const Kernels kPlain, kAvx2, kAvx512;

}  // namespace dmoe::cpu
