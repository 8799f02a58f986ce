// Expert feed-forward on the CPU: y_t = sum_j w_tj * W_down[e] (silu(W_gate[e] x_t) * (W_up[e] x_t)) + shared(x_t).
// Plain pointers only: no torch header, so the same code serves the ops, a C++ program and its tests.
#pragma once

#include <cstdint>
#include <functional>

namespace dmoe::cpu {

enum class Dtype { f32, bf16, f16 };

// Runs body(begin, end) over disjoint chunks of [0, n), in any order, on any number of threads.
using ParallelFor = std::function<void(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body)>;

// All tensors are contiguous and row-major. x, y and every weight share `dtype`; products accumulate in fp32.
struct Experts {
  int64_t tokens, hidden, intermediate, experts, top_k;
  Dtype dtype;
  const void* x;              // [tokens, hidden]
  const void* w13;            // [experts, 2 * intermediate, hidden], gate rows first
  const void* w2;             // [experts, hidden, intermediate]
  const int32_t* topk_ids;    // [tokens, top_k]; -1 adds nothing
  const float* topk_weights;  // [tokens, top_k]
  int64_t shared_intermediate;  // 0 where there is no shared expert
  const void* shared_w13;       // [2 * shared_intermediate, hidden] or null
  const void* shared_w2;        // [hidden, shared_intermediate] or null
  void* y;                      // [tokens, hidden]
};

// Writes every element of y. The bits of y do not depend on how `parallel` cuts the work.
void experts_forward(const Experts& args, const ParallelFor& parallel);

// out[t, n] = sum_h x[t, h] * weight[n, h] in fp32; x and weight may differ in dtype. (The router's gate.)
void linear_f32(const void* x, Dtype x_dtype, const void* weight, Dtype weight_dtype, int64_t tokens, int64_t hidden,
                int64_t rows, float* out, const ParallelFor& parallel);

}  // namespace dmoe::cpu
