// Stage 1 of the route kernel: the scores of the tokens, and their votes for the experts.
#pragma once

#include "router_layout.h"

namespace dmoe::cuda {

// Sums are in double and in a fixed order: over a warp's tokens, over warps, over thread blocks.
template <int N>
DMOE_DEVICE void votes_of_tokens(const Router& a, const Routing& routing, const Part& p) {
  const int lane = dev::lane(), warp = dev::warp();
  double mine[N];
#pragma unroll
  for (int i = 0; i < N; ++i) mine[i] = routing.aggregate == Aggregate::max ? kNever : 0;
  p.each_token([&](int token) {
    const float* row = p.logit_row(a, token);
    float* s_row = p.fused ? p.scores + token / p.size * p.padded : p.of_warp();
    if (p.fused) {  // not in the gate: the barrier behind it would wait until these are written
      for (int e = lane; e < p.experts; e += 32) a.logits[(p.rows.begin + token) * a.experts + e] = row[e];
    }
    Row norm{};
    if (routing.score == Score::softmax) {
      norm = softmax_row(row, p.experts);
      if (lane == 0) p.norms[token / p.size] = norm;
    }
    if (!p.fused || routing.score == Score::softmax) {
      // A loop, as exp and a division in double are some hundred instructions, which have to be fetched.
#pragma unroll 2
      for (int e = lane; e < p.experts; e += 32) s_row[e] = score(row[e], routing.score, norm);
    }
    if (routing.select == Select::all) return;
    float s[N], r[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int e = i * 32 + lane;
      const float value = e < p.experts ? s_row[e] : NAN;
      s[i] = or_zero(value);
      r[i] = e < p.experts ? value + p.bias[e] : kNever;
    }
    vote(routing, s, r, mine);
  });
  dev::sync_warp();  // this warp's `parts` take the place of its scores
  double* parts = reinterpret_cast<double*>(p.scratch);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i * 32 + lane < p.padded) parts[warp * p.padded + i * 32 + lane] = mine[i];
  }
  dev::sync();
  for (int e = dev::thread(); e < p.padded; e += kRouterThreads) {
    double sum = parts[e];
    for (int w = 1; w < kRouterWarps; ++w) {
      const double part = parts[w * p.padded + e];
      sum = routing.aggregate != Aggregate::max ? sum + part : part > sum ? part : sum;
    }
    p.votes[e] = sum;
  }
}

}  // namespace dmoe::cuda
