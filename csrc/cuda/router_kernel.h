// The kernels of router.cu, one function per thread block.
#pragma once

#include "../select.h"
#include "router.h"

namespace dmoe::cuda {

struct alignas(16) Vector {
  uint32_t word[4];
};

// --- the gate: logits = x @ gate_weight.T with exact products and fp32 sums.
// bf16 is one part; fp16 and fp32 are cut into three bf16 parts, which hold every bit. Products of parts below 2^-24 of the
// result are left out. So tensor cores serve every pair of dtypes, and bf16 weights cost one product.

DMOE_DEVICE void split(float value, uint32_t (&part)[3]) {
  uint32_t b = dev::bits(value);
  const bool finite = (b & 0x7f800000u) != 0x7f800000u;
  if (value != value) b |= 0x00400000u;  // a NaN stays one when it is cut
  part[0] = b >> 16;
  float rest = finite ? value - dev::from_bits(b & 0xffff0000u) : 0.0f;
  part[1] = dev::bits(rest) >> 16;
  rest -= dev::from_bits(dev::bits(rest) & 0xffff0000u);
  part[2] = dev::bits(rest) >> 16;
}

// Elements at .. at + 7 as pairs of bf16, for each part.
template <int P>
DMOE_DEVICE void load_parts(const void* base, Dtype dtype, int64_t at, bool valid, uint32_t (&out)[P][4]) {
  if (!valid) {
#pragma unroll
    for (int p = 0; p < P; ++p) {
#pragma unroll
      for (int j = 0; j < 4; ++j) out[p][j] = 0;
    }
    return;
  }
  if constexpr (P == 1) {
    const Vector v = *reinterpret_cast<const Vector*>(static_cast<const uint16_t*>(base) + at);
#pragma unroll
    for (int j = 0; j < 4; ++j) out[0][j] = v.word[j];
  } else {
    Vector v[2];
    if (dtype == Dtype::f32) {
      v[0] = reinterpret_cast<const Vector*>(static_cast<const float*>(base) + at)[0];
      v[1] = reinterpret_cast<const Vector*>(static_cast<const float*>(base) + at)[1];
    } else {
      v[0] = *reinterpret_cast<const Vector*>(static_cast<const uint16_t*>(base) + at);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t low[3], high[3];
      if (dtype == Dtype::f32) {
        split(dev::from_bits(v[j >> 1].word[j % 2 * 2]), low);
        split(dev::from_bits(v[j >> 1].word[j % 2 * 2 + 1]), high);
      } else {
        split(dev::half_to_float(static_cast<uint16_t>(v[0].word[j])), low);
        split(dev::half_to_float(static_cast<uint16_t>(v[0].word[j] >> 16)), high);
      }
#pragma unroll
      for (int p = 0; p < P; ++p) out[p][j] = low[p] | high[p] << 16;
    }
  }
}

// Partial logits of up to 32 tokens and 32 experts, one part of the sum per warp: partial[warp][token][33].
// A lane reads 8 neighbouring elements of a row. Which of them an MMA calls its k-th does not matter as long as both
// operands agree, so the 16-byte vectors are the fragments.
template <int PX, int PW>
DMOE_DEVICE void gate_tile(const Router& a, int64_t token0, int n_tokens, int expert0, int n_experts, float* partial) {
  constexpr int kAhead = PX * PW == 1 ? 4 : 1;  // vectors in flight; 4 fills the registers. Not measured.
  const int lane = dev::lane(), group = lane >> 2, column = lane % 4 * 8;
  const int chunks = static_cast<int>((a.hidden + 31) / 32);
  float sum[2][4][4] = {};
  for (int first = dev::warp(); first < chunks; first += kRouterWarps * kAhead) {
    uint32_t w[kAhead][2][2][PW][4], x[kAhead][4][PX][4];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t k = (first + u * kRouterWarps) * 32ll + column;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int e = i * 8 + group;
        load_parts<PW>(a.gate_weight, a.gate_dtype, (expert0 + e) * a.hidden + k, k < a.hidden && e < n_experts,
                       w[u][i >> 1][i & 1]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int t = i * 8 + group;
        load_parts<PX>(a.x, a.x_dtype, (token0 + t) * a.hidden + k, k < a.hidden && t < n_tokens, x[u][i]);
      }
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int p = 0; p < PW; ++p) {
#pragma unroll
            for (int q = 0; q < PX; ++q) {
              if (p + q > 2) continue;
              const auto& low = w[u][m][0][p];
              const auto& high = w[u][m][1][p];
              const auto& b = x[u][n][q];
              dev::mma<false>(sum[m][n], low[0], high[0], low[1], high[1], b[0], b[1]);
              dev::mma<false>(sum[m][n], low[2], high[2], low[3], high[3], b[2], b[3]);
            }
          }
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int expert = m * 16 + group + c / 2 * 8, token = n * 8 + lane % 4 * 2 + c % 2;
        partial[(dev::warp() * kGateTile + token) * (kGateTile + 1) + expert] = sum[m][n][c];
      }
    }
  }
}

