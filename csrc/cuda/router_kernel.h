// The kernels of router.cu, one function per thread block.
#pragma once

#include "router_choice.h"
#include "router_coreset.h"
#include "router_gate.h"
#include "router_votes.h"

namespace dmoe::cuda {

// The settings of LLaDA2.0: where they are known to the compiler, what others need is neither fetched nor jumped over.
DMOE_BOTH void set_usual(Router& a, Routing& routing) {
  a.experts = 256;
  a.x_dtype = a.gate_dtype = Dtype::bf16;
  routing.top_k = routing.n_group = 8;
  routing.topk_group = 4;
  routing.score = Score::sigmoid;
  routing.aggregate = Aggregate::topk_sum;
  routing.select = Select::top_p;
  routing.norm_topk_prob = true;
}
inline bool is_usual(const Router& a, const Routing& r) {
  Router b = a;
  Routing s = r;
  set_usual(b, s);
  const bool dtypes = a.x_dtype == b.x_dtype && a.gate_dtype == b.gate_dtype;
  return a.experts == b.experts && (dtypes || !a.x) && r.top_k == s.top_k && r.n_group == s.n_group &&
         r.topk_group == s.topk_group && r.score == s.score && r.aggregate == s.aggregate && r.select == s.select &&
         r.norm_topk_prob == s.norm_topk_prob;
}

template <int N, bool kUsual = false>
DMOE_DEVICE void route_kernel(Router a, Routing routing, char* shared) {
  if constexpr (kUsual) set_usual(a, routing);
  Part p(a, routing, shared);
  const int block = dev::cluster_index();
  dev::launch_dependents();
  dev::cluster_arrive_relaxed();
  dev::wait_for_primary();
  p.rows = block_rows(a, block, routing.block_size);
  float bias[N * 32 / kRouterThreads];  // on its way while the gate runs
#pragma unroll
  for (int i = 0; i < N * 32 / kRouterThreads; ++i) {
    const int e = dev::thread() + i * kRouterThreads;
    bias[i] = a.expert_bias && e < p.experts ? a.expert_bias[e] : 0.0f;
  }
  if (dev::thread() < 16) p.used[dev::thread()] = 0;
  if (a.schedule && dev::cta() == 0) {
    for (int i = dev::thread(); i < kCounters; i += kRouterThreads) a.schedule[i] = 0;
  }
  dev::cluster_wait();
  if (p.fused) gate_of_cluster(a, routing, p);
#pragma unroll
  for (int i = 0; i < N * 32 / kRouterThreads; ++i) {
    const int e = dev::thread() + i * kRouterThreads;
    if (e < p.padded) p.bias[e] = bias[i];
  }
  if (p.fused) {
    dev::cluster_arrive();
    dev::cluster_wait();
  } else {
    dev::sync();
  }
  votes_of_tokens<N>(a, routing, p);
  dev::cluster_arrive();
  dev::cluster_wait();
  const int n_members = select_coreset<N>(a, routing, p, block);
  experts_of_tokens<N>(a, routing, p, n_members);

  // The schedule: the experts used in any block. With several blocks, the last to arrive has them all.
  dev::cluster_arrive();
  dev::cluster_wait();  // also: no thread block leaves while another may still read its votes
  if (!a.schedule || p.rank != 0) return;
  uint32_t* used = p.used;
  if (a.n_blocks > 1) {
    uint32_t* all = used_words(a);
    uint32_t* arrived = all + p.words;
    uint32_t* last = p.member;
    if (dev::thread() < p.words && used[dev::thread()]) dev::atomic_or(&all[dev::thread()], used[dev::thread()]);
    dev::sync();
    if (dev::thread() == 0) *last = dev::atomic_add_ordered(arrived, 1) + 1 == static_cast<uint32_t>(a.n_blocks);
    dev::sync();
    if (!*last) return;
    if (dev::thread() < p.words) used[dev::thread()] = all[dev::thread()];
    dev::sync();
  }
  write_used(used, p.experts, a.schedule);
}

}  // namespace dmoe::cuda
