// Selection by one warp: scores, the best few of up to 32 * N candidates, and the groups a token may choose from.
//
// Written over the lanes of dmoe::dev, so the GPU and the tests' emulator run the same code. Candidate i * 32 + lane belongs
// to that lane: its key lies in element i of the lane's registers, its scores in shared memory. A candidate's key is its selection score as an unsigned integer of the same order, 0
// for what may not be chosen; ties go to the lower position. `dmoe_ops/reference.py` is the contract, its rounding included.
#pragma once

#include "cuda/device.h"
#include "routing.h"

namespace dmoe {

constexpr float kNever = -INFINITY;  // the selection score of what may not be chosen

DMOE_DEVICE bool is_nan(float value) { return value != value; }

// Larger floats have larger keys and no float has key 0. -0 and 0 are one number.
DMOE_DEVICE uint32_t order_key(float value) {
  const uint32_t b = dev::bits(value + 0.0f);
  return b >> 31 ? ~b : b | 0x80000000u;
}
DMOE_DEVICE float key_value(uint32_t key) { return dev::from_bits(key >> 31 ? key & 0x7fffffffu : ~key); }
DMOE_DEVICE uint32_t candidate_key(float selection) { return selection > kNever ? order_key(selection) : 0; }

template <class T>
DMOE_DEVICE T warp_sum(T value) {
  for (int by = 16; by > 0; by >>= 1) value += dev::shuffle_xor(value, by);
  return value;
}

// What one logit needs to know of its row for a softmax.
struct Row {
  double top, sum;
};

// exp(logit - top) and its limits: equal shares among the +inf, and among all where everything is -inf.
DMOE_DEVICE double share(float logit, double top) {
  const double wide = logit;
  if (wide == top) return 1.0;
  return top - top != 0.0 ? 0.0 : exp(wide - top);
}

DMOE_DEVICE Row softmax_row(const float* logits, int experts) {
  uint32_t best = 0;
  for (int e = dev::lane(); e < experts; e += 32) {
    const uint32_t key = is_nan(logits[e]) ? 0 : order_key(logits[e]);
    best = key > best ? key : best;
  }
  const double top = key_value(dev::warp_max(best));
  double sum = 0;
#pragma unroll 1
  for (int e = dev::lane(); e < experts; e += 32) {
    if (!is_nan(logits[e])) sum += share(logits[e], top);
  }
  return {top, warp_sum(sum)};
}

// s, rounded once from double. A NaN logit scores 0.
DMOE_DEVICE float score(float logit, Score kind, const Row& row) {
  if (is_nan(logit)) return 0.0f;
  if (kind == Score::sigmoid) return static_cast<float>(1.0 / (1.0 + exp(-static_cast<double>(logit))));
  return static_cast<float>(share(logit, row.top) / row.sum);
}

// r = s + bias
DMOE_DEVICE float selection_score(float logit, float score, float bias) {
  const float r = score + bias;
  return is_nan(logit) || is_nan(r) ? kNever : r;
}

// s and r of candidates 0 .. n - 1, each by its lane; candidate m is expert_of(m). Up to `padded` there is nothing to choose.
// The loop stays a loop: exp and a division in double are some hundred instructions, which have to be fetched.
template <class ExpertOf>
DMOE_DEVICE void score_all(const float* logits, const float* bias, Score kind, const Row& row, int n, int padded,
                           const ExpertOf& expert_of, float* s, float* r) {
#pragma unroll 2
  for (int m = dev::lane(); m < padded; m += 32) {
    const int e = m < n ? expert_of(m) : -1;
    const float logit = e < 0 ? NAN : logits[e];
    s[m] = score(logit, kind, row);
    r[m] = selection_score(logit, s[m], bias && e >= 0 ? bias[e] : 0.0f);
  }
}

template <int N>
DMOE_DEVICE void load_keys(const float* r, int padded, uint32_t (&keys)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int m = i * 32 + dev::lane();
    keys[i] = m < padded ? candidate_key(r[m]) : 0;
  }
}