// Calls store(token, expert, logit) for a tile; the same sum in the same order, whichever kernel it is part of.
template <class Store>
DMOE_DEVICE void gate(const Router& a, int64_t token0, int n_tokens, int expert0, int n_experts, float* partial,
                      const Store& store) {
  if (a.x_dtype == Dtype::bf16) {
    if (a.gate_dtype == Dtype::bf16) {
      gate_tile<1, 1>(a, token0, n_tokens, expert0, n_experts, partial);
    } else {
      gate_tile<1, 3>(a, token0, n_tokens, expert0, n_experts, partial);
    }
  } else if (a.gate_dtype == Dtype::bf16) {
    gate_tile<3, 1>(a, token0, n_tokens, expert0, n_experts, partial);
  } else {
    gate_tile<3, 3>(a, token0, n_tokens, expert0, n_experts, partial);
  }
  dev::sync();
  for (int i = dev::thread(); i < kGateTile * kGateTile; i += kRouterThreads) {
    const int token = i / kGateTile, expert = i % kGateTile;
    if (token >= n_tokens || expert >= n_experts) continue;
    float logit = 0;
    for (int warp = 0; warp < kRouterWarps; ++warp) {
      logit += partial[(warp * kGateTile + token) * (kGateTile + 1) + expert];
    }
    store(token, expert, logit);
  }
  dev::sync();
}

// The first launch of the two-launch form: thread block i computes one tile.
DMOE_DEVICE void gate_kernel(const Router& a, char* shared) {
  const int expert_tiles = static_cast<int>((a.experts + kGateTile - 1) / kGateTile);
  const int64_t token0 = static_cast<int64_t>(dev::cta() / expert_tiles) * kGateTile;
  const int expert0 = dev::cta() % expert_tiles * kGateTile;
  const int n_tokens = static_cast<int>(a.tokens - token0 < kGateTile ? a.tokens - token0 : kGateTile);
  const int n_experts = static_cast<int>(a.experts) - expert0 < kGateTile ? static_cast<int>(a.experts) - expert0 : kGateTile;
  gate(a, token0, n_tokens, expert0, n_experts, reinterpret_cast<float*>(shared),
       [&](int token, int expert, float logit) { a.logits[(token0 + token) * a.experts + expert0 + expert] = logit; });
}

// --- the schedule

DMOE_DEVICE uint32_t* used_words(const Router& a) { return a.schedule + kUsed + a.experts; }

// Writes the experts marked in words[ceil(experts / 32)] as the ascending list of the schedule. One thread block.
DMOE_DEVICE void write_used(const uint32_t* words, int experts, uint32_t* schedule) {
  for (int e = dev::thread(); e < (experts + 31) / 32 * 32; e += kRouterThreads) {
    int before = 0;
    for (int w = 0; w < e >> 5; ++w) before += dev::popcount(words[w]);
    const uint32_t word = words[e >> 5], bit = 1u << (e & 31);
    if (word & bit) schedule[kUsed + before + dev::popcount(word & (bit - 1))] = static_cast<uint32_t>(e);
    if (e + 1 == experts) schedule[kCount] = static_cast<uint32_t>(before + dev::popcount(word));
  }
}

DMOE_DEVICE void schedule_kernel(const int32_t* topk_ids, int64_t slots, int experts, uint32_t* out, char* shared) {
  uint32_t* words = reinterpret_cast<uint32_t*>(shared);
  dev::launch_dependents();
  dev::wait_for_primary();
  if (dev::thread() < 32) words[dev::thread()] = 0;
  for (int i = dev::thread(); i < kCounters; i += kRouterThreads) out[i] = 0;
  dev::sync();
  for (int64_t i = dev::thread(); i < slots; i += kRouterThreads) {
    const int id = topk_ids[i];
    if (id >= 0 && id < experts) dev::atomic_or(&words[id >> 5], 1u << (id & 31));
  }
  dev::sync();
  write_used(words, experts, out);
}

