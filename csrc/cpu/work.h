// What every form of the experts shares: memory, the slots of each expert, and tasks for threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "experts.h"
#include "matrix.h"

namespace dmoe::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline const void* at(const void* base, Dtype dtype, int64_t element) {
  return static_cast<const char*>(base) + element * size_of(dtype);
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

// n elements on a cache line, not initialized.
template <class T>
Buffer<T> uninitialized(int64_t n) {
  void* p = std::aligned_alloc(64, std::max<int64_t>(ceil_div(n * sizeof(T), 64), 1) * 64);
  if (!p) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(p));
}

// The tokens of one expert; the shared expert is the last group, with every token at scale 1.
struct Group {
  Matrix w13, w2;
  int64_t intermediate;
  int64_t begin, count;  // its slots
};

// Every (token, expert) pair is a slot; slots are sorted by expert, then by token.
struct Slots {
  std::vector<Group> groups;
  std::vector<int64_t> token;  // of every slot
  std::vector<float> scale;
  int64_t routed;  // slots before those of the shared expert
};

Slots slots_of(const Experts& args);

// What n columns of a token's sums begin with.
inline void first_sums(const Experts& a, int64_t token, int64_t column, int64_t n, float* sums) {
  if (a.first_wave()) {
    std::fill_n(sums, n, 0.f);
  } else {
    std::copy_n(a.carry + token * a.hidden + column, n, sums);
  }
}

// Hands `tasks` out one by one to whatever threads `parallel` brings: equal parts need not take equal time. A worker has
//   plan(task, blocks)  appends the blocks that the task multiplies,
//   start(task)         may be there: what its sums begin with,
//   multiply(block, next)  adds up one of them, and fetches the weights of the next one (which may have no rows),
//   finish(task)        uses their sums, and clears them where there is no start.
// A thread knows its next task before it starts one, so that the last block of one fetches the first of the next.
template <class Block, class MakeWorker>
void run_tasks(int64_t tasks, int64_t cost, const ParallelFor& parallel, const MakeWorker& make_worker) {
  constexpr int64_t kMinCost = 1 << 17;  // multiplications worth a thread's while
  if (tasks == 0) return;
  std::atomic<int64_t> next_task{0};
  parallel(tasks, 1 + kMinCost / std::max<int64_t>(cost, 1), [&](int64_t, int64_t) {
    auto worker = make_worker();
    std::vector<Block> blocks, next_blocks;
    int64_t task = next_task++;
    if (task < tasks) worker.plan(task, blocks);
    while (task < tasks) {
      const int64_t next = next_task++;
      next_blocks.clear();
      if (next < tasks) worker.plan(next, next_blocks);
      const size_t count = blocks.size();
      blocks.push_back(next_blocks.empty() ? Block{} : next_blocks.front());
      if constexpr (requires { worker.start(task); }) worker.start(task);
      for (size_t i = 0; i < count; ++i) worker.multiply(blocks[i], blocks[i + 1]);
      worker.finish(task);
      blocks.swap(next_blocks);
      task = next;
    }
  });
}

}  // namespace dmoe::cpu
