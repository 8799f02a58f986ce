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

// A tile is 64 or 128 rows of weights against all tokens: in the up phase half of them gate rows and their up rows, in the down
// phase that many columns of y. Weights and tokens come in chunks of 256 along k; a row in shared memory is padded by 16 bytes,
// so that the eight rows of a matrix lie in different banks. Chunks of 128 took 18 % longer at 70 experts, of 512 as long
// (H100, T = 32, bench/NOTES.md).
constexpr int kChunk = 256, kPitch = 2 * kChunk + 16, kMaxStages = 8, kMaxTokens = 64, kMaxRows = 128;
constexpr unsigned kPollPause = 32;  // ns between two looks at a counter. Not measured.

// A warp multiplies 16 rows. Eight warps fill the ring, because a warp hands its copies to the copy engine one lane at a time.
constexpr int kProducers = 256, kProducerWarps = kProducers / 32;
static_assert((kMaxRows + kMaxTokens) / kProducerWarps <= 32);  // a lane for every row of a warp's copies

constexpr int64_t kExpertsHeader = 1024;  // barriers, what each stage holds, weights of the tokens

DMOE_BOTH int64_t stage_bytes(int64_t tokens, int rows) { return (rows + (tokens + 15) / 16 * 16) * kPitch; }

// Behind the ring's stages: every token's choice.
DMOE_BOTH int64_t choice_bytes(int64_t tokens, int64_t top_k) { return (4 + 4) * tokens * top_k; }

// Parts of the down phase's k.
constexpr int kMaxSplits = 8;
static_assert(kUpDone + kMaxSplits <= kColumns);

// How a call is launched: rows of a tile, stages of the ring, parts of the down phase's k, so that its tiles about fill the
// chip once.
struct Form {
  int rows, stages = 0, splits = 0;
  DMOE_BOTH constexpr int consumers() const { return 2 * rows; }
  DMOE_BOTH constexpr int threads() const { return consumers() + kProducers; }
};

inline int64_t experts_shared(int64_t tokens, int64_t top_k, const Form& form) {
  return kExpertsHeader + form.stages * stage_bytes(tokens, form.rows) + choice_bytes(tokens, top_k);
}

// The sums of more tokens than these leave registers for 64 rows only.
constexpr int kMaxTokensOfWide = 48;

// Tiles of 128 rows read the tokens half as often: 13 % faster at 70 experts, 7 % at 15 (H200, T = 32, bench/NOTES.md). Not
// where the up phase would then leave multiprocessors without a tile. Less than two stages: the call does not fit.
inline Form experts_form(const Experts& a, int multiprocessors, int64_t shared_limit) {
  const int64_t room = shared_limit - kExpertsHeader - choice_bytes(a.tokens, a.top_k);
  const int64_t members = std::min(a.experts, a.tokens * a.top_k);
  const int64_t wide_tiles = (members * a.intermediate + a.shared_intermediate) / (kMaxRows / 2);
  const bool divides = a.hidden % kMaxRows == 0 && (a.intermediate | a.shared_intermediate) % (kMaxRows / 2) == 0;
  const bool fits = a.tokens <= kMaxTokensOfWide && 2 * stage_bytes(a.tokens, kMaxRows) <= room;
  const bool wide = divides && fits && wide_tiles >= multiprocessors;
  Form form{wide ? kMaxRows : kMaxRows / 2};
  form.stages = static_cast<int>(std::min<int64_t>(room / stage_bytes(a.tokens, form.rows), kMaxStages));
  form.splits = static_cast<int>(std::clamp<int64_t>(multiprocessors / (a.hidden / form.rows), 1, kMaxSplits));
  return form;
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
  if (a.experts > kMaxExperts) return "more than 512 experts";
  if (a.hidden % 64 || a.hidden > 8192) return "a hidden size that is not a multiple of 64 up to 8192";
  if (a.intermediate % 32 || a.shared_intermediate % 32) return "an intermediate size that is not a multiple of 32";
  if (experts_form(a, 132, 227 << 10).stages < 2) return "more choices than fit beside two chunks";
  return nullptr;
}

// One launch. Returns null, or what the CUDA runtime said of it.
const char* experts_forward(const Experts& args, void* stream);

}  // namespace dmoe::cuda
