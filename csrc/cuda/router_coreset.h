// Stage 2 of the route kernel: the coreset of a block, from the votes.
#pragma once

#include "router_layout.h"

namespace dmoe::cuda {

constexpr uint32_t kZeroKey = 0x80000000u;  // order_key(0)

// How many of n keys are larger than `mine`, or equal and before position `at`. Zeros follow up to a multiple of four.
DMOE_DEVICE int count_better(const uint32_t* keys, int n, uint32_t mine, int at) {
  const Vector* quads = reinterpret_cast<const Vector*>(keys);
  int better[4] = {};
#pragma unroll 2
  for (int q = 0; q < (n + 3) / 4; ++q) {
    const Vector v = quads[q];
    const uint32_t below = mine - (q < at / 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) better[i] += v.word[i] > below;
  }
  const Vector own = quads[at / 4];
#pragma unroll
  for (int i = 0; i < 4; ++i) better[i] += i < at % 4 && own.word[i] == mine;
  return better[0] + better[1] + better[2] + better[3];
}

// How many experts top_p takes, from their shares in descending order: N neighbours per lane, the same in every warp.
template <int N>
DMOE_DEVICE int crossing(const Routing& routing, const float* shares, int experts) {
  const int lane = dev::lane();
  double covered[N], sum = 0;
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    dev::Four four{};
    if (lane * N + i < experts) four = *reinterpret_cast<const dev::Four*>(&shares[lane * N + i]);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (lane * N + i + j < experts) sum += four.v[j];
      covered[i + j] = sum;
    }
  }
  double upto = sum;
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const double other = dev::shuffle_up(upto, by);
    if (lane >= by) upto += other;
  }
  double lower = dev::shuffle_up(upto, 1);
  if (lane == 0) lower = 0;
  uint32_t within = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    within += lane * N + i < experts && static_cast<float>(lower + covered[i]) <= routing.top_p;
  }
  return static_cast<int>(dev::warp_add(within)) + 1;
}

// Calls body(i, e) for each expert of this thread, e = thread + i * kRouterThreads; for a whole warp, or not at all.
template <int N, class Body>
DMOE_DEVICE void each_expert(const Part& p, const Body& body) {
#pragma unroll
  for (int i = 0; i < N * 32 / kRouterThreads; ++i) {
    const int e = dev::thread() + i * kRouterThreads;
    if (e < p.padded) body(i, e);
  }
}

// The votes of all thread blocks of the cluster, in a fixed order; their keys; and which of them are not 0, as bits.
template <int N>
DMOE_DEVICE void add_votes(const Routing& routing, const Part& p) {
  each_expert<N>(p, [&](int, int e) {
    double sum = p.votes[e];
    if (p.size > 1) sum = dev::remote(p.votes, 0)[e];
    for (int other = 1; other < p.size; ++other) {
      const double part = dev::remote(p.votes, other)[e];
      sum = routing.aggregate != Aggregate::max ? sum + part : part > sum ? part : sum;
    }
    p.value[e] = static_cast<float>(sum);
    p.key[e] = e < p.experts ? order_key(p.value[e]) : 0;
    const uint32_t word = dev::ballot(e < p.experts && p.key[e] != kZeroKey);
    if (dev::lane() == 0) p.member[e >> 5] = word;
  });
  dev::sync();
}

// What top_p divides the votes by, for shares of their sum; the same in every warp.
template <int N>
DMOE_DEVICE float norm_of_votes(const Part& p) {
  double total = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i * 32 + dev::lane() < p.experts) total += p.value[i * 32 + dev::lane()];
  }
  return static_cast<float>(warp_sum(total)) + kEps;
}

// The members, marked as bits, as the ascending list of the coreset. Returns how many they are.
template <int N>
DMOE_DEVICE int write_coreset(const Router& a, const Part& p, int block) {
  const int lane = dev::lane(), n_members = bits_before(p.member, p.words);
  each_expert<N>(p, [&](int, int e) {
    const uint32_t word = p.member[e >> 5];
    const int before = bits_before(p.member, e >> 5);
    const int position = before + dev::popcount(bits_below(word, e & 31));
    if (lane == 0) p.before[e >> 5] = before;
    if (word >> (e & 31) & 1) {
      p.coreset[position] = e;
      if (p.rank == 0 && position < a.coreset_width) a.coreset_ids[block * a.coreset_width + position] = e;
    }
  });
  if (dev::thread() == 0) p.before[p.words] = n_members;
  if (p.rank == 0) {
    for (int i = n_members + dev::thread(); i < a.coreset_width; i += kRouterThreads) {
      a.coreset_ids[block * a.coreset_width + i] = -1;
    }
    if (dev::thread() == 0) a.coreset_sizes[block] = n_members;
  }
  dev::sync();
  return n_members;
}

// The same in every thread block of the cluster: writes the coreset in ascending order and returns its size.
// Ranks are counted among the experts whose votes are not 0, mostly a quarter of all; the others' follow from their ids.
template <int N>
DMOE_DEVICE int select_coreset(const Router& a, const Routing& routing, const Part& p, int block) {
  constexpr int kOwn = N * 32 / kRouterThreads;  // experts per thread: thread + i * kRouterThreads
  const int lane = dev::lane();
  add_votes<N>(routing, p);

  int rank[kOwn] = {};
  int64_t limit = routing.capacity;
  if (routing.select == Select::top_p || routing.select == Select::top_n) {
    const float norm = routing.select == Select::top_p ? norm_of_votes<N>(p) : 1;
    const int n = bits_before(p.member, p.words);
    int at[kOwn] = {};
    bool nonzero[kOwn] = {};
    each_expert<N>(p, [&](int i, int e) {
      const uint32_t word = p.member[e >> 5];
      at[i] = bits_before(p.member, e >> 5) + dev::popcount(bits_below(word, e & 31));
      nonzero[i] = word >> (e & 31) & 1;
      if (nonzero[i]) p.nonzero[at[i]] = p.key[e];
    });
    if (dev::thread() < 3) p.nonzero[n + dev::thread()] = 0;
    dev::sync();
    each_expert<N>(p, [&](int i, int e) {
      const uint32_t mine = p.key[e];
      rank[i] = count_better(p.nonzero, n, mine, nonzero[i] ? at[i] : 0);
      rank[i] += !nonzero[i] ? e - at[i] : mine < kZeroKey ? p.experts - n : 0;
      if (e < p.experts) p.shares[rank[i]] = p.value[e] / norm;
    });
    dev::sync();
    if (routing.select == Select::top_p) {
      limit = crossing<N>(routing, p.shares, p.experts);
      limit = limit > routing.min_experts ? limit : routing.min_experts;
      limit = limit < routing.max_experts ? limit : routing.max_experts;
    }
  }
  each_expert<N>(p, [&](int i, int e) {
    const bool in = routing.select == Select::all       ? true
                    : routing.select == Select::nonzero ? p.value[e] > 0
                                                        : rank[i] < limit;
    const uint32_t word = dev::ballot(in && e < p.experts);
    if (lane == 0) p.member[e >> 5] = word;
  });
  dev::sync();
  return write_coreset<N>(a, p, block);
}

}  // namespace dmoe::cuda
