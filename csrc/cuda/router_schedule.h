// The schedule of the expert kernel: the experts with work, in ascending order.
#pragma once

#include "router_layout.h"

namespace dmoe::cuda {

DMOE_DEVICE uint32_t* used_words(const Router& a) { return a.schedule + kUsed + a.experts; }

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

}  // namespace dmoe::cuda
