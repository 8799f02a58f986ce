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

// Partial logits of up to 32 tokens and 32 experts, one part of the sum per warp: partial[warp][token][kGatePitch].
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
        partial[(dev::warp() * kGateTile + token) * kGatePitch + expert] = sum[m][n][c];
      }
    }
  }
}

// Calls store(token, expert, logits of four experts from there on) for a tile; the same sum in the same order, in
// whichever kernel. Behind n_experts they may be anything.
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
  static_assert(kGateTile * kGateTile == 4 * kRouterThreads);
  const int token = dev::thread() / (kGateTile / 4), expert = dev::thread() % (kGateTile / 4) * 4;
  if (token < n_tokens && expert < n_experts) {
    float logit[4] = {};
#pragma unroll
    for (int warp = 0; warp < kRouterWarps; ++warp) {
      const float* from = &partial[(warp * kGateTile + token) * kGatePitch + expert];
      const dev::Four part = *reinterpret_cast<const dev::Four*>(from);
#pragma unroll
      for (int i = 0; i < 4; ++i) logit[i] += part.v[i];
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
  const int n_experts =
      static_cast<int>(a.experts) - expert0 < kGateTile ? static_cast<int>(a.experts) - expert0 : kGateTile;
  gate(a, token0, n_tokens, expert0, n_experts, reinterpret_cast<float*>(shared),
       [&](int token, int expert, const float (&logit)[4]) {
         float* to = a.logits + (token0 + token) * a.experts + expert0 + expert;
         for (int i = 0; i < 4 && expert + i < n_experts; ++i) to[i] = logit[i];
       });
}

// --- the schedule

DMOE_DEVICE uint32_t* used_words(const Router& a) { return a.schedule + kUsed + a.experts; }

// Bits set in the first w words, at most 32. Of a whole warp, with one w.
DMOE_DEVICE int bits_before(const uint32_t* words, int w) {
  return static_cast<int>(dev::warp_add(dev::lane() < w ? dev::popcount(words[dev::lane()]) : 0));
}
DMOE_DEVICE uint32_t bits_below(uint32_t word, int bit) { return word & ((1u << bit) - 1); }

// Writes the experts marked in words[ceil(experts / 32)] as the ascending list of the schedule. One thread block.
DMOE_DEVICE void write_used(const uint32_t* words, int experts, uint32_t* schedule) {
  for (int e = dev::thread(); e < (experts + 31) / 32 * 32; e += kRouterThreads) {
    const uint32_t word = words[e >> 5];
    const int before = bits_before(words, e >> 5);
    const int at = before + dev::popcount(bits_below(word, e & 31));
    if (word >> (e & 31) & 1) schedule[kUsed + at] = static_cast<uint32_t>(e);
    if (e + 1 == experts) schedule[kCount] = static_cast<uint32_t>(before + dev::popcount(word));
  }
}

// Whether the weights of an expert are here.
DMOE_DEVICE bool is_here(const int32_t* expert_map, int expert) { return !expert_map || expert_map[expert] >= 0; }

DMOE_DEVICE void schedule_kernel(const int32_t* topk_ids, int64_t slots, int experts, const int32_t* expert_map,
                                 uint32_t* out, char* shared) {
  uint32_t* words = reinterpret_cast<uint32_t*>(shared);
  dev::launch_dependents();
  dev::wait_for_primary();
  if (dev::thread() < 32) words[dev::thread()] = 0;
  for (int i = dev::thread(); i < kCounters; i += kRouterThreads) out[i] = 0;
  dev::sync();
  for (int64_t i = dev::thread(); i < slots; i += kRouterThreads) {
    const int id = topk_ids[i];
    if (id >= 0 && id < experts && is_here(expert_map, id)) dev::atomic_or(&words[id >> 5], 1u << (id & 31));
  }
  dev::sync();
  write_used(words, experts, out);
}

// --- routing: a cluster of thread blocks per block of tokens. Token t belongs to thread block t % size, warp t / size % 8.

struct Rows {
  int64_t begin;
  int count;
};

DMOE_DEVICE Rows block_rows(const Router& a, int block, int64_t block_size) {
  int64_t begin, end;
  if (a.block_offsets) {
    begin = a.block_offsets[block];
    end = a.block_offsets[block + 1];
  } else {
    const int per_sequence = static_cast<int>((a.seq_len + block_size - 1) / block_size);
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

// A thread block of a cluster: its part of the work, and its shared memory.
struct Part {
  int experts, padded, words, top_k, size, rank;
  bool fused;  // without clusters the gate is its own launch
  Rows rows;
  double* votes;
  Row* norms;
  float *value, *shares, *bias;
  uint32_t *key, *nonzero;
  int32_t *coreset, *before;
  uint32_t *member, *used;
  float *logits, *scores;  // [own tokens, padded], if fused
  char* scratch;

  DMOE_DEVICE Part(const Router& a, const Routing& routing, char* shared)
      : experts(static_cast<int>(a.experts)),
        padded((experts + 31) / 32 * 32),
        words(padded / 32),
        top_k(static_cast<int>(routing.top_k)),
        size(dev::cluster_size()),
        rank(dev::cluster_rank()),
        fused(dev::kClusters && a.x != nullptr),
        rows{0, 0} {
    const RouterShared at = router_shared(experts, static_cast<int>(routing.block_size), size, fused);
    votes = reinterpret_cast<double*>(shared + at.votes);
    norms = reinterpret_cast<Row*>(shared + at.row);
    value = reinterpret_cast<float*>(shared + at.value);
    shares = reinterpret_cast<float*>(shared + at.shares);
    bias = reinterpret_cast<float*>(shared + at.bias);
    key = reinterpret_cast<uint32_t*>(shared + at.key);
    nonzero = reinterpret_cast<uint32_t*>(shared + at.nonzero);
    coreset = reinterpret_cast<int32_t*>(shared + at.coreset);
    member = reinterpret_cast<uint32_t*>(shared + at.words);  // [16] the coreset as bits; first whose votes are not 0
    used = member + 16;                                       // [16] experts that some token chose
    before = reinterpret_cast<int32_t*>(member + 32);         // [17] members before each word
    logits = reinterpret_cast<float*>(shared + at.logits);
    scores = reinterpret_cast<float*>(shared + at.scores);
    scratch = shared + at.scratch;
  }

  // Calls body(token) for each token of this warp.
  template <class Body>
  DMOE_DEVICE void each_token(const Body& body) const {
    for (int token = rank + dev::warp() * size; token < rows.count; token += kRouterWarps * size) body(token);
  }
  DMOE_DEVICE const float* logit_row(const Router& a, int token) const {
    return fused ? logits + token / size * padded : a.logits + (rows.begin + token) * a.experts;
  }
  // Scratch of this warp: [2, padded].
  DMOE_DEVICE float* of_warp() const { return reinterpret_cast<float*>(scratch) + 2 * dev::warp() * padded; }
  // Members among the experts below e.
  DMOE_DEVICE int position(int e) const {
    return e >= padded ? before[words] : before[e >> 5] + dev::popcount(bits_below(member[e >> 5], e & 31));
  }
};

// Logits: every thread block of the cluster computes its experts for all tokens, and sends them to the tokens' owners,
// with the scores where those need nothing else.
DMOE_DEVICE void gate_of_cluster(const Router& a, const Routing& routing, const Part& p) {
  const int slice = (p.experts + 4 * p.size - 1) / (4 * p.size) * 4;  // fours do not cross from one to the next
  const int begin = p.rank * slice, last = p.experts < begin + slice ? p.experts : begin + slice;
  for (int expert0 = begin; expert0 < last; expert0 += kGateTile) {
    for (int token0 = 0; token0 < p.rows.count; token0 += kGateTile) {
      const int n_tokens = p.rows.count - token0 < kGateTile ? p.rows.count - token0 : kGateTile;
      const int n_experts = last - expert0 < kGateTile ? last - expert0 : kGateTile;
      gate(a, p.rows.begin + token0, n_tokens, expert0, n_experts, reinterpret_cast<float*>(p.scratch),
           [&](int t, int e, const float (&logit)[4]) {
             const int at = (token0 + t) / p.size * p.padded + expert0 + e, owner = (token0 + t) % p.size;
             dev::Four out = {{logit[0], logit[1], logit[2], logit[3]}};
             *reinterpret_cast<dev::Four*>(&dev::remote(p.logits, owner)[at]) = out;
             if (routing.score == Score::sigmoid) {
#pragma unroll
               for (int i = 0; i < 4; ++i) out.v[i] = score(logit[i], Score::sigmoid, Row{});
               *reinterpret_cast<dev::Four*>(&dev::remote(p.scores, owner)[at]) = out;
             }
           });
    }
  }
}

// Stage 1. Sums are in double and in a fixed order: over a warp's tokens, over warps, over thread blocks.
template <int N>
DMOE_DEVICE void votes_of_tokens(const Router& a, const Routing& routing, const Part& p) {
  const int lane = dev::lane(), warp = dev::warp();
  double mine[N];
#pragma unroll
  for (int i = 0; i < N; ++i) mine[i] = routing.aggregate == Aggregate::max ? kNever : 0;
  p.each_token([&](int token) {
    const float* row = p.logit_row(a, token);
    float* s_row = p.fused ? p.scores + token / p.size * p.padded : p.of_warp();
    if (p.fused) {  // not earlier: the barrier above would wait until these are written
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

// Stage 2, the same in every thread block of the cluster: writes the coreset in ascending order and returns its size.
// Ranks are counted among the experts whose votes are not 0, mostly a quarter of all; the others' follow from their ids.
template <int N>
DMOE_DEVICE int select_coreset(const Router& a, const Routing& routing, const Part& p, int block) {
  constexpr int kOwn = N * 32 / kRouterThreads;  // experts per thread: thread + i * kRouterThreads
  constexpr uint32_t kZero = 0x80000000u;        // order_key(0)
  const int lane = dev::lane();
  const auto each_expert = [&](const auto& body) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int e = dev::thread() + i * kRouterThreads;
      if (e < p.padded) body(i, e);  // the same for a whole warp
    }
  };
  each_expert([&](int, int e) {
    double sum = p.votes[e];
    if (p.size > 1) sum = dev::remote(p.votes, 0)[e];
    for (int other = 1; other < p.size; ++other) {
      const double part = dev::remote(p.votes, other)[e];
      sum = routing.aggregate != Aggregate::max ? sum + part : part > sum ? part : sum;
    }
    p.value[e] = static_cast<float>(sum);
    p.key[e] = e < p.experts ? order_key(p.value[e]) : 0;
    const uint32_t word = dev::ballot(e < p.experts && p.key[e] != kZero);
    if (lane == 0) p.member[e >> 5] = word;
  });
  dev::sync();

  int rank[kOwn] = {};
  int64_t limit = routing.capacity;
  if (routing.select == Select::top_p || routing.select == Select::top_n) {
    float norm = 1;
    if (routing.select == Select::top_p) {
      double total = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (i * 32 + lane < p.experts) total += p.value[i * 32 + lane];
      }
      norm = static_cast<float>(warp_sum(total)) + kEps;
    }
    const int n = bits_before(p.member, p.words);
    int at[kOwn] = {};
    bool there[kOwn] = {};
    each_expert([&](int i, int e) {
      const uint32_t word = p.member[e >> 5];
      at[i] = bits_before(p.member, e >> 5) + dev::popcount(bits_below(word, e & 31));
      there[i] = word >> (e & 31) & 1;
      if (there[i]) p.nonzero[at[i]] = p.key[e];
    });
    if (dev::thread() < 3) p.nonzero[n + dev::thread()] = 0;
    dev::sync();
    each_expert([&](int i, int e) {
      const uint32_t mine = p.key[e];
      rank[i] = count_better(p.nonzero, n, mine, there[i] ? at[i] : 0);
      rank[i] += !there[i] ? e - at[i] : mine < kZero ? p.experts - n : 0;
      if (e < p.experts) p.shares[rank[i]] = p.value[e] / norm;
    });
    dev::sync();
    if (routing.select == Select::top_p) {
      limit = crossing<N>(routing, p.shares, p.experts);
      limit = limit > routing.min_experts ? limit : routing.min_experts;
      limit = limit < routing.max_experts ? limit : routing.max_experts;
    }
  }
  each_expert([&](int i, int e) {
    const bool in = routing.select == Select::all       ? true
                    : routing.select == Select::nonzero ? p.value[e] > 0
                                                        : rank[i] < limit;
    const uint32_t word = dev::ballot(in && e < p.experts);
    if (lane == 0) p.member[e >> 5] = word;
  });
  dev::sync();
  const int n_members = bits_before(p.member, p.words);
  each_expert([&](int, int e) {
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

// Stage 3.
template <int N>
DMOE_DEVICE void experts_of_tokens(const Router& a, const Routing& routing, const Part& p, int n_members) {
  const int lane = dev::lane(), group_size = p.experts / static_cast<int>(routing.n_group);
  const int padded_members = (n_members + 31) / 32 * 32;
  const auto first = [&](int group) { return p.position(group * group_size); };
  p.each_token([&](int token) {
    const Row norm = !p.fused && routing.score == Score::softmax ? p.norms[token / p.size] : Row{};
    const auto score_of = [&](int e) {
      return p.fused ? p.scores[token / p.size * p.padded + e] : score(p.logit_row(a, token)[e], routing.score, norm);
    };
    const auto selection_of = [&](int m) {
      const int e = m < n_members ? p.coreset[m] : -1;
      return e < 0 ? kNever : score_of(e) + p.bias[e];
    };
    int chosen;
    if (n_members <= 32 && routing.n_group <= 32) {
      const int group = lane < n_members ? p.coreset[lane] / group_size : 0;
      int32_t* slots = reinterpret_cast<int32_t*>(p.of_warp());
      chosen = choose_few(routing, n_members, selection_of(lane), group, first, slots);
    } else {
      float* r = p.of_warp();
#pragma unroll 1
      for (int m = lane; m < padded_members; m += 32) r[m] = selection_of(m);
      dev::sync_warp();
      uint32_t inside[N], outside[N];
      load_keys(r, padded_members, inside);
#pragma unroll
      for (int i = 0; i < N; ++i) outside[i] = 0;
      if (routing.n_group > 1) {
        const uint32_t kept = keep_groups<N>(routing, r, first);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const int m = i * 32 + lane, group = m < n_members ? p.coreset[m] / group_size : 0;
          if (!(dev::shuffle(kept, group & 31) >> (group >> 5) & 1)) {
            outside[i] = inside[i];
            inside[i] = 0;
          }
        }
      }
      chosen = choose(p.top_k, inside, outside);
    }
    const int e = chosen < 0 ? -1 : p.coreset[chosen];
    const float weight = weigh(routing, e < 0 ? 0.0f : score_of(e));
    dev::sync_warp();  // this warp's scratch is free for the next token
    if (lane < p.top_k) {
      const int64_t slot = (p.rows.begin + token) * p.top_k + lane;
      a.topk_ids[slot] = e;
      a.topk_weights[slot] = weight;
      if (a.schedule && e >= 0 && is_here(a.expert_map, e))
        dev::atomic_or(&dev::remote(p.used, 0)[e >> 5], 1u << (e & 31));
    }
  });
}

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
