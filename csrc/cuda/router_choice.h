// Stage 3 of the route kernel: the experts of each token, out of the coreset of its block.
#pragma once

#include "router_schedule.h"

namespace dmoe::cuda {

template <int N>
DMOE_DEVICE void experts_of_tokens(const Router& a, const Routing& routing, const Part& p, int n_members) {
  const int lane = dev::lane(), group_size = p.experts / static_cast<int>(routing.n_group);
  const int padded_members = (n_members + 31) / 32 * 32;
  const auto first = [&](int group) { return p.position(group * group_size); };
  p.each_token([&](int token) {
    const Row norm = !p.fused && routing.score == Score::softmax ? p.norms[token / p.size] : Row{};
    const auto score_of = [&](int e) {
      return p.fused ? p.scores[token / p.size * p.padded + e] : score(p.logit_row(a, token)[e], routing.score, norm);
    };
    const auto selection_of = [&](int m) {
      const int e = m < n_members ? p.coreset[m] : -1;
      return e < 0 ? kNever : score_of(e) + p.bias[e];
    };
    int chosen;
    if (n_members <= 32 && routing.n_group <= 32) {
      const int group = lane < n_members ? p.coreset[lane] / group_size : 0;
      int32_t* slots = reinterpret_cast<int32_t*>(p.of_warp());
      chosen = choose_few(routing, n_members, selection_of(lane), group, first, slots);
    } else {
      float* r = p.of_warp();
#pragma unroll 1
      for (int m = lane; m < padded_members; m += 32) r[m] = selection_of(m);
      dev::sync_warp();
      uint32_t inside[N], outside[N];
      load_keys(r, padded_members, inside);
#pragma unroll
      for (int i = 0; i < N; ++i) outside[i] = 0;
      if (routing.n_group > 1) {
        const uint32_t kept = keep_groups<N>(routing, r, first);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const int m = i * 32 + lane, group = m < n_members ? p.coreset[m] / group_size : 0;
          if (!(dev::shuffle(kept, group & 31) >> (group >> 5) & 1)) {
            outside[i] = inside[i];
            inside[i] = 0;
          }
        }
      }
      chosen = choose(p.top_k, inside, outside);
    }
    const int e = chosen < 0 ? -1 : p.coreset[chosen];
    const float weight = weigh(routing, e < 0 ? 0.0f : score_of(e));
    dev::sync_warp();  // this warp's scratch is free for the next token
    if (lane < p.top_k) {
      const int64_t slot = (p.rows.begin + token) * p.top_k + lane;
      a.topk_ids[slot] = e;
      a.topk_weights[slot] = weight;
      if (a.schedule && e >= 0 && is_here(a.expert_map, e))
        dev::atomic_or(&dev::remote(p.used, 0)[e >> 5], 1u << (e & 31));
    }
  });
}

}  // namespace dmoe::cuda
