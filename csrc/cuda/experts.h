// Experts on Hopper, latency form: all tokens through each expert that any of them chose, weight 0 where a token did not.
// Plain pointers; nothing here needs a CUDA header.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../activation.h"
#include "router.h"

namespace dmoe::cuda {

// All tensors are contiguous, row-major, and start at a multiple of 16 bytes. x, y and plain weights are of one dtype, bf16 or
// fp16. Weights with scales are float8_e4m3fn: one scale per 128 x 128 block, gate and up rows blocked apart. The routed experts
// have scales or have none; where they have, the shared expert may still be plain.
struct Experts {
  int64_t tokens, hidden, intermediate, experts, top_k;
  int64_t shared_intermediate;  // 0 where there is no shared expert
  Dtype dtype;
  const void* x;              // [tokens, hidden]
  const void* w13;            // [experts, 2 * intermediate, hidden], gate rows first; with a map, any number of rows
  const void* w2;             // [experts, hidden, intermediate]
  const void* shared_w13;     // [2 * shared_intermediate, hidden] or null
  const void* shared_w2;      // [hidden, shared_intermediate] or null
  const int32_t* topk_ids;    // [tokens, top_k]; -1 adds nothing
  const float* topk_weights;  // [tokens, top_k]
  uint32_t* schedule;         // of topk_ids, by `block_route` or `schedule`; its counters are used up
  void* workspace;            // [experts_workspace().bytes]
  void* y;                    // [tokens, hidden]
  const float* w13_scale;     // [experts, 2 * ceil(intermediate / 128), ceil(hidden / 128)] or null
  const float* w2_scale;      // [experts, ceil(hidden / 128), ceil(intermediate / 128)] or null
  const float* shared_w13_scale;  // as those, without experts
  const float* shared_w2_scale;
  const int32_t*
      expert_map;  // [experts] or null: the row of w13 and w2 that holds an expert of the schedule; else expert e is row e
  Activation activation = Activation::silu;

  DMOE_BOTH bool fp8() const { return w13_scale; }
};

// A tile is 64 or 128 rows of weights against all tokens: in the up phase half of them gate rows and their up rows, in the down
// phase that many columns of y. Weights and tokens come in chunks of 256 along k, weights in fp8 of 512: 512 bytes of a row.
// Chunks of half as much took 18 % longer at 70 experts, of twice as much as long (bf16, H100, T = 32, bench/NOTES.md).
constexpr int kChunk = 256, kMaxStages = 8, kMaxTokens = 64, kMaxRows = 128;
constexpr int kScaleBlock = 128,
              kScaleBlocks = 2 * kChunk / kScaleBlock;  // rows and columns under one scale; of them in a chunk
constexpr unsigned kPollPause = 32;                     // ns between two looks at a counter. Not measured.

// A warp multiplies 16 rows. Eight warps fill the ring, because a warp hands its copies to the copy engine one lane at a time.
constexpr int kProducers = 256, kProducerWarps = kProducers / 32;
static_assert((kMaxRows + kMaxTokens) / kProducerWarps <= 32);  // a lane for every row of a warp's copies

constexpr int64_t kExpertsHeader = 1024;  // barriers, what each stage holds, weights of the tokens

// Bytes of a row in shared memory, padded so that what is loaded at a time lies in different banks: eight rows of 16 bytes; of
// fp8's weights four rows of 32, of its tokens two of 64.
struct Pitch {
  int weights, tokens;
};
DMOE_BOTH constexpr Pitch pitch(bool fp8) {
  return fp8 ? Pitch{2 * kChunk + 32, 4 * kChunk + 64} : Pitch{2 * kChunk + 16, 2 * kChunk + 16};
}
static_assert(pitch(false).weights == pitch(false).tokens && pitch(false).weights % 32 == 16);
static_assert(pitch(true).weights % 128 == 32 && pitch(true).tokens % 128 == 64);

DMOE_BOTH int64_t stage_bytes(int64_t tokens, int rows, bool fp8) {
  return rows * pitch(fp8).weights + (tokens + 15) / 16 * 16 * pitch(fp8).tokens;
}

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

inline int64_t experts_shared(const Experts& a, const Form& form) {
  return kExpertsHeader + form.stages * stage_bytes(a.tokens, form.rows, a.fp8()) + choice_bytes(a.tokens, a.top_k);
}

// The sums of more tokens than these leave registers for 64 rows only; fp8 has them twice.
DMOE_BOTH constexpr int max_tokens_of_wide(bool fp8) { return fp8 ? 32 : 48; }

// Tiles of 128 rows read the tokens half as often: 13 % faster at 70 experts, 7 % at 15 (H200, T = 32, bench/NOTES.md). Not
// where the up phase would then leave multiprocessors without a tile. Less than two stages: the call does not fit.
inline Form experts_form(const Experts& a, int multiprocessors, int64_t shared_limit) {
  const int64_t room = shared_limit - kExpertsHeader - choice_bytes(a.tokens, a.top_k);
  const int64_t members = std::min(a.experts, a.tokens * a.top_k);
  const int64_t wide_tiles = (members * a.intermediate + a.shared_intermediate) / (kMaxRows / 2);
  const bool divides = a.hidden % kMaxRows == 0 && (a.intermediate | a.shared_intermediate) % (kMaxRows / 2) == 0;
  const bool fits = a.tokens <= max_tokens_of_wide(a.fp8()) && 2 * stage_bytes(a.tokens, kMaxRows, a.fp8()) <= room;
  const bool wide = divides && fits && wide_tiles >= multiprocessors;
  Form form{wide ? kMaxRows : kMaxRows / 2};
  form.stages = static_cast<int>(std::min<int64_t>(room / stage_bytes(a.tokens, form.rows, a.fp8()), kMaxStages));
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
