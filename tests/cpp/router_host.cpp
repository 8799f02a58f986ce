// The kernels of csrc/cuda/router.cu on the CPU, for tests/test_select_host.py (by ctypes).
#include "cuda/router_kernel.h"

namespace {

std::string error;

const char* report(const std::string& what) {
  error = what;
  return error.empty() ? nullptr : error.c_str();
}

}  // namespace

extern "C" {

// Both forms of the router: cluster > 0 is the fused one (or takes ready-made logits, when x is null).
const char* emulate_route(const dmoe::cuda::Router* args, const int64_t* ints, const double* floats, int cluster,
                          int two_launches, uint32_t seed) {
  using namespace dmoe::cuda;
  const dmoe::Routing routing = dmoe::unpack_routing(ints, floats);
  Router a = *args;
  if (const char* why = refuses(a, routing)) return why;
  if (two_launches) {
    const int tiles = static_cast<int>((a.experts + kGateTile - 1) / kGateTile * ((a.tokens + kGateTile - 1) / kGateTile));
    const int64_t bytes = 4ll * kRouterWarps * kGateTile * (kGateTile + 1);
    const std::string what =
        dmoe::emulate::launch(tiles, kRouterThreads, 1, bytes, seed, [&](char* shared) { gate_kernel(a, shared); });
    if (!what.empty()) return report(what);
    a.x = nullptr;
  }
  const RouterShared shared =
      router_shared(static_cast<int>(a.experts), static_cast<int>(routing.block_size), cluster, a.x != nullptr);
  // As many clusters at a time as there are, so that any may be the last.
  return report(dmoe::emulate::launch(static_cast<int>(a.n_blocks) * cluster, kRouterThreads, cluster, shared.bytes, seed,
                                      [&](char* memory) {
                                        if (a.experts <= 256) {
                                          route_kernel<8>(a, routing, memory);
                                        } else {
                                          route_kernel<16>(a, routing, memory);
                                        }
                                      }));
}

const char* emulate_schedule(const int32_t* topk_ids, int64_t slots, int64_t experts, uint32_t* out, uint32_t seed) {
  using namespace dmoe::cuda;
  return report(dmoe::emulate::launch(1, kRouterThreads, 1, 256, seed, [&](char* shared) {
    schedule_kernel(topk_ids, slots, static_cast<int>(experts), out, shared);
  }));
}

// What the last launch would have fetched into the L2: bytes, and the range from `base` on.
void fetched(uintptr_t base, int64_t* out) {
  out[0] = dmoe::emulate::machine.fetched;
  out[1] = static_cast<int64_t>(dmoe::emulate::machine.fetched_from - base);
  out[2] = static_cast<int64_t>(dmoe::emulate::machine.fetched_to - base);
}
int64_t schedule_words(int64_t experts) { return dmoe::cuda::schedule_words(experts); }
int used_at() { return dmoe::cuda::kUsed; }
int64_t router_shared_bytes(int experts, int block_size, int cluster, int fused) {
  return dmoe::cuda::router_shared(experts, block_size, cluster, fused).bytes;
}
int cluster_size(int64_t n_blocks, int multiprocessors) { return dmoe::cuda::cluster_size(n_blocks, multiprocessors); }
}
