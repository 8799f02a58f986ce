// Selection by one warp: scores, the best few of up to 32 * N candidates, and the groups a token may choose from.
//
// Written over the lanes of dmoe::dev, so the GPU and the tests' emulator run the same code. Candidate i * 32 + lane
// belongs to that lane: its key lies in element i of the lane's registers. A candidate's key is its selection score as an
// unsigned integer of the same order, 0 for what may not be chosen; ties go to the lower position.
// `dmoe_ops/reference.py` is the contract, its rounding included.
#pragma once

#include "cuda/device.h"
#include "routing.h"

namespace dmoe {

constexpr float kNever = -INFINITY;  // the selection score r = s + bias of what may not be chosen; a NaN does as well

DMOE_DEVICE bool is_nan(float value) { return value != value; }

// Larger floats have larger keys and no float has key 0. -0 comes before 0: it may be a logit, but no score and no vote, as
// sums of other numbers never are -0.
DMOE_DEVICE uint32_t order_key(float value) {
  const uint32_t b = dev::bits(value);
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
  return wide == top ? 1.0 : exp(wide - top);
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

// s, rounded once from double. Of a NaN logit it is NaN, which counts as 0 and may not be chosen.
DMOE_DEVICE float score(float logit, Score kind, const Row& row) {
  if (is_nan(logit)) return logit;
  if (kind == Score::sigmoid) return static_cast<float>(1.0 / (1.0 + exp(-static_cast<double>(logit))));
  return static_cast<float>(share(logit, row.top) / row.sum);
}
DMOE_DEVICE float or_zero(float score) { return is_nan(score) ? 0.0f : score; }

template <int N>
DMOE_DEVICE void load_keys(const float* r, int padded, uint32_t (&keys)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int m = i * 32 + dev::lane();
    keys[i] = m < padded ? candidate_key(r[m]) : 0;
  }
}

// The largest of a lane's keys, in pairs: few of them wait for each other.
template <int N>
DMOE_DEVICE uint32_t largest(const uint32_t (&keys)[N]) {
  uint32_t best[N];
#pragma unroll
  for (int i = 0; i < N; ++i) best[i] = keys[i];
#pragma unroll
  for (int step = 1; step < N; step *= 2) {
#pragma unroll
    for (int i = 0; i + step < N; i += 2 * step) best[i] = best[i + step] > best[i] ? best[i + step] : best[i];
  }
  return best[0];
}

// The best candidate that is left, which is then taken out: its position, or -1. Called by all lanes, the same answer in all.
template <int N>
DMOE_DEVICE int pop(uint32_t (&keys)[N]) {
  const uint32_t top = dev::warp_max(largest(keys));
  if (top == 0) return -1;
  uint32_t here[N];
#pragma unroll
  for (int i = 0; i < N; ++i) here[i] = keys[i] == top ? ~static_cast<uint32_t>(i * 32 + dev::lane()) : 0;
  const int position = static_cast<int>(~dev::warp_max(largest(here)));
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (position == i * 32 + dev::lane()) keys[i] = 0;
  }
  return position;
}

// Adds one token's votes, stage 1, to the sums (or maxima) of expert i * 32 + lane, whose scores are s[i] (0 where there
// is none) and r[i].
template <int N>
DMOE_DEVICE void vote(const Routing& routing, const float (&s)[N], const float (&r)[N], double (&votes)[N]) {
  if (routing.aggregate == Aggregate::sum) {
    double total = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) total += s[i];
    const float norm = static_cast<float>(warp_sum(total)) + kEps;
#pragma unroll
    for (int i = 0; i < N; ++i) votes[i] += s[i] / norm;
  } else if (routing.aggregate == Aggregate::max) {
#pragma unroll
    for (int i = 0; i < N; ++i) votes[i] = r[i] > votes[i] ? r[i] : votes[i];
  } else {
    const bool count = routing.aggregate == Aggregate::union_;
    uint32_t keys[N], left[N];
#pragma unroll
    for (int i = 0; i < N; ++i) keys[i] = left[i] = candidate_key(r[i]);
    const int k = static_cast<int>(count ? routing.union_k : routing.top_k);
    for (int j = 0; j < k; ++j) {
      if (pop(left) < 0) break;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (keys[i] != left[i]) votes[i] += count ? 1.0 : r[i];
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

// Stage 3 for at most 32 members, one per lane, and at most 32 groups: ranks by shuffles, where `choose` takes the best
// again and again. selection: of this lane's member, kNever where there is none; group: of that member; first(g) as above.
// slots: [32] in shared memory, of this warp.
template <class First>
DMOE_DEVICE int choose_few(const Routing& routing, int n_members, float selection, int group, const First& first,
                           int32_t* slots) {
  const int lane = dev::lane(), top_k = static_cast<int>(routing.top_k);
  const uint32_t key = candidate_key(selection);
  bool inside = true;
  if (routing.n_group > 1) {
    const int n_group = static_cast<int>(routing.n_group);
    const int begin = lane < n_group ? first(lane) : 0, count = lane < n_group ? first(lane + 1) - begin : 0;
    float best = kNever, second = kNever;
    const int most = static_cast<int>(dev::warp_max(static_cast<uint32_t>(count)));
    for (int j = 0; j < most; ++j) {
      const float r = dev::shuffle(selection, (begin + j) & 31);
      if (j >= count) continue;
      second = r > best ? best : r > second ? r : second;
      best = r > best ? r : best;
    }
    // As in `keep_groups`.
    const uint32_t mine = lane < n_group ? order_key(second > kNever ? best + second : kNever) : 0;
    int better = 0;
#pragma unroll 8
    for (int j = 0; j < n_group; ++j) better += dev::shuffle(mine, j) > mine - (j < lane);
    const uint32_t kept = dev::ballot(mine != 0 && better < routing.topk_group);
    inside = kept >> (group & 31) & 1;
  }
  // This member's place: among those inside the kept groups, or behind all of them.
  const uint32_t all_inside = dev::ballot(inside), chosen_first = dev::ballot(inside && key != 0);
  int place = inside ? 0 : dev::popcount(chosen_first);
#pragma unroll 4
  for (int j = 0; j < n_members; ++j) {
    const uint32_t other = dev::shuffle(key, j);
    place += other > key - (j < lane) && (all_inside >> j & 1) == inside;
  }
  slots[lane] = -1;
  dev::sync_warp();
  if (key != 0 && place < top_k) slots[place] = lane;
  dev::sync_warp();
  return lane < top_k ? slots[lane] : -1;
}

// topk_weights of the slot in this lane, from the score of its expert (0 for a slot without one).
DMOE_DEVICE float weigh(const Routing& routing, float s) {
  double sum = s;
  for (int by = 16; by > 0; by >>= 1) {
    if (by < routing.top_k) sum += dev::shuffle_xor(sum, by);  // beyond the slots there is nothing but zeros
  }
  const float norm = static_cast<float>(sum) + kEps;
  return (routing.norm_topk_prob ? s / norm : s) * routing.routed_scaling_factor;
}

}  // namespace dmoe
