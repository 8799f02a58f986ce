// dmoe::dev on the CPU: every thread of a launch is a coroutine, resumed in random order between the points where a GPU
// would let threads meet. A wrong index or a deadlock then shows without a GPU, and so does every race: the kernels are
// compiled with the hooks of -fsanitize=thread (every access of memory calls one), and emulate.cpp keeps for every two bytes
// who touched them, and for every thread what it has been told by barriers, fences and atomics. Two accesses that nothing
// orders are an error whatever the order in which they happened to run.
//
// What it knows of the machine: blocks of a cluster start and leave at different times; only some blocks are resident; a launch
// may start before the one ahead of it ends; shuffles, votes and tensor cores order no memory; relaxed atomics neither; bulk
// copies go through a proxy of their own. What it cannot show: what the instructions themselves do, and their speed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "activation.h"

#define DMOE_DEVICE inline

namespace dmoe::emulate {

struct Launch {
  int ctas, threads, cluster;
  int64_t shared_bytes;
  bool early;  // may start while the launch before it runs; the first of a stream: while its inputs are still written
  std::function<void(char*)> kernel;
};

// Memory that other launches write: every access is checked. What is not named (weights) may be read at any time.
struct Memory {
  const void* begin;
  int64_t bytes;
  const char* name;
};

// Runs the launches as one stream, `resident` thread blocks at a time (0: all). Returns what went wrong, or "".
std::string run(const std::vector<Launch>& stream, const std::vector<Memory>& memory, int resident, uint32_t seed);

// Of the last run: the bytes of all prefetches and their range, and the bytes of copies of what is read once.
struct Totals {
  int64_t fetched, copied_once;
  uintptr_t fetched_from, fetched_to;
};
Totals totals();

void yield();
// Every lane leaves `bytes`; returns all 32 lanes' once all have. Orders no memory.
const char (*exchange(const void* value, size_t bytes))[64];

}  // namespace dmoe::emulate

namespace dmoe::dev {

int thread();
int lane();
int warp();
int cta();
int ctas();

template <class T>
const char (*exchange(const T& value))[64] {
  static_assert(sizeof(T) <= 64);
  return emulate::exchange(&value, sizeof(T));
}
template <class T>
T read(const char (*all)[64], int lane) {
  T value;
  std::memcpy(&value, all[lane & 31], sizeof(T));
  return value;
}

void sync_warp();
template <class T>
T shuffle(T value, int lane) {
  return read<T>(exchange(value), lane);
}
template <class T>
T shuffle_xor(T value, int mask) {
  return read<T>(exchange(value), lane() ^ mask);
}
template <class T>
T shuffle_up(T value, int by) {
  return read<T>(exchange(value), lane() >= by ? lane() - by : lane());
}
inline uint32_t ballot(bool value) {
  const auto all = exchange(value);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(read<bool>(all, i)) << i;
  return bits;
}
inline uint32_t warp_max(uint32_t value) {
  const auto all = exchange(value);
  uint32_t result = 0;
  for (int i = 0; i < 32; ++i) result = read<uint32_t>(all, i) > result ? read<uint32_t>(all, i) : result;
  return result;
}
inline uint32_t warp_add(uint32_t value) {
  const auto all = exchange(value);
  uint32_t result = 0;
  for (int i = 0; i < 32; ++i) result += read<uint32_t>(all, i);
  return result;
}
inline int popcount(uint32_t value) { return __builtin_popcount(value); }

void sync();
void sync_some(int barrier, int threads);

constexpr bool kClusters = true;
int cluster_rank();
int cluster_index();
int cluster_size();
void cluster_arrive();
void cluster_arrive_relaxed();
void cluster_wait();
void* remote_address(void* shared, int rank);
template <class T>
T* remote(T* shared, int rank) {
  return static_cast<T*>(remote_address(shared, rank));
}

void atomic_or(uint32_t* at, uint32_t value);
uint32_t atomic_add(uint32_t* at, uint32_t value);
uint32_t atomic_add_ordered(uint32_t* at, uint32_t value);
uint32_t load_acquire(const uint32_t* at);
// Not on the GPU: what tools/take_out.py puts in place of load_acquire.
uint32_t load_relaxed(const uint32_t* at);
struct alignas(16) Four {
  float v[4];
};
inline Four load_fresh(const float* at) { return {{at[0], at[1], at[2], at[3]}}; }
inline void pause(unsigned) { emulate::yield(); }
void launch_dependents();
void wait_for_primary();

inline uint32_t bits(float value) {
  uint32_t result;
  std::memcpy(&result, &value, 4);
  return result;
}
inline float from_bits(uint32_t value) {
  float result;
  std::memcpy(&result, &value, 4);
  return result;
}
inline float silu(float gate) { return gate / (1.0f + std::exp(-gate)); }
inline float gelu_tanh(float gate) {
  return gate / (1.0f + std::exp(-gate * (kGeluLinear + kGeluCubic * gate * gate)));
}
inline float half_to_float(uint16_t value) {
  _Float16 half;
  std::memcpy(&half, &value, 2);
  return half;
}
inline uint16_t float_to_half(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t result;
  std::memcpy(&result, &half, 2);
  return result;
}
inline float bf16_to_float(uint16_t value) { return from_bits(static_cast<uint32_t>(value) << 16); }
inline uint16_t float_to_bf16(float value) {
  const uint32_t b = bits(value);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

// e4m3: sign, four bits of exponent from 2^-6 on (0: no leading one), three of mantissa; all ones are NaN.
inline float fp8_to_float(uint32_t value) {
  const int exponent = value >> 3 & 15, mantissa = value & 7;
  if ((value & 0x7f) == 0x7f) return NAN;
  const float size =
      exponent ? std::ldexp(8.f + mantissa, exponent - 10) : std::ldexp(static_cast<float>(mantissa), -9);
  return value & 0x80 ? -size : size;
}
template <bool kHalf>
uint32_t widen_fp8(uint32_t two) {
  const auto narrow = [](float value) { return kHalf ? float_to_half(value) : float_to_bf16(value); };
  return narrow(fp8_to_float(two & 0xff)) | static_cast<uint32_t>(narrow(fp8_to_float(two >> 8 & 0xff))) << 16;
}

// c[16, 8] += a[16, 16] b[16, 8]; rows of a from lanes of words 0 and 2 (r < 8) or 1 and 3, columns of b from lanes 4 n ..
void mma16816(float (&c)[4], const uint32_t (&own)[6], bool half);
template <bool kHalf>
void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  mma16816(c, {a0, a1, a2, a3, b0, b1}, kHalf);
}
void load_matrices(uint32_t (&out)[4], const void* row);

using Barrier = uint64_t;
void barrier_init(Barrier* barrier, int arrivals);
void barrier_init_done();
void barrier_expect(Barrier* barrier, uint32_t bytes);
void barrier_arrive(Barrier* barrier);
void barrier_wait(Barrier* barrier, uint32_t parity);
void bulk_copy_of(void* shared, const void* global, uint32_t bytes, Barrier* barrier, bool once);
template <bool kOnce>
void bulk_copy(void* shared, const void* global, uint32_t bytes, Barrier* barrier) {
  bulk_copy_of(shared, global, bytes, barrier, kOnce);
}
void bulk_prefetch(const void* global, uint32_t bytes);
void fence_copies();

}  // namespace dmoe::dev
