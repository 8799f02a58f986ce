// dmoe::dev on the CPU: every thread of a launch is a coroutine, resumed in random order between the points where a GPU
// would let threads meet. A wrong index, a missing barrier or a deadlock then shows without a GPU. What it cannot show:
// weak memory order, and what the instructions themselves do.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define DMOE_DEVICE inline

namespace dmoe::emulate {

// A barrier of n threads. `generation` counts how often it has opened.
struct Meeting {
  int arrived = 0;
  uint32_t generation = 0;
  void arrive(int n) {
    if (++arrived == n) {
      arrived = 0;
      ++generation;
    }
  }
};

struct Warp {
  Meeting meeting;
  alignas(16) char in[32][64], out[32][64];
};

struct Cta;

struct Fiber {
  ucontext_t context;
  int thread = 0;
  Cta* cta = nullptr;
  const uint32_t* waits_for = nullptr;  // resumed once *waits_for differs from `seen`
  uint32_t seen = 0, cluster_seen = 0;
  bool started = false, done = false;
};

struct Cta {
  int index, rank;
  std::vector<char> memory;
  char* shared;
  std::vector<Warp> warps;
  Meeting barriers[16];
  Meeting* cluster;
  std::vector<Cta*> peers;
};

struct Copy {
  void* to;
  const void* from;
  uint32_t bytes;
  uint64_t* barrier;
};

struct Machine {
  ucontext_t scheduler;
  Fiber* current = nullptr;
  int threads = 0, ctas = 0, cluster = 1;
  int64_t shared_bytes = 0;
  std::mt19937 random;
  std::vector<Copy> copies;  // asked for, not yet done
  uintptr_t fetched_from = ~uintptr_t{0}, fetched_to = 0;  // the range of all prefetches
  int64_t fetched = 0;
  int64_t copied_once = 0;  // bytes of copies with `once`
  const std::function<void(char*)>* kernel = nullptr;
  std::string error;
};

inline Machine machine;
constexpr size_t kStack = 128 << 10, kGuard = 4096;

inline void yield() { swapcontext(&machine.current->context, &machine.scheduler); }

inline void wait_for(const uint32_t* generation, uint32_t seen) {
  Fiber* self = machine.current;
  while (*generation == seen) {
    self->waits_for = generation;
    self->seen = seen;
    yield();
    self->waits_for = nullptr;
  }
}

inline void meet(Meeting& meeting, int n) {
  const uint32_t seen = meeting.generation;
  meeting.arrive(n);
  wait_for(&meeting.generation, seen);
}

inline void entry() {
  try {
    (*machine.kernel)(machine.current->cta->shared);
  } catch (const std::exception& error) {
    machine.error = error.what();
  }
  machine.current->done = true;
  yield();
}

// The barrier of bulk copies: phase, arrivals still due and bytes still due, as the hardware keeps them.
struct Phase {
  uint32_t generation : 8;
  uint32_t expected : 12;
  int32_t due : 12;
  int32_t bytes;
};
static_assert(sizeof(Phase) == 8);

inline void settle(Phase& phase) {
  if (phase.due == 0 && phase.bytes == 0) {
    phase.generation = phase.generation + 1;
    phase.due = static_cast<int32_t>(phase.expected);
  }
}

inline void finish_copy(size_t i) {
  const Copy copy = machine.copies[i];
  machine.copies[i] = machine.copies.back();
  machine.copies.pop_back();
  std::memcpy(copy.to, copy.from, copy.bytes);
  Phase& phase = *reinterpret_cast<Phase*>(copy.barrier);
  phase.bytes -= static_cast<int32_t>(copy.bytes);
  settle(phase);
}

// Runs kernel(shared) on ctas * threads threads. Returns what went wrong, or "".
inline std::string launch(int ctas, int threads, int cluster, int64_t shared_bytes, uint32_t seed,
                          const std::function<void(char*)>& kernel) {
  machine.threads = threads;
  machine.ctas = ctas;
  machine.cluster = cluster;
  machine.shared_bytes = shared_bytes;
  machine.random.seed(seed);
  machine.kernel = &kernel;
  machine.error.clear();
  machine.copies.clear();
  machine.copied_once = machine.fetched = 0;
  machine.fetched_from = ~uintptr_t{0};
  machine.fetched_to = 0;
  std::vector<std::unique_ptr<Cta>> all;
  std::vector<std::unique_ptr<Meeting>> clusters;
  for (int c = 0; c < ctas; ++c) {
    if (c % cluster == 0) clusters.push_back(std::make_unique<Meeting>());
    all.push_back(std::make_unique<Cta>());
    Cta& cta = *all.back();
    cta.index = c;
    cta.rank = c % cluster;
    cta.memory.assign(shared_bytes + 128 + kGuard, static_cast<char>(0xff));  // NaN, until the kernel writes
    cta.shared = cta.memory.data() + (128 - reinterpret_cast<uintptr_t>(cta.memory.data()) % 128) % 128;
    cta.warps.resize((threads + 31) / 32);
    cta.cluster = clusters.back().get();
  }
  for (int c = 0; c < ctas; ++c) {
    for (int r = 0; r < cluster; ++r) all[c]->peers.push_back(all[c / cluster * cluster + r].get());
  }
  const size_t n = static_cast<size_t>(ctas) * threads;
  static std::vector<char*> stacks;
  while (stacks.size() < n) {
    stacks.push_back(static_cast<char*>(
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)));
  }
  std::vector<Fiber> fibers(n);
  for (size_t i = 0; i < n; ++i) {
    Fiber& fiber = fibers[i];
    fiber.thread = static_cast<int>(i % threads);
    fiber.cta = all[i / threads].get();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks[i];
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
  }
  std::vector<size_t> order((n + 31) / 32);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  size_t left = n;
  int idle = 0;
  std::vector<bool> starved(order.size());
  for (int round = 0; left && machine.error.empty(); ++round) {
    // Some warps get nothing for a while: they are late wherever the kernel does not wait for them.
    if (round % 32 == 0) {
      for (size_t group = 0; group < order.size(); ++group) starved[group] = machine.random() % 4 == 0;
    }
    std::shuffle(order.begin(), order.end(), machine.random);
    const size_t turn = machine.random();
    bool moved = false;
    for (size_t group : order) {
      if (starved[group]) continue;
      for (size_t j = 0; j < 32; ++j) {
        const size_t i = group * 32 + (j + turn) % 32;
        if (i >= n || fibers[i].done) continue;
        Fiber& fiber = fibers[i];
        if (fiber.waits_for && *fiber.waits_for == fiber.seen) continue;
        moved |= fiber.waits_for != nullptr || !fiber.started;
        fiber.started = true;
        machine.current = &fiber;
        swapcontext(&machine.scheduler, &fiber.context);
        left -= fiber.done;
        moved |= fiber.done;
      }
    }
    // Copies arrive in any order, late ones too.
    for (size_t due = machine.copies.size(); due > 0; --due) {
      if (machine.random() % 4 == 0) {
        finish_copy(machine.random() % machine.copies.size());
        moved = true;
      }
    }
    idle = moved ? 0 : idle + 1;
    if (idle > 20000) machine.error = "deadlock";
  }
  if (machine.error.empty() && !machine.copies.empty()) machine.error = "a copy was still under way at the end";
  for (const auto& cta : all) {
    const char* end = cta->shared + shared_bytes;
    for (const char* p = end; p < cta->memory.data() + cta->memory.size(); ++p) {
      if (*p != static_cast<char>(0xff)) machine.error = "a write past the end of shared memory";
    }
  }
  return machine.error;
}

}  // namespace dmoe::emulate

