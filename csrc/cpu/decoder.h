// What a decoder layer does beside its products: norms, rotary embedding, the KV cache, and the choice of tokens.
// Plain pointers only, all tensors contiguous; each function rounds where torch's form (dmoe_ops/reference.py) does.
#pragma once

#include "experts.h"

namespace dmoe::cpu {

// sum = x + delta; normed = weight * sum / sqrt(mean(sum^2) + eps), row by row.
struct AddRmsNorm {
  int64_t rows, size;
  Dtype dtype;
  const void* x;       // [rows, size]
  const void* delta;   // [rows, size]
  const void* weight;  // [size]
  float eps;
  void* normed;  // [rows, size]
  void* sum;     // [rows, size]
};
void add_rms_norm(const AddRmsNorm& args, const ParallelFor& parallel);

// Splits qkv, normalises queries and keys head by head, turns their first `rotary` dimensions, and writes keys and values
// behind the prefix.
struct QkNormRope {
  int64_t sequences, tokens, heads, kv_heads, size, rotary, capacity;
  Dtype dtype;
  const void* qkv;       // [sequences, tokens, heads + 2 * kv_heads, size]
  const void* q_weight;  // [size]; null: no norm
  const void* k_weight;  // [size]
  float eps;
  const void* cos;      // [past + tokens or more, rotary]
  const void* sin;      // like cos
  const int64_t* rows;  // [sequences], of the cache; null: all, in order
  int64_t past;         // tokens of the prefix
  void* query;          // [sequences, heads, tokens, size]
  void* keys;           // [batch, kv_heads, capacity, size]
  void* values;         // [batch, kv_heads, capacity, size]
};
void qk_norm_rope(const QkNormRope& args, const ParallelFor& parallel);

// The most probable token of each row, the lowest of equal ones, and its probability: NaN where a logit is NaN or infinite
// at the top.
struct Greedy {
  int64_t rows, vocab;
  Dtype dtype;
  const void* logits;  // [rows, vocab]
  int64_t* token;      // [rows]
  float* probability;  // [rows]
};
void greedy(const Greedy& args, const ParallelFor& parallel);

}  // namespace dmoe::cpu
