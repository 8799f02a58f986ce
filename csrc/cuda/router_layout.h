// A thread block of the route kernel: the tokens of its block, its share of the work, its shared memory.
//
// A cluster of thread blocks routes one block of tokens. Token t belongs to thread block t % size, warp t / size % 8.
#pragma once

#include "../select.h"
#include "router.h"

namespace dmoe::cuda {

// Loaded at once.
struct alignas(16) Vector {
  uint32_t word[4];
};

// Bits set in the first w words, at most 32. Of a whole warp, with one w.
DMOE_DEVICE int bits_before(const uint32_t* words, int w) {
  return static_cast<int>(dev::warp_add(dev::lane() < w ? dev::popcount(words[dev::lane()]) : 0));
}
DMOE_DEVICE uint32_t bits_below(uint32_t word, int bit) { return word & ((1u << bit) - 1); }

// The tokens of a block.
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

}  // namespace dmoe::cuda
