// Block routing on the CPU; `dmoe_ops/reference.py` is the contract, its rounding rule included.
#pragma once

#include <cstdint>

#include "../routing.h"
#include "experts.h"

namespace dmoe::cpu {

struct BlockRoute {
  int64_t tokens, experts, n_blocks, coreset_width;
  const float* logits;           // [tokens, experts]
  const float* expert_bias;      // [experts] or null
  const int32_t* block_offsets;  // [n_blocks + 1] or null: then blocks are cut inside each run of seq_len rows
  int64_t seq_len;
  int32_t* topk_ids;       // [tokens, top_k]
  float* topk_weights;     // [tokens, top_k]
  int32_t* coreset_ids;    // [n_blocks, coreset_width]
  int32_t* coreset_sizes;  // [n_blocks]
  // Blocks that reach each other, if domain_offsets is there, or coresets that are given.
  int64_t n_domains;
  const int32_t* domain_offsets;  // [n_domains + 1], over blocks, or null
  int64_t pool_capacity;          // 0: the pool is the union of the coresets
  bool choose_in_pool;
  const int32_t* given;  // [n_blocks, coreset_width], in any order, or null
};

// Writes every element of the four outputs.
void block_route(const BlockRoute& args, const Routing& routing, const ParallelFor& parallel);

}  // namespace dmoe::cpu
