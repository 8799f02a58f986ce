// Expert feed-forward on the CPU: y_t = sum_j w_tj * W_down[e] (activation(W_gate[e] x_t) * (W_up[e] x_t)) + shared(x_t).
// Plain pointers only: no torch header, so the same code serves the ops, a C++ program and its tests.
#pragma once

#include <cstdint>
#include <functional>

#include "../activation.h"

namespace dmoe::cpu {

enum class Dtype { f32, bf16, f16 };
constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Runs body(begin, end) over disjoint chunks of [0, n), in any order, on any number of threads.
using ParallelFor = std::function<void(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body)>;

enum class Format { plain, fp8, int8, int4 };

// A stack of matrices: plain, in the dtype of x, or quantised with its scales (dmoe_ops/formats.py has their layouts).
struct Weight {
  const void* data = nullptr;
  Format format = Format::plain;
  const void* scale = nullptr;  // float32; bfloat16 for int4 where `scale_bf16`
  bool scale_bf16 = false;

  Weight() = default;
  Weight(const void* plain) : data(plain) {}
  Weight(const void* data, Format format, const void* scale, bool scale_bf16)
      : data(data), format(format), scale(scale), scale_bf16(scale_bf16) {}
};

// All tensors are contiguous and row-major. x, y and every plain weight share `dtype`; products accumulate in fp32.
struct Experts {
  int64_t tokens, hidden, intermediate, experts, top_k;
  Dtype dtype;
  const void* x;                // [tokens, hidden]
  Weight w13;                   // [experts, 2 * intermediate, hidden], gate rows first
  Weight w2;                    // [experts, hidden, intermediate]
  const int32_t* topk_ids;      // [tokens, top_k]; -1 adds nothing
  const float* topk_weights;    // [tokens, top_k]
  int64_t shared_intermediate;  // 0 where there is no shared expert
  Weight shared_w13;            // [2 * shared_intermediate, hidden] or null
  Weight shared_w2;             // [hidden, shared_intermediate] or null
  void* y;                      // [tokens, hidden]
  bool quantize_activations;    // against int8 weights: x and h are rounded to int8 as well, a row at a time
  // [experts] or null: the row of w13 and w2 that holds an expert. -1: it is elsewhere, and adds nothing; -2: it is not loaded,
  // and a token that names it is an error. Without a map, expert e is row e.
  const int32_t* expert_map = nullptr;
  // One wave of a call: the experts from `begin` up to `end` alone, and the shared expert behind the last of them. The sums go
  // on where those of the wave before ended. [tokens, hidden], or null: one call for all experts.
  float* carry = nullptr;
  int64_t begin = 0, end = 0;
  Activation activation = Activation::silu;

  bool first_wave() const { return !carry || begin == 0; }
  bool last_wave() const { return !carry || end == experts; }
};

// Writes every element of y, or before the last wave of the carry. The bits of y depend neither on how `parallel` cuts the work,
// nor on the rows that hold the experts, nor on the waves. Throws std::invalid_argument where an expert is not loaded.
void experts_forward(const Experts& args, const ParallelFor& parallel);

// out[t, n] = sum_h x[t, h] * weight[n, h] in fp32; x and weight may differ in dtype. (The router's gate.)
void linear_f32(const void* x, Dtype x_dtype, const void* weight, Dtype weight_dtype, int64_t tokens, int64_t hidden,
                int64_t rows, float* out, const ParallelFor& parallel);

}  // namespace dmoe::cpu
