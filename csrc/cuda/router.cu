// Launches of the router. No allocation, no synchronisation: everything can be captured in a CUDA graph.
#include <atomic>

#include "launch.h"
#include "router_kernel.h"

namespace dmoe::cuda {
namespace {

__global__ void __launch_bounds__(kRouterThreads, 1) gate_entry(const __grid_constant__ Router args) {
  extern __shared__ __align__(128) char shared[];
  gate_kernel(args, shared);
}

// N experts per lane: 8 for E <= 256, 16 above. kUsual: see `is_usual`.
template <int N, bool kUsual = false>
__global__ void __launch_bounds__(kRouterThreads, 1)
    route_entry(const __grid_constant__ Router args, const __grid_constant__ Routing routing) {
  extern __shared__ __align__(128) char shared[];
  route_kernel<N, kUsual>(args, routing, shared);
}

__global__ void __launch_bounds__(kRouterThreads, 1)
    schedule_entry(const int32_t* topk_ids, int64_t slots, int experts, const int32_t* expert_map, uint32_t* out) {
  __shared__ __align__(128) char shared[128];
  schedule_kernel(topk_ids, slots, experts, expert_map, out, shared);
}

// The cluster that is wanted, or the largest below it that fits: a part of a GPU (MIG) may have fewer multiprocessors side by
// side than a cluster has blocks. Registers allow one block per multiprocessor, so its shared memory does not matter.
template <class... Params>
cudaError_t largest_cluster(void (*kernel)(Params...), int wanted, int* size) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices][2];  // for clusters of 8 and of 4
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return forget(error);
  std::atomic<int>* found = device < kDevices ? &known[device][wanted == 8] : nullptr;
  *size = found ? found->load() : 0;
  for (int next = wanted; *size == 0; next /= 2) {
    int fit = 1;
    if (next > 1) {
      const cudaError_t error = active_clusters(kernel, {next, kRouterThreads, 0, next, true}, &fit);
      if (error != cudaSuccess) return error;
    }
    if (fit > 0) *size = next;
  }
  if (found) found->store(*size);
  return cudaSuccess;
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
    error = launch(gate_entry, {tiles, kRouterThreads, gate_shared(), 1, false}, stream, args);
    if (error != cudaSuccess) return text(error);
    route.x = nullptr;
  }
  const auto kernel = is_usual(route, routing) ? route_entry<8, true>
                      : args.experts <= 256    ? route_entry<8>
                                               : route_entry<16>;
  int size = 1;
  if (clusters) {
    error = largest_cluster(kernel, cluster_size(args.n_blocks, multiprocessors), &size);
    if (error != cudaSuccess) return text(error);
  }
  const int64_t bytes =
      router_shared(static_cast<int>(args.experts), static_cast<int>(routing.block_size), size, route.x != nullptr)
          .bytes;
  return text(launch(kernel, {args.n_blocks * size, kRouterThreads, bytes, size, clusters}, stream, route, routing));
}

const char* schedule(const int32_t* topk_ids, int64_t slots, int64_t experts, const int32_t* expert_map, uint32_t* out,
                     void* stream) {
  int major = 0;
  const cudaError_t error = attribute(cudaDevAttrComputeCapabilityMajor, &major);
  if (error != cudaSuccess) return text(error);
  const Shape shape{1, kRouterThreads, 0, 1, major >= 9};
  return text(launch(schedule_entry, shape, stream, topk_ids, slots, static_cast<int>(experts), expert_map, out));
}

}  // namespace dmoe::cuda
