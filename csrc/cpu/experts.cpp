#include "experts.h"

#include <stdexcept>
#include <string>
#include <utility>

#include "dot.h"
#include "isa.h"
#include "widen.h"
#include "work.h"

namespace dmoe::cpu {
namespace {

int64_t row_of(const Experts& a, int64_t expert) {
  const int64_t row = a.expert_map ? a.expert_map[expert] : expert;
  if (row < -1)
    throw std::invalid_argument("expert_map must have a row for every expert that a token chose, got " +
                                std::to_string(row) + " for expert " + std::to_string(expert));
  return row;
}

}  // namespace

Slots slots_of(const Experts& a) {
  std::vector<int64_t> end(a.experts + 1, 0);  // of every expert's slots
  const int64_t pairs = a.tokens * a.top_k, first = a.carry ? a.begin : 0, last = a.carry ? a.end : a.experts;
  const auto valid = [&](int64_t i) {
    const int64_t expert = a.topk_ids[i];
    return expert >= first && expert < last && row_of(a, expert) >= 0;
  };
  for (int64_t i = 0; i < pairs; ++i)
    if (valid(i)) ++end[a.topk_ids[i] + 1];
  for (int64_t e = 0; e < a.experts; ++e) end[e + 1] += end[e];
  const int64_t routed = end[a.experts], shared = a.shared_intermediate > 0 && a.last_wave() ? a.tokens : 0;

  Slots slots;
  slots.routed = routed;
  slots.token.resize(routed + shared);
  slots.scale.resize(routed + shared, 1.f);
  for (int64_t i = 0; i < pairs; ++i) {
    if (!valid(i)) continue;
    const int64_t slot = end[a.topk_ids[i]]++;
    slots.token[slot] = i / a.top_k;
    slots.scale[slot] = a.topk_weights[i];
  }
  for (int64_t t = 0; t < shared; ++t) slots.token[routed + t] = t;

  const auto matrices = [&](const Weight& w13, const Weight& w2, int64_t inner) {
    return std::pair(Matrix{w13, a.dtype, 2 * inner, a.hidden, 2}, Matrix{w2, a.dtype, a.hidden, inner, 1});
  };
  const auto [w13, w2] = matrices(a.w13, a.w2, a.intermediate);
  for (int64_t e = 0, begin = 0; e < a.experts; begin = end[e++]) {
    if (begin == end[e]) continue;
    const int64_t row = row_of(a, e);
    slots.groups.push_back({w13.at(row), w2.at(row), a.intermediate, begin, end[e] - begin});
  }
  if (shared) {
    const auto [shared_w13, shared_w2] = matrices(a.shared_w13, a.shared_w2, a.shared_intermediate);
    slots.groups.push_back({shared_w13, shared_w2, a.shared_intermediate, routed, shared});
  }
  return slots;
}

void experts_forward(const Experts& args, const ParallelFor& parallel) {
  if (args.tokens == 0) return;
  const Slots slots = slots_of(args);
  if (const DotKernels* dot = args.dtype == Dtype::bf16 ? dot_kernels() : nullptr) {
    dot_forward(args, slots, *dot, parallel);
  } else {
    widen_forward(args, slots, parallel);
  }
}

}  // namespace dmoe::cpu
