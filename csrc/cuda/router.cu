// Launches of the router. No allocation, no synchronisation: everything can be captured in a CUDA graph.
#include "launch.h"
#include "router_kernel.h"

namespace dmoe::cuda {
namespace {

__global__ void __launch_bounds__(kRouterThreads, 1) gate_entry(const __grid_constant__ Router args) {
  extern __shared__ __align__(128) char shared[];
  gate_kernel(args, shared);
}

// N experts per lane: 8 for E <= 256, 16 above.
template <int N>
__global__ void __launch_bounds__(kRouterThreads, 1)
    route_entry(const __grid_constant__ Router args, const __grid_constant__ Routing routing) {
  extern __shared__ __align__(128) char shared[];
  route_kernel<N>(args, routing, shared);
}

__global__ void __launch_bounds__(kRouterThreads, 1)
    schedule_entry(const int32_t* topk_ids, int64_t slots, int experts, uint32_t* out) {
  __shared__ __align__(128) char shared[128];
  schedule_kernel(topk_ids, slots, experts, out, shared);
}

}  // namespace

const char* block_route(const Router& args, const Routing& routing, void* stream) {
  int major = 0, multiprocessors = 0;
  cudaError_t error = attribute(cudaDevAttrComputeCapabilityMajor, &major);
  if (error == cudaSuccess) error = attribute(cudaDevAttrMultiProcessorCount, &multiprocessors);
  if (error != cudaSuccess) return text(error);
  const bool clusters = major >= 9;
  Router route = args;
  if (args.schedule && args.n_blocks > 1) {
    error = cudaMemsetAsync(args.schedule + kUsed + args.experts, 0, ((args.experts + 31) / 32 + 1) * sizeof(uint32_t),
                            static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return text(error);
  }
  if (args.x && !clusters) {
    const int64_t tiles = (args.experts + kGateTile - 1) / kGateTile * ((args.tokens + kGateTile - 1) / kGateTile);
    const int64_t bytes = 4ll * kRouterWarps * kGateTile * (kGateTile + 1);
    error = launch(gate_entry, {tiles, kRouterThreads, bytes, 1, false}, stream, args);
    if (error != cudaSuccess) return text(error);
    route.x = nullptr;
  }
  const int size = clusters ? cluster_size(args.n_blocks, multiprocessors) : 1;
  const int64_t bytes =
      router_shared(static_cast<int>(args.experts), static_cast<int>(routing.block_size), size, route.x != nullptr).bytes;
  const auto kernel = args.experts <= 256 ? route_entry<8> : route_entry<16>;
  return text(launch(kernel, {args.n_blocks * size, kRouterThreads, bytes, size, clusters}, stream, route, routing));
}

const char* schedule(const int32_t* topk_ids, int64_t slots, int64_t experts, uint32_t* out, void* stream) {
  return text(launch(schedule_entry, {1, kRouterThreads, 0, 1, false}, stream, topk_ids, slots, static_cast<int>(experts), out));
}

}  // namespace dmoe::cuda