// --- routing: a cluster of thread blocks per block of tokens. Token t belongs to thread block t % size, warp t / size % 8.

struct Rows {
  int64_t begin;
  int count;
};

DMOE_DEVICE Rows block_rows(const Router& a, int64_t block, int64_t block_size) {
  int64_t begin, end;
  if (a.block_offsets) {
    begin = a.block_offsets[block];
    end = a.block_offsets[block + 1];
  } else {
    const int64_t per_sequence = (a.seq_len + block_size - 1) / block_size;
    const int64_t sequence = block / per_sequence * a.seq_len, row = block % per_sequence * block_size;
    begin = sequence + row;
    end = sequence + (row + block_size < a.seq_len ? row + block_size : a.seq_len);
  }
  // The values of offsets on the device are not checked anywhere else; nothing may be read or written out of bounds.
  begin = begin < 0 ? 0 : begin;
  end = end < a.tokens ? end : a.tokens;
  const int64_t count = end - begin < block_size ? end - begin : block_size;
  return {begin, count < 0 ? 0 : static_cast<int>(count)};
}

template <int N>
DMOE_DEVICE void route_kernel(const Router& a, const Routing& routing, char* shared) {
  const int experts = static_cast<int>(a.experts), top_k = static_cast<int>(routing.top_k);
  const int size = dev::cluster_size(), rank = dev::cluster_rank(), lane = dev::lane(), warp = dev::warp();
  const int64_t block = dev::cta() / size;
  const int padded = (experts + 31) / 32 * 32, words = padded / 32;
  const bool fused = dev::kClusters && a.x != nullptr;  // without clusters the gate is a launch of its own
  const RouterShared at = router_shared(experts, static_cast<int>(routing.block_size), size, fused);
  double* votes = reinterpret_cast<double*>(shared + at.votes);
  Row* rows_of = reinterpret_cast<Row*>(shared + at.row);
  float* value = reinterpret_cast<float*>(shared + at.value);
  float* ordered = reinterpret_cast<float*>(shared + at.ordered);
  uint32_t* key = reinterpret_cast<uint32_t*>(shared + at.key);
  int32_t* rank_ids = reinterpret_cast<int32_t*>(shared + at.rank_ids);  // ranks, then the coreset's ids
  uint32_t* member = reinterpret_cast<uint32_t*>(shared + at.words);     // [16] the coreset as bits
  uint32_t* used = member + 16;                                          // [16] experts that some token chose
  int32_t* before = reinterpret_cast<int32_t*>(member + 32);             // [17] members before each word
  float* logits = reinterpret_cast<float*>(shared + at.logits);
  char* scratch = shared + at.scratch;
  float* s = reinterpret_cast<float*>(scratch) + 2 * warp * padded;  // this warp's scores of one token
  float* r = s + padded;

  dev::launch_dependents();
  dev::cluster_arrive();
  dev::wait_for_primary();
  const Rows rows = block_rows(a, block, routing.block_size);
  if (dev::thread() < 16) used[dev::thread()] = 0;
  if (a.schedule && dev::cta() == 0) {
    for (int i = dev::thread(); i < kCounters; i += kRouterThreads) a.schedule[i] = 0;
  }

  // Logits: every thread block of the cluster computes its experts for all tokens, and sends them to the tokens' owners.
  dev::cluster_wait();
  if (fused) {
    const int slice = (experts + size - 1) / size;
    const int last = experts < (rank + 1) * slice ? experts : (rank + 1) * slice;
    for (int expert0 = rank * slice; expert0 < last; expert0 += kGateTile) {
      for (int token0 = 0; token0 < rows.count; token0 += kGateTile) {
        const int n_tokens = rows.count - token0 < kGateTile ? rows.count - token0 : kGateTile;
        const int n_experts = last - expert0 < kGateTile ? last - expert0 : kGateTile;
        gate(a, rows.begin + token0, n_tokens, expert0, n_experts, reinterpret_cast<float*>(scratch),
             [&](int t, int e, float logit) {
               dev::remote(logits, (token0 + t) % size)[(token0 + t) / size * padded + expert0 + e] = logit;
             });
      }
    }
    dev::cluster_arrive();
    dev::cluster_wait();
  }
  const auto logit_row = [&](int token) {
    return fused ? logits + token / size * padded : a.logits + (rows.begin + token) * a.experts;
  };

  // Stage 1. Sums are in double and in a fixed order: over a warp's tokens, over warps, over thread blocks.
  {
    double mine[N];
#pragma unroll
    for (int i = 0; i < N; ++i) mine[i] = routing.aggregate == Aggregate::max ? kNever : 0;
    for (int token = rank + warp * size; token < rows.count; token += kRouterWarps * size) {
      const float* row = logit_row(token);
      if (fused) {  // not earlier: the barrier above would wait until these are written
        for (int e = lane; e < experts; e += 32) a.logits[(rows.begin + token) * a.experts + e] = row[e];
      }
      Row norm{};
      if (routing.score == Score::softmax) {
        norm = softmax_row(row, experts);
        if (lane == 0) rows_of[token / size] = norm;
      }
      if (routing.select == Select::all) continue;
      score_all(row, a.expert_bias, routing.score, norm, experts, padded, [](int e) { return e; }, s, r);
      vote(routing, s, r, padded, mine);
    }
    dev::sync_warp();  // this warp's `parts` take the place of its s and r
    double* parts = reinterpret_cast<double*>(scratch);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i * 32 + lane < padded) parts[warp * padded + i * 32 + lane] = mine[i];
    }
    dev::sync();
    for (int e = dev::thread(); e < padded; e += kRouterThreads) {
      double sum = parts[e];
      for (int w = 1; w < kRouterWarps; ++w) {
        const double part = parts[w * padded + e];
        sum = routing.aggregate != Aggregate::max ? sum + part : part > sum ? part : sum;
      }
      votes[e] = sum;
    }
    dev::cluster_arrive();
    dev::cluster_wait();
  }

  // Stage 2, the same in every thread block of the cluster.
  for (int e = dev::thread(); e < padded; e += kRouterThreads) {
    double sum = votes[e];
    if (size > 1) sum = dev::remote(votes, 0)[e];
    for (int other = 1; other < size; ++other) {
      const double part = dev::remote(votes, other)[e];
      sum = routing.aggregate != Aggregate::max ? sum + part : part > sum ? part : sum;
    }
    value[e] = static_cast<float>(sum);
    key[e] = e < experts ? order_key(value[e]) : 0;
  }
  dev::sync();
  int64_t limit = routing.capacity;
  if (routing.select == Select::top_p || routing.select == Select::top_n) {
    for (int e = dev::thread(); e < padded; e += kRouterThreads) {
      // Its place in the order: how many are larger, or equal with a lower id. Four keys at a time.
      const uint32_t mine = key[e];
      const Vector* quads = reinterpret_cast<const Vector*>(key);
      int better = 0;
      for (int q = 0; q < e / 4; ++q) {
        const Vector v = quads[q];
        better += (v.word[0] >= mine) + (v.word[1] >= mine) + (v.word[2] >= mine) + (v.word[3] >= mine);
      }
      for (int other = e / 4 * 4; other < e / 4 * 4 + 4; ++other) better += key[other] > mine - (other < e);
      for (int q = e / 4 + 1; q < padded / 4; ++q) {
        const Vector v = quads[q];
        better += (v.word[0] > mine) + (v.word[1] > mine) + (v.word[2] > mine) + (v.word[3] > mine);
      }
      rank_ids[e] = better;
      if (e < experts) ordered[better] = value[e];
    }
    dev::sync();
  }
  if (routing.select == Select::top_p) {
    // Lane i takes N neighbours of the order. Every warp does the same.
    double total = 0;
    for (int e = lane; e < experts; e += 32) total += value[e];
    const float norm = static_cast<float>(warp_sum(total)) + kEps;
    double covered[N], sum = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (lane * N + i < experts) sum += ordered[lane * N + i] / norm;
      covered[i] = sum;
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
    const int64_t crossing = warp_sum(within) + 1;
    limit = crossing > routing.min_experts ? crossing : routing.min_experts;
    limit = limit < routing.max_experts ? limit : routing.max_experts;
  }
  for (int e = dev::thread(); e < padded; e += kRouterThreads) {
    const bool in = routing.select == Select::all      ? true
                    : routing.select == Select::nonzero ? value[e] > 0
                                                        : rank_ids[e] < limit;
    const uint32_t word = dev::ballot(in && e < experts);
    if (lane == 0) member[e >> 5] = word;
  }
  dev::sync();
  if (dev::thread() <= words) {
    int count = 0;
    for (int w = 0; w < dev::thread(); ++w) count += dev::popcount(member[w]);
    before[dev::thread()] = count;
  }
  dev::sync();
  // Members among the experts below e.
  const auto position = [&](int e) {
    return e >= padded ? before[words] : before[e >> 5] + dev::popcount(member[e >> 5] & ((1u << (e & 31)) - 1));
  };
  int32_t* coreset = rank_ids;
  const int n_members = before[words];
  for (int e = dev::thread(); e < padded; e += kRouterThreads) {
    if (member[e >> 5] >> (e & 31) & 1) {
      coreset[position(e)] = e;
      if (rank == 0 && position(e) < a.coreset_width) a.coreset_ids[block * a.coreset_width + position(e)] = e;
    }
  }
  if (rank == 0) {
    for (int64_t i = n_members + dev::thread(); i < a.coreset_width; i += kRouterThreads) {
      a.coreset_ids[block * a.coreset_width + i] = -1;
    }
    if (dev::thread() == 0) a.coreset_sizes[block] = n_members;
  }
  dev::sync();

  if (dev::kClusters && a.w13) {
    // Memory would idle until the expert kernel starts. It takes the members in this order.
    const int64_t pieces = (a.w13_bytes + kFetchPiece - 1) / kFetchPiece, budget = kFetchBytes / kFetchPiece / a.n_blocks;
    const int64_t all = n_members * pieces < budget ? n_members * pieces : budget;
    for (int64_t i = (lane * kRouterWarps + warp) * size + rank; i < all; i += size * kRouterThreads) {
      const int64_t from = i % pieces * kFetchPiece, left = a.w13_bytes - from;
      dev::bulk_prefetch(static_cast<const char*>(a.w13) + coreset[i / pieces] * a.w13_bytes + from,
                         static_cast<uint32_t>(left < kFetchPiece ? left : kFetchPiece));
    }
  }

  // Stage 3. Only the members' scores are needed, and computed again.
  const int group_size = experts / static_cast<int>(routing.n_group), padded_members = (n_members + 31) / 32 * 32;
  for (int token = rank + warp * size; token < rows.count; token += kRouterWarps * size) {
    const Row norm = routing.score == Score::softmax ? rows_of[token / size] : Row{};
    score_all(logit_row(token), a.expert_bias, routing.score, norm, n_members, padded_members,
              [&](int m) { return coreset[m]; }, s, r);
    dev::sync_warp();
    uint32_t inside[N], outside[N];
    load_keys(r, padded_members, inside);
#pragma unroll
    for (int i = 0; i < N; ++i) outside[i] = 0;
    if (routing.n_group > 1) {
      const uint32_t kept = keep_groups<N>(routing, r, [&](int group) { return position(group * group_size); });
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int m = i * 32 + lane, group = m < n_members ? coreset[m] / group_size : 0;
        if (!(dev::shuffle(kept, group & 31) >> (group >> 5) & 1)) {
          outside[i] = inside[i];
          inside[i] = 0;
        }
      }
    }
    const int chosen = choose(top_k, inside, outside);
    const float weight = weigh(routing, chosen < 0 ? 0.0f : s[chosen]);
    dev::sync_warp();  // s and r are free for the next token
    if (lane < top_k) {
      const int64_t slot = (rows.begin + token) * top_k + lane;
      const int e = chosen < 0 ? -1 : coreset[chosen];
      a.topk_ids[slot] = e;
      a.topk_weights[slot] = weight;
      if (a.schedule && e >= 0) dev::atomic_or(&dev::remote(used, 0)[e >> 5], 1u << (e & 31));
    }
  }

  // The schedule: the experts used in any block. With several blocks, the last to arrive has them all.
  dev::cluster_arrive();
  dev::cluster_wait();  // also: no thread block leaves while another may still read its votes
  if (!a.schedule || rank != 0) return;
  if (a.n_blocks > 1) {
    uint32_t* all = used_words(a);
    uint32_t* arrived = all + words;
    uint32_t* last = member;
    if (dev::thread() < words && used[dev::thread()]) dev::atomic_or(&all[dev::thread()], used[dev::thread()]);
    dev::sync();
    if (dev::thread() == 0) *last = dev::atomic_add_ordered(arrived, 1) + 1 == static_cast<uint32_t>(a.n_blocks);
    dev::sync();
    if (!*last) return;
    if (dev::thread() < words) used[dev::thread()] = all[dev::thread()];
    dev::sync();
  }
  write_used(used, experts, a.schedule);
}

}  // namespace dmoe::cuda
