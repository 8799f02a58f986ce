// The launches of csrc/cuda/router.cu and experts.cu as the emulator takes them, and the memory that they share with others.
#pragma once

#include "cuda/experts_kernel.h"
#include "cuda/router_kernel.h"

namespace dmoe::cuda {

using Launches = std::vector<emulate::Launch>;
using Memories = std::vector<emulate::Memory>;

// Both forms of the router, as block_route chooses between them; `a` and `routing` are copied.
inline Launches route_launches(Router a, const Routing& routing, int cluster, bool two_launches) {
  Launches all;
  if (a.schedule && a.n_blocks > 1) {  // stands for the launcher's memset
    all.push_back({1, 32, 1, 0, false, [a](char*) {
                     for (int64_t i = dev::thread(); i <= (a.experts + 31) / 32; i += 32) used_words(a)[i] = 0;
                   }});
  }
  if (two_launches) {
    const int tiles =
        static_cast<int>((a.experts + kGateTile - 1) / kGateTile * ((a.tokens + kGateTile - 1) / kGateTile));
    all.push_back({tiles, kRouterThreads, 1, gate_shared(), false, [a](char* shared) { gate_kernel(a, shared); }});
    a.x = nullptr;
  }
  const RouterShared at =
      router_shared(static_cast<int>(a.experts), static_cast<int>(routing.block_size), cluster, a.x != nullptr);
  all.push_back({static_cast<int>(a.n_blocks) * cluster, kRouterThreads, cluster, at.bytes, !two_launches,
                 [a, routing](char* shared) {
                   if (is_usual(a, routing)) {
                     route_kernel<8, true>(a, routing, shared);
                   } else if (a.experts <= 256) {
                     route_kernel<8>(a, routing, shared);
                   } else {
                     route_kernel<16>(a, routing, shared);
                   }
                 }});
  return all;
}

inline Memories route_memory(const Router& a, const Routing& routing) {
  const int64_t x_bytes = a.x_dtype == Dtype::f32 ? 4 : 2;
  return {{a.x, a.tokens * a.hidden * x_bytes, "x"},
          {a.logits, 4 * a.tokens * a.experts, "logits"},
          {a.block_offsets, 4 * (a.n_blocks + 1), "block_offsets"},
          {a.topk_ids, 4 * a.tokens * routing.top_k, "topk_ids"},
          {a.topk_weights, 4 * a.tokens * routing.top_k, "topk_weights"},
          {a.coreset_ids, 4 * a.n_blocks * a.coreset_width, "coreset_ids"},
          {a.coreset_sizes, 4 * a.n_blocks, "coreset_sizes"},
          {a.schedule, 4 * schedule_words(a.experts), "schedule"}};
}

inline emulate::Launch schedule_launch(const int32_t* topk_ids, int64_t slots, int experts, const int32_t* expert_map,
                                       uint32_t* out) {
  return {1,    kRouterThreads,
          1,    128,
          true, [=](char* shared) { schedule_kernel(topk_ids, slots, experts, expert_map, out, shared); }};
}

using ExpertsKernel = decltype(&experts_kernel<false, false, 1>);

template <bool kHalf, bool kFp8, bool kGelu>
constexpr ExpertsKernel kExpertsKernels[] = {
    experts_kernel<kHalf, kFp8, 1, kGelu>, experts_kernel<kHalf, kFp8, 2, kGelu>, experts_kernel<kHalf, kFp8, 3, kGelu>,
    experts_kernel<kHalf, kFp8, 4, kGelu>};

template <bool kGelu>
ExpertsKernel experts_kernel_of(const Experts& a) {
  const bool half = a.dtype == Dtype::f16;
  return (a.fp8() ? (half ? kExpertsKernels<true, true, kGelu> : kExpertsKernels<false, true, kGelu>)
                  : (half ? kExpertsKernels<true, false, kGelu>
                          : kExpertsKernels<false, false, kGelu>))[(a.tokens + 15) / 16 - 1];
}

inline emulate::Launch experts_launch(const Experts& a, int ctas, const Form& form) {
  const auto kernel = a.activation == Activation::silu ? experts_kernel_of<false>(a) : experts_kernel_of<true>(a);
  return {ctas, form.threads(),
          1,    experts_shared(a, form),
          true, [a, form, kernel](char* shared) { kernel(a, form, shared); }};
}

inline Memories experts_memory(const Experts& a) {
  const ExpertsWorkspace w =
      experts_workspace(a.tokens, a.hidden, a.intermediate, a.shared_intermediate, a.experts, a.top_k);
  return {{a.x, 2 * a.tokens * a.hidden, "x"},
          {a.topk_ids, 4 * a.tokens * a.top_k, "topk_ids"},
          {a.topk_weights, 4 * a.tokens * a.top_k, "topk_weights"},
          {a.schedule, 4 * schedule_words(a.experts), "schedule"},
          {a.workspace, w.bytes, "workspace"},
          {a.y, 2 * a.tokens * a.hidden, "y"}};
}

}  // namespace dmoe::cuda
