// Experts on Hopper, latency form: all tokens through each expert that any of them chose, weight 0 where a token did not.
// Plain pointers; nothing here needs a CUDA header.
#pragma once

#include <algorithm>
#include <cstdint>

#include "router.h"

namespace dmoe::cuda {

// All tensors are contiguous, row-major, of one dtype (bf16 or fp16), and start at a multiple of 16 bytes.
struct Experts {
  int64_t tokens, hidden, intermediate, experts, top_k;
  int64_t shared_intermediate;  // 0 where there is no shared expert
  Dtype dtype;
  const void* x;              // [tokens, hidden]
  const void* w13;            // [experts, 2 * intermediate, hidden], gate rows first
  const void* w2;             // [experts, hidden, intermediate]
  const void* shared_w13;     // [2 * shared_intermediate, hidden] or null
  const void* shared_w2;      // [hidden, shared_intermediate] or null
  const int32_t* topk_ids;    // [tokens, top_k]; -1 adds nothing
  const float* topk_weights;  // [tokens, top_k]
  uint32_t* schedule;         // of topk_ids, by `block_route` or `schedule`; its counters are used up
  void* workspace;            // [experts_workspace().bytes]
  void* y;                    // [tokens, hidden]
};

// A tile is 64 rows of weights against all tokens: in the up phase 32 gate rows and their 32 up rows, in the down phase 64
// columns of y. Weights and tokens come in chunks of 256 along k; a row in shared memory is padded by 16 bytes, so that the
// eight rows of a matrix lie in different banks.
constexpr int kTileRows = 64, kUpRows = kTileRows / 2, kChunk = 256, kPitch = 2 * kChunk + 16, kMaxStages = 8;
constexpr int kMaxTokens = 64;
// A warp multiplies 16 rows; eight fill the ring, because a warp hands its copies to the copy engine one lane at a time.
constexpr unsigned kPollPause = 32;  // ns between two looks at a counter. Not measured.
constexpr int kConsumers = 2 * kTileRows, kProducers = 256, kExpertsThreads = kConsumers + kProducers;

// Of each warp that fills: rows of weights, and of tokens at most.
constexpr int kFillers = kProducers / 32, kRowsOfWarp = kTileRows / kFillers, kTokensOfWarp = kMaxTokens / kFillers;
static_assert(kConsumers >= kMaxTokens && kRowsOfWarp + kTokensOfWarp <= 32);

constexpr int64_t kExpertsHeader = 1024;  // barriers, what each stage holds, weights of the tokens

DMOE_BOTH int64_t stage_bytes(int64_t tokens) { return (kTileRows + (tokens + 15) / 16 * 16) * kPitch; }

// Behind the ring's stages: every token's choice.
DMOE_BOTH int64_t choice_bytes(int64_t tokens, int64_t top_k) { return (4 + 4) * tokens * top_k; }

// Ring stages that fit into the shared memory of one thread block, at most 8. The kernel needs two.
inline int stages(int64_t tokens, int64_t top_k, int64_t shared_limit) {
  const int64_t fit = (shared_limit - kExpertsHeader - choice_bytes(tokens, top_k)) / stage_bytes(tokens);
  return static_cast<int>(fit < kMaxStages ? fit : kMaxStages);
}
inline int64_t experts_shared(int64_t tokens, int64_t top_k, int n_stages) {
  return kExpertsHeader + n_stages * stage_bytes(tokens) + choice_bytes(tokens, top_k);
}

// Parts of the down phase's k.
constexpr int kMaxSplits = 8;
static_assert(kUpDone + kMaxSplits <= kColumns);

// Into how many parts the long k of the down phase is cut, so that its tiles about fill the chip once.
inline int splits(int64_t hidden, int multiprocessors) {
  const int64_t fit = multiprocessors / (hidden / kTileRows);
  return static_cast<int>(fit < 1 ? 1 : fit > kMaxSplits ? kMaxSplits : fit);
}

// h of the members, h of the shared expert, and the down phase's parts of y.
struct ExpertsWorkspace {
  int64_t h, shared_h, parts, bytes;
};
DMOE_BOTH ExpertsWorkspace experts_workspace(int64_t tokens, int64_t hidden, int64_t intermediate,
                                             int64_t shared_intermediate, int64_t experts, int64_t top_k) {
  const int64_t members = experts < tokens * top_k ? experts : tokens * top_k;
  ExpertsWorkspace w{};
  w.shared_h = (2 * members * tokens * intermediate + 127) / 128 * 128;
  w.parts = w.shared_h + (2 * tokens * shared_intermediate + 127) / 128 * 128;
  w.bytes = w.parts + 4 * kMaxSplits * tokens * hidden;
  return w;
}

// Why the latency form does not take a call, or null. The caller then takes another backend.
inline const char* refuses(const Experts& a) {
  if (a.dtype == Dtype::f32) return "float32";
  if (a.tokens > kMaxTokens) return "more than 64 tokens";
  if (stages(a.tokens, a.top_k, 227 << 10) < 2) return "more choices than fit beside two chunks";
  if (a.experts > kMaxExperts) return "more than 512 experts";
  if (a.hidden % kTileRows || a.hidden > 8192) return "a hidden size that is not a multiple of 64 up to 8192";
  if (a.intermediate % kUpRows || a.shared_intermediate % kUpRows) return "an intermediate size that is not a multiple of 32";
  return nullptr;
}

// One launch. Returns null, or what the CUDA runtime said of it.
const char* experts_forward(const Experts& args, void* stream);

}  // namespace dmoe::cuda