namespace dmoe::dev {

using emulate::machine;

inline int thread() { return machine.current->thread; }
inline int lane() { return thread() & 31; }
inline int warp() { return thread() >> 5; }
inline int cta() { return machine.current->cta->index; }
inline int ctas() { return machine.ctas; }

// Every lane leaves a value; returns all 32 of them once all have.
template <class T>
const char (*exchange(const T& value))[64] {
  static_assert(sizeof(T) <= 64);
  emulate::Warp& w = machine.current->cta->warps[warp()];
  std::memcpy(w.in[lane()], &value, sizeof(T));
  const uint32_t seen = w.meeting.generation;
  if (w.meeting.arrived == 31) std::memcpy(w.out, w.in, sizeof(w.in));
  w.meeting.arrive(32);
  emulate::wait_for(&w.meeting.generation, seen);
  return w.out;
}
template <class T>
T read(const char (*all)[64], int lane) {
  T value;
  std::memcpy(&value, all[lane & 31], sizeof(T));
  return value;
}

inline void sync_warp() { exchange(0); }
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
  for (int i = 0; i < 32; ++i) result = std::max(result, read<uint32_t>(all, i));
  return result;
}
inline uint32_t warp_min(uint32_t value) {
  const auto all = exchange(value);
  uint32_t result = ~0u;
  for (int i = 0; i < 32; ++i) result = std::min(result, read<uint32_t>(all, i));
  return result;
}
inline int popcount(uint32_t value) { return __builtin_popcount(value); }

inline void sync() { emulate::meet(machine.current->cta->barriers[0], machine.threads); }
inline void sync_some(int barrier, int threads) { emulate::meet(machine.current->cta->barriers[barrier], threads); }

