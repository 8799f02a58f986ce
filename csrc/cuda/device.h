// What the kernels use of the machine, so that the same kernel code is compiled by nvcc for the GPU and by a C++ compiler for
// tests/cpp/emulate.h, which runs every thread of it on the CPU in random order.
#pragma once

#include <cmath>
#include <cstdint>

#include "../activation.h"

#ifndef __CUDACC__
#include "emulate.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define DMOE_DEVICE __device__ __forceinline__

namespace dmoe::dev {

DMOE_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
DMOE_DEVICE int lane() { return thread() & 31; }
DMOE_DEVICE int warp() { return thread() >> 5; }
DMOE_DEVICE int cta() { return static_cast<int>(blockIdx.x); }
DMOE_DEVICE int ctas() { return static_cast<int>(gridDim.x); }

// --- a warp, all 32 lanes
DMOE_DEVICE void sync_warp() { __syncwarp(); }
template <class T>
DMOE_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(~0u, value, lane);
}
template <class T>
DMOE_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(~0u, value, mask);
}
template <class T>
DMOE_DEVICE T shuffle_up(T value, int by) {
  return __shfl_up_sync(~0u, value, by);
}
DMOE_DEVICE uint32_t ballot(bool value) { return __ballot_sync(~0u, value); }
DMOE_DEVICE uint32_t warp_max(uint32_t value) { return __reduce_max_sync(~0u, value); }
DMOE_DEVICE uint32_t warp_add(uint32_t value) { return __reduce_add_sync(~0u, value); }
DMOE_DEVICE int popcount(uint32_t value) { return __popc(value); }

// --- a thread block, and named barriers for some of its warps
DMOE_DEVICE void sync() { __syncthreads(); }
DMOE_DEVICE void sync_some(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// --- a cluster; before sm_90 every block is a cluster of one
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kClusters = false;
#else
constexpr bool kClusters = true;
#endif
DMOE_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int>(__clusterRelativeBlockRank());
#else
  return 0;
#endif
}
DMOE_DEVICE int cluster_index() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int>(__clusterIdx().x);
#else
  return cta();
#endif
}
DMOE_DEVICE int cluster_size() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int>(__clusterSizeInBlocks());
#else
  return 1;
#endif
}
DMOE_DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
// That this thread block has started, and nothing that it has written: without the fence that a release costs.
DMOE_DEVICE void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
DMOE_DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}
// Where a shared variable of this block lies in the block of that rank.
template <class T>
DMOE_DEVICE T* remote(T* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  return static_cast<T*>(__cluster_map_shared_rank(shared, rank));
#else
  return shared;
#endif
}

// --- memory
DMOE_DEVICE void atomic_or(uint32_t* at, uint32_t value) { atomicOr(at, value); }
DMOE_DEVICE uint32_t atomic_add(uint32_t* at, uint32_t value) { return atomicAdd(at, value); }
// Of one thread, behind a barrier: what its thread block wrote before is seen by whoever sees the sum, and the other way round.
DMOE_DEVICE uint32_t atomic_add_ordered(uint32_t* at, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(at), "r"(value) : "memory");
  return before;
}
DMOE_DEVICE uint32_t load_acquire(const uint32_t* at) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
// Values that other blocks wrote in this launch: not from this processor's L1. From a multiple of 16 bytes.
struct alignas(16) Four {
  float v[4];
};
DMOE_DEVICE Four load_fresh(const float* at) {
  const float4 f = __ldcg(reinterpret_cast<const float4*>(at));
  return {{f.x, f.y, f.z, f.w}};
}
// Between two looks at what another thread block will change.
DMOE_DEVICE void pause(unsigned nanoseconds) {
#if __CUDA_ARCH__ >= 700
  __nanosleep(nanoseconds);
#endif
}

// --- programmatic dependent launch
DMOE_DEVICE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DMOE_DEVICE void wait_for_primary() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A multiple of 16 bytes, from such an address, into the L2.
DMOE_DEVICE void bulk_prefetch(const void* global, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
#endif
}

// --- numbers
// gate * sigmoid(gate) by the approximations of exp2 and of a division: some units of the last place of a float. Exact code
// is three times as long, and all of it has to be fetched while memory waits.
DMOE_DEVICE float silu(float gate) { return __fdividef(gate, 1.0f + __expf(-gate)); }
DMOE_DEVICE float gelu_tanh(float gate) {
  return __fdividef(gate, 1.0f + __expf(-gate * (kGeluLinear + kGeluCubic * gate * gate)));
}
DMOE_DEVICE uint32_t bits(float value) { return __float_as_uint(value); }
DMOE_DEVICE float from_bits(uint32_t value) { return __uint_as_float(value); }
DMOE_DEVICE float half_to_float(uint16_t value) { return __half2float(__ushort_as_half(value)); }
DMOE_DEVICE uint16_t float_to_half(float value) { return __half_as_ushort(__float2half_rn(value)); }
DMOE_DEVICE uint16_t float_to_bf16(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }

// Two numbers of e4m3, the low halfword of `two`, as two of the 16-bit type: exactly, NaN too (sm_89).
template <bool kHalf>
DMOE_DEVICE uint32_t widen_fp8(uint32_t two) {
  uint32_t half;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(half) : "h"(static_cast<uint16_t>(two)));
  if constexpr (kHalf) return half;
  const float2 wide = __half22float2(*reinterpret_cast<__half2*>(&half));
  const __nv_bfloat162 narrow = __floats2bfloat162_rn(wide.x, wide.y);
  return *reinterpret_cast<const uint32_t*>(&narrow);
}

// --- tensor cores: c[16, 8] += a[16, 16] b[16, 8]
template <bool kHalf>
DMOE_DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (kHalf) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

DMOE_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Four 8x8 matrices of 16-bit numbers; lane i names row i % 8 of matrix i / 8.
DMOE_DEVICE void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// --- bulk copies into shared memory, counted by a barrier there (sm_90)
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
using Barrier = uint64_t;

DMOE_DEVICE void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes the initialised barriers visible to the copy engine.
DMOE_DEVICE void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DMOE_DEVICE void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
DMOE_DEVICE void barrier_expect(Barrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Of a whole warp: lanes leave the loop at different times and meet behind it. Without that a lane that stays behind may find
// that two phases have passed, and wait for ever.
DMOE_DEVICE void barrier_wait(Barrier* barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
  __syncwarp();
}
// Both addresses and the size are multiples of 16 bytes. The hint keeps what is read once (weights) from pushing what every
// thread block reads (x and h) out of the L2; these are the policies that createpolicy makes. It is a uniform operand: lanes
// that differ in it would all get one lane's.
template <bool kOnce>
DMOE_DEVICE void bulk_copy(void* shared, const void* global, uint32_t bytes, Barrier* barrier) {
  constexpr uint64_t kEvictFirst = 0x12F0000000000000, kEvictNormal = 0x1000000000000000;
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier)), "l"(kOnce ? kEvictFirst : kEvictNormal)
      : "memory");
}
// Between ordinary accesses of global memory and copies of the same bytes by the copy engine.
DMOE_DEVICE void fence_copies() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
#endif

}  // namespace dmoe::dev

#endif  // __CUDACC__
