// The settings of dmoe_ops.BlockRouting, in the order of PACKED_INTS and PACKED_FLOATS (dmoe_ops/routing.py).
#pragma once

#include <cstdint>

namespace dmoe {

enum class Score : int32_t { sigmoid, softmax };
enum class Aggregate : int32_t { topk_sum, sum, max, union_ };
enum class Select : int32_t { top_p, top_n, nonzero, all };

struct Routing {
  int64_t top_k, block_size, n_group, topk_group;
  Score score;
  Aggregate aggregate;
  Select select;
  int64_t min_experts, max_experts, capacity, union_k;
  bool norm_topk_prob;
  float top_p, routed_scaling_factor;
};

constexpr float kEps = 1e-20f;

// tests/test_routing.py holds these lines against the order in Python.
template <class Ints, class Floats>
Routing unpack_routing(const Ints& ints, const Floats& floats) {
  Routing routing{};
  routing.top_k = ints[0];
  routing.block_size = ints[1];
  routing.n_group = ints[2];
  routing.topk_group = ints[3];
  routing.score = static_cast<Score>(ints[4]);
  routing.aggregate = static_cast<Aggregate>(ints[5]);
  routing.select = static_cast<Select>(ints[6]);
  routing.min_experts = ints[7];
  routing.max_experts = ints[8];
  routing.capacity = ints[9];
  routing.union_k = ints[10];
  routing.norm_topk_prob = ints[11] != 0;
  routing.top_p = static_cast<float>(floats[0]);
  routing.routed_scaling_factor = static_cast<float>(floats[1]);
  return routing;
}

}  // namespace dmoe
