// The settings of dmoe_ops.BlockRouting, as `_library.packed_routing` sends them.
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

template <class Ints, class Floats>
Routing unpack_routing(const Ints& ints, const Floats& floats) {
  return {ints[0],
          ints[1],
          ints[2],
          ints[3],
          static_cast<Score>(ints[4]),
          static_cast<Aggregate>(ints[5]),
          static_cast<Select>(ints[6]),
          ints[7],
          ints[8],
          ints[9],
          ints[10],
          ints[11] != 0,
          static_cast<float>(floats[0]),
          static_cast<float>(floats[1])};
}

}  // namespace dmoe
