// Block routing on the GPU: gate, scores, votes, coreset, constrained top-k and the schedule of the expert kernel.
// Plain pointers, so the launchers serve the ops, a C++ program and the tests; nothing here needs a CUDA header.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../routing.h"

#ifdef __CUDACC__
#define DMOE_BOTH __host__ __device__ inline
#else
#define DMOE_BOTH inline
#endif

namespace dmoe::cuda {

enum class Dtype : int32_t { f32, bf16, f16 };

// All tensors are contiguous and row-major; x, gate_weight start at a multiple of 16 bytes.
struct Router {
  int64_t tokens, hidden, experts, n_blocks, coreset_width, seq_len;
  const void* x;            // [tokens, hidden], or null: then `logits` is an input
  const void* gate_weight;  // [experts, hidden]
  Dtype x_dtype, gate_dtype;
  float* logits;                 // [tokens, experts]
  const float* expert_bias;      // [experts] or null
  const int32_t* block_offsets;  // [n_blocks + 1] or null: then blocks are cut inside each run of seq_len rows
  int32_t* topk_ids;             // [tokens, top_k]
  float* topk_weights;           // [tokens, top_k]
  int32_t* coreset_ids;          // [n_blocks, coreset_width]
  int32_t* coreset_sizes;        // [n_blocks]
  uint32_t* schedule;            // [schedule_words(experts)] for the expert kernel, or null
  const int32_t* expert_map;     // [experts] or null: the schedule leaves out those below 0
};

// The schedule: counters that the expert kernel starts from zero, the number of experts that some token chose, their ids in
// ascending order, and what the blocks add up on the way there.
// Tickets, up tiles done for each part of the down phase (128 bytes apart, as blocks wait for the ones while others draw the
// other), and one counter per 64 columns of y (H <= 8192).
constexpr int kTickets = 0, kUpDone = 32, kColumns = 64, kCounters = kColumns + 128;
constexpr int kCount = kCounters, kUsed = kCounters + 1;
inline int64_t schedule_words(int64_t experts) { return kUsed + experts + 1 + (experts + 31) / 32; }

constexpr int kMaxExperts = 512, kMaxTopK = 32, kMaxBlock = 128;
constexpr int kRouterThreads = 256, kRouterWarps = kRouterThreads / 32;
constexpr int kGateTile = 32;   // experts and tokens per tile of the gate
constexpr int kGatePitch = 36;  // of its partial sums: the lanes of a warp store to different banks

// Why these kernels do not take a call, or null. The caller then takes another backend.
inline const char* refuses(const Router& a, const Routing& r) {
  if (a.experts > kMaxExperts) return "more than 512 experts";
  if (r.top_k > kMaxTopK) return "top_k above 32";
  if (r.block_size > kMaxBlock) return "block_size above 128";
  if (a.x && a.hidden % 8) return "a hidden size that is not a multiple of 8";
  return nullptr;
}

// Thread blocks per block of tokens: 8, the largest portable cluster, while all of them run at once (registers allow one per
// multiprocessor), else 4, as each cluster reads the gate's weights. Not measured.
inline int cluster_size(int64_t n_blocks, int multiprocessors) { return n_blocks * 8 <= multiprocessors ? 8 : 4; }

// Shared memory of the gate's partial sums, of its two-launch form the only one.
DMOE_BOTH int64_t gate_shared() { return 4ll * kRouterWarps * kGateTile * kGatePitch; }

// Shared memory of the route kernel. The arrays stand in the order in which they are laid out.
struct RouterShared {
  int64_t votes, row, value, shares, bias, key, nonzero, coreset, words, logits, scores, scratch, bytes;
};

DMOE_BOTH RouterShared router_shared(int experts, int block_size, int cluster, bool fused) {
  RouterShared s{};
  const int own = (block_size + cluster - 1) / cluster;  // tokens of one thread block
  const int padded = (experts + 31) / 32 * 32;
  int64_t at = 0;
  const auto take = [&at](int64_t bytes) {
    const int64_t begin = at;
    at += (bytes + 15) / 16 * 16;
    return begin;
  };
  s.votes = take(8ll * padded);
  s.row = take(16ll * own);
  s.value = take(4ll * padded);
  s.shares = take(4ll * padded);
  s.bias = take(4ll * padded);
  s.key = take(4ll * padded);
  s.nonzero = take(4ll * (padded + 4));
  s.coreset = take(4ll * padded);
  s.words = take(4ll * 64);
  s.logits = take(fused ? 4ll * own * padded : 0);
  s.scores = take(fused ? 4ll * own * padded : 0);
  const int64_t gate = fused ? gate_shared() : 0, votes = 8ll * kRouterWarps * padded;
  s.scratch = take(gate > votes ? gate : votes);
  s.bytes = at;
  return s;
}

// One launch on sm_90 and above, two (gate, then route) elsewhere; one again where the logits are ready-made. Returns null,
// or what the CUDA runtime said of the launch.
const char* block_route(const Router& args, const Routing& routing, void* stream);

// The schedule of ids that came without the router: one launch. topk_ids [slots]; ids outside [0, experts) add nothing.
// expert_map: see `Router`.
const char* schedule(const int32_t* topk_ids, int64_t slots, int64_t experts, const int32_t* expert_map, uint32_t* out,
                     void* stream);

}  // namespace dmoe::cuda