// The best candidate that is left, which is then taken out: its position, or -1. Called by all lanes, the same answer in all.
template <int N>
DMOE_DEVICE int pop(uint32_t (&keys)[N]) {
  uint32_t best = 0;
  int at = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (keys[i] > best) {
      best = keys[i];
      at = i;
    }
  }
  const uint32_t top = dev::warp_max(best);
  if (top == 0) return -1;
  const int position = static_cast<int>(dev::warp_min(best == top ? static_cast<uint32_t>(at * 32 + dev::lane()) : ~0u));
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (position == i * 32 + dev::lane()) keys[i] = 0;
  }
  return position;
}

// Adds one token's votes, stage 1, to the sums (or maxima) of expert i * 32 + lane. s and r [padded] in shared memory.
template <int N>
DMOE_DEVICE void vote(const Routing& routing, const float* s, const float* r, int padded, double (&votes)[N]) {
  const int lane = dev::lane();
  if (routing.aggregate == Aggregate::sum) {
    double total = 0;
    for (int e = lane; e < padded; e += 32) total += s[e];
    const float norm = static_cast<float>(warp_sum(total)) + kEps;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i * 32 + lane < padded) votes[i] += s[i * 32 + lane] / norm;
    }
  } else if (routing.aggregate == Aggregate::max) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const double value = i * 32 + lane < padded ? r[i * 32 + lane] : kNever;
      votes[i] = value > votes[i] ? value : votes[i];
    }
  } else {
    const bool count = routing.aggregate == Aggregate::union_;
    uint32_t keys[N], left[N];
    load_keys(r, padded, keys);
#pragma unroll
    for (int i = 0; i < N; ++i) left[i] = keys[i];
    const int k = static_cast<int>(count ? routing.union_k : routing.top_k);
    for (int j = 0; j < k; ++j) {
      if (pop(left) < 0) break;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (keys[i] != left[i]) votes[i] += count ? 1.0 : r[i * 32 + lane];
    }
  }
}

// The groups a token may choose from: bit i of a lane stands for group i * 32 + lane. `selection` holds the scores of the
// coreset's members in ascending order of their ids, and first(g) the position of the first member of group g or above.
template <int N, class First>
DMOE_DEVICE uint32_t keep_groups(const Routing& routing, const float* selection, const First& first) {
  const int n_group = static_cast<int>(routing.n_group);
  uint32_t keys[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int group = i * 32 + dev::lane();
    keys[i] = 0;
    if (group < n_group) {
      const int begin = first(group), count = first(group + 1) - begin;
      float best = kNever, second = kNever;
      // Each lane starts elsewhere, so that groups of 32 do not all read the same bank.
      for (int step = 0, j = count ? dev::lane() % count : 0; step < count; ++step, j = j + 1 < count ? j + 1 : 0) {
        const float r = selection[begin + j];
        second = r > best ? best : r > second ? r : second;
        best = r > best ? r : best;
      }
      // A group of fewer than two candidates ranks after every group with two; it is still a group: its key is not 0.
      keys[i] = order_key(second > kNever ? best + second : kNever);
    }
  }
  uint32_t kept = 0;
  for (int j = 0; j < routing.topk_group; ++j) {
    const int group = pop(keys);
    if (group >= 0 && (group & 31) == dev::lane()) kept |= 1u << (group >> 5);
  }
  return kept;
}

// Stage 3: the positions of one token's top_k <= 32 best candidates, slot j in lane j, -1 where there is none. keys[0] are
// the candidates inside the kept groups, keys[1] those outside, which fill what is left free.
template <int N>
DMOE_DEVICE int choose(int top_k, uint32_t (&inside)[N], uint32_t (&outside)[N]) {
  int chosen = -1, slot = 0;
  for (; slot < top_k; ++slot) {
    const int position = pop(inside);
    if (position < 0) break;
    if (slot == dev::lane()) chosen = position;
  }
  for (; slot < top_k; ++slot) {
    const int position = pop(outside);
    if (position < 0) break;
    if (slot == dev::lane()) chosen = position;
  }
  return chosen;
}

// topk_weights of the slot in this lane, from the score of its expert (0 for a slot without one).
DMOE_DEVICE float weigh(const Routing& routing, float s) {
  const float norm = static_cast<float>(warp_sum(static_cast<double>(s))) + kEps;
  return (routing.norm_topk_prob ? s / norm : s) * routing.routed_scaling_factor;
}

}  // namespace dmoe