constexpr bool kClusters = true;
inline int cluster_rank() { return machine.current->cta->rank; }
inline int cluster_size() { return machine.cluster; }
inline void cluster_arrive() {
  emulate::Meeting& all = *machine.current->cta->cluster;
  machine.current->cluster_seen = all.generation;
  all.arrive(machine.cluster * machine.threads);
}
inline void cluster_wait() {
  emulate::wait_for(&machine.current->cta->cluster->generation, machine.current->cluster_seen);
}
template <class T>
T* remote(T* shared, int rank) {
  emulate::Cta& own = *machine.current->cta;
  return reinterpret_cast<T*>(own.peers[rank]->shared + (reinterpret_cast<char*>(shared) - own.shared));
}

inline void atomic_or(uint32_t* at, uint32_t value) { *at |= value; }
inline uint32_t atomic_add(uint32_t* at, uint32_t value) {
  const uint32_t before = *at;
  *at += value;
  return before;
}
inline uint32_t atomic_add_ordered(uint32_t* at, uint32_t value) { return atomic_add(at, value); }
inline uint32_t load_acquire(const uint32_t* at) {
  emulate::yield();  // it may be polled
  return *at;
}
inline float load_fresh(const float* at) { return *at; }
inline void launch_dependents() {}
inline void wait_for_primary() {}

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

template <bool kHalf>
void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const uint32_t own[6] = {a0, a1, a2, a3, b0, b1};
  struct Fragment {
    uint32_t word[6];
  };
  Fragment fragment;
  std::memcpy(&fragment, own, sizeof(own));
  const auto all = exchange(fragment);
  const auto number = [](uint32_t word, int half) {
    const uint16_t raw = static_cast<uint16_t>(word >> (16 * half));
    return kHalf ? half_to_float(raw) : bf16_to_float(raw);
  };
  // Row r of a: words 0 and 2 (r < 8) or 1 and 3 of lanes 4 * (r % 8) ..; column n of b: lanes 4 * n ..
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const auto a = read<Fragment>(all, row % 8 * 4 + k % 8 / 2), b = read<Fragment>(all, column * 4 + k % 8 / 2);
      sum += number(a.word[row / 8 + k / 8 * 2], k % 2) * number(b.word[4 + k / 8], k % 2);
    }
    c[i] += sum;
  }
}

inline void load_matrices(uint32_t (&out)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) throw std::runtime_error("ldmatrix: a row is not aligned to 16 bytes");
  const auto all = exchange(row);
  for (int i = 0; i < 4; ++i) {
    const char* from = read<const char*>(all, i * 8 + lane() / 4) + lane() % 4 * 4;
    std::memcpy(&out[i], from, 4);
  }
}

using Barrier = uint64_t;
inline emulate::Phase& phase_of(Barrier* barrier) { return *reinterpret_cast<emulate::Phase*>(barrier); }
inline void barrier_init(Barrier* barrier, int arrivals) {
  phase_of(barrier) = {0, static_cast<uint32_t>(arrivals), arrivals, 0};
}
inline void barrier_init_done() {}
inline void barrier_expect(Barrier* barrier, uint32_t bytes) {
  emulate::Phase& phase = phase_of(barrier);
  phase.bytes += static_cast<int32_t>(bytes);
  phase.due = phase.due - 1;
  emulate::settle(phase);
}
inline void barrier_arrive(Barrier* barrier) { barrier_expect(barrier, 0); }
inline void barrier_wait(Barrier* barrier, uint32_t parity) {
  while ((phase_of(barrier).generation & 1) == parity) emulate::yield();
}
inline void bulk_copy(void* shared, const void* global, uint32_t bytes, Barrier* barrier, bool once) {
  emulate::Cta& own = *machine.current->cta;
  const int64_t at = static_cast<char*>(shared) - own.shared;
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16 || bytes % 16 || !bytes) {
    throw std::runtime_error("a bulk copy is not aligned to 16 bytes");
  }
  if (at < 0 || at + bytes > machine.shared_bytes) throw std::runtime_error("a bulk copy past the end of shared memory");
  machine.copies.push_back({shared, global, bytes, barrier});
  if (once) machine.copied_once += bytes;
}
inline void bulk_prefetch(const void* global, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(global) % 16 || bytes % 16 || !bytes) throw std::runtime_error("a prefetch is not aligned");
  machine.fetched_from = std::min(machine.fetched_from, reinterpret_cast<uintptr_t>(global));
  machine.fetched_to = std::max(machine.fetched_to, reinterpret_cast<uintptr_t>(global) + bytes);
  machine.fetched += bytes;
}
inline void fence_copies() {}

}  // namespace dmoe::dev
