// The layer on the GPU: bf16 tensors in managed memory, two launches.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include <dmoe/routing.h>

struct Layer {
  std::vector<float> x, gate, w13, w2, logits, weights, y;
  std::vector<int32_t> ids, coreset, size;
};

#if defined(DMOE_CUDA) && defined(HAVE_CUDART)
#include <cuda_runtime.h>
#include <dmoe/cuda/experts.h>
#include <dmoe/cuda/router.h>

// Not freed: this is an example that ends.
inline void* managed(size_t bytes) {
  void* memory = nullptr;
  cudaMallocManaged(&memory, bytes);
  return memory;
}

inline void* bf16(const std::vector<float>& from) {
  auto* to = static_cast<uint16_t*>(managed(from.size() * 2));
  for (size_t i = 0; i < from.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &from[i], 4);
    to[i] = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  return to;
}

// False where there is no Hopper GPU.
inline bool run_on_gpu(Layer& layer, const dmoe::Routing& routing) {
  int major = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) != cudaSuccess || major != 9) return false;
  const int64_t T = routing.block_size, k = routing.top_k, E = layer.coreset.size(), H = layer.x.size() / T;
  dmoe::cuda::Router router{};
  router.tokens = router.seq_len = T, router.hidden = H, router.experts = router.coreset_width = E, router.n_blocks = 1;
  router.x = bf16(layer.x), router.gate_weight = bf16(layer.gate);
  router.x_dtype = router.gate_dtype = dmoe::cuda::Dtype::bf16;
  router.logits = static_cast<float*>(managed(4 * T * E));
  router.topk_ids = static_cast<int32_t*>(managed(4 * T * k));
  router.topk_weights = static_cast<float*>(managed(4 * T * k));
  router.coreset_ids = static_cast<int32_t*>(managed(4 * E));
  router.coreset_sizes = static_cast<int32_t*>(managed(4));
  router.schedule = static_cast<uint32_t*>(managed(4 * dmoe::cuda::schedule_words(E)));
  dmoe::cuda::Experts experts{};
  experts.tokens = T, experts.hidden = H, experts.intermediate = layer.w2.size() / (E * H), experts.experts = E;
  experts.top_k = k, experts.dtype = dmoe::cuda::Dtype::bf16, experts.x = router.x;
  experts.w13 = bf16(layer.w13), experts.w2 = bf16(layer.w2), experts.schedule = router.schedule;
  experts.topk_ids = router.topk_ids, experts.topk_weights = router.topk_weights;
  experts.workspace = managed(dmoe::cuda::experts_workspace(T, H, experts.intermediate, 0, E, k).bytes);
  experts.y = bf16(layer.y);
  const char* error = dmoe::cuda::block_route(router, routing, nullptr);
  if (!error) error = dmoe::cuda::experts_forward(experts, nullptr);
  if (!error && cudaDeviceSynchronize() != cudaSuccess) error = "a kernel failed";
  if (error) {
    std::fprintf(stderr, "CUDA: %s\n", error);
    return false;
  }
  std::memcpy(layer.coreset.data(), router.coreset_ids, 4 * E);
  layer.size[0] = router.coreset_sizes[0];
  for (size_t i = 0; i < layer.y.size(); ++i) {
    const uint32_t bits = static_cast<uint32_t>(static_cast<uint16_t*>(experts.y)[i]) << 16;
    std::memcpy(&layer.y[i], &bits, 4);
  }
  return true;
}
#else
inline bool run_on_gpu(Layer&, const dmoe::Routing&) { return false; }
#endif
