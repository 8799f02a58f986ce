#include "experts.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "experts_kernels.h"

namespace dmoe::cpu {
namespace {

// What one task takes, tuned on 2 cores of AMD Zen 3; `dmoe bench layer --device cpu --tokens 32` repeats it.
constexpr int64_t kChunk = 96;       // tokens at most: over kBlockDepth their activations stay in L2
constexpr int64_t kUpRows = 64;      // rows of gate, and as many of up
constexpr int64_t kLinearRows = 16;  // rows of linear_f32: a router has few

const Kernels& choose() {
#ifdef __x86_64__
  const char* limit = std::getenv("DMOE_CPU_ISA");
  const auto below = [&](const char* name) { return limit && !std::strcmp(limit, name); };
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // and F16C, which is older
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && !below("avx2") && !below("plain")) return kAvx512;
  if (avx2 && !below("plain")) return kAvx2;
#endif
  return kPlain;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t padded(int64_t n) { return ceil_div(n, kPad) * kPad; }

const void* at(const void* base, Dtype dtype, int64_t element) {
  return static_cast<const char*>(base) + element * (dtype == Dtype::f32 ? 4 : 2);
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float[], Free>;

Floats uninitialized(int64_t n) {
  void* p = std::aligned_alloc(64, ceil_div(std::max<int64_t>(n, 1), 16) * 64);
  if (!p) throw std::bad_alloc();
  return Floats(static_cast<float*>(p));
}

// Hands `tasks` out one by one to whatever threads `parallel` brings: equal parts need not take equal time. A worker has
//   plan(task, blocks)  appends the blocks that the task multiplies,
//   finish(task)        uses their sums, and clears them.
// A thread knows its next task before it starts one, so that the last block of one fetches the first of the next.
template <class MakeWorker>
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
      for (size_t i = 0; i < count; ++i) kernels().multiply(blocks[i], blocks[i + 1]);
      worker.finish(task);
      blocks.swap(next_blocks);
      task = next;
    }
  });
}

// Appends rows [first, last) of a [.., depth] matrix, in blocks.
void append_blocks(Block block, int64_t first, int64_t last, int64_t depth, std::vector<Block>& blocks) {
  const bool few = block.count <= kFewTokens;
  const void* weight = block.weight;
  float* out = block.out;
  block.stride = depth;
  for (block.begin = 0; block.begin < depth; block.begin = block.end) {
    block.end = few ? depth : std::min(block.begin + kBlockDepth, depth);
    for (int64_t row = first; row < last; row += kBlockRows) {
      block.weight = at(weight, block.dtype, row * depth);
      block.rows = std::min(kBlockRows, last - row);
      block.out = out + (row - first);
      blocks.push_back(block);
    }
  }
}

struct Activations {
  int64_t stride;
  Floats data;
  const float* row(int64_t t) const { return data.get() + t * stride; }
};

Activations widen(const void* x, Dtype dtype, int64_t tokens, int64_t hidden, Dtype weight, const ParallelFor& parallel) {
  // Rows a multiple of 4 KiB apart would all fall into the same few sets of L1.
  const int64_t stride = padded(hidden) + (padded(hidden) % 1024 ? 0 : kBlockDepth);
  Activations wide{stride, uninitialized(tokens * stride)};
  parallel(tokens, 1 + (1 << 14) / hidden, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      kernels().widen(at(x, dtype, t * hidden), dtype, hidden, weight, wide.data.get() + t * stride);
  });
  return wide;
}

// The tokens of one expert; the shared expert is the last group, with every token at scale 1.
struct Group {
  const void *w13, *w2;
  int64_t intermediate;
  int64_t begin, count;  // its slots
  float* h;              // [count, padded(intermediate)]
};

// Every (token, expert) pair is a slot; slots are sorted by expert, then by token.
struct Plan {
  std::vector<Group> groups;
  std::vector<int64_t> token;  // of every slot
  std::vector<float> scale;
  Floats h;
};

Plan plan_of(const Experts& a) {
  std::vector<int64_t> end(a.experts + 1, 0);  // of every expert's slots
  const int64_t pairs = a.tokens * a.top_k;
  const auto valid = [&](int64_t i) { return a.topk_ids[i] >= 0 && a.topk_ids[i] < a.experts; };
  for (int64_t i = 0; i < pairs; ++i)
    if (valid(i)) ++end[a.topk_ids[i] + 1];
  for (int64_t e = 0; e < a.experts; ++e) end[e + 1] += end[e];
  const int64_t routed = end[a.experts], shared = a.shared_intermediate > 0 ? a.tokens : 0;

  Plan plan;
  plan.token.resize(routed + shared);
  plan.scale.resize(routed + shared, 1.f);
  for (int64_t i = 0; i < pairs; ++i) {
    if (!valid(i)) continue;
    const int64_t slot = end[a.topk_ids[i]]++;
    plan.token[slot] = i / a.top_k;
    plan.scale[slot] = a.topk_weights[i];
  }
  for (int64_t t = 0; t < shared; ++t) plan.token[routed + t] = t;

  const int64_t routed_stride = padded(a.intermediate), shared_stride = padded(a.shared_intermediate);
  plan.h = uninitialized(routed * routed_stride + shared * shared_stride);
  for (int64_t e = 0, begin = 0; e < a.experts; begin = end[e++]) {
    if (begin == end[e]) continue;
    const int64_t matrix = e * a.hidden * a.intermediate;
    plan.groups.push_back({at(a.w13, a.dtype, 2 * matrix), at(a.w2, a.dtype, matrix), a.intermediate, begin,
                           end[e] - begin, plan.h.get() + begin * routed_stride});
  }
  if (shared)
    plan.groups.push_back({a.shared_w13, a.shared_w2, a.shared_intermediate, routed, shared,
                           plan.h.get() + routed * routed_stride});
  return plan;
}

// h = silu(gate x) * (up x) for every slot. A task is some rows of an expert and some of its tokens.
void up_projection(const Experts& a, const Plan& plan, const Activations& x, const ParallelFor& parallel) {
  struct Task {
    const Group* group;
    int64_t row, begin, count;  // count slots from begin
  };
  constexpr int64_t kSums = 2 * kUpRows;  // gate, up
  std::vector<Task> tasks;
  std::vector<Token> tokens(plan.token.size());
  int64_t cost = 0;
  for (const Group& group : plan.groups) {
    cost += group.count * group.intermediate * a.hidden * 2;
    const int64_t chunks = ceil_div(group.count, kChunk);
    for (int64_t row = 0; row < group.intermediate; row += kUpRows)
      for (int64_t c = 0; c < chunks; ++c) {
        const int64_t begin = group.count * c / chunks, end = group.count * (c + 1) / chunks;
        tasks.push_back({&group, row, group.begin + begin, end - begin});
        for (int64_t i = begin; i < end; ++i)
          tokens[group.begin + i] = {x.row(plan.token[group.begin + i]), (i - begin) * kSums, 1.f};
      }
  }

  struct Worker {
    const Experts& a;
    const std::vector<Task>& tasks;
    const std::vector<Token>& tokens;
    std::vector<float> sums = std::vector<float>(kChunk * kSums, 0.f);

    void plan(int64_t index, std::vector<Block>& blocks) {
      const Task& task = tasks[index];
      const Group& group = *task.group;
      const int64_t end = std::min(task.row + kUpRows, group.intermediate);
      Block block{};
      block.dtype = a.dtype;
      block.weight = group.w13;
      block.tokens = tokens.data() + task.begin;
      block.count = task.count;
      block.out = sums.data();
      append_blocks(block, task.row, end, a.hidden, blocks);
      block.out += kUpRows;
      append_blocks(block, group.intermediate + task.row, group.intermediate + end, a.hidden, blocks);
    }
    void finish(int64_t index) {
      const Task& task = tasks[index];
      const int64_t stride = padded(task.group->intermediate);
      float* h = task.group->h + (task.begin - task.group->begin) * stride + task.row;
      for (int64_t i = 0; i < task.count; ++i) {
        float* gate = sums.data() + i * kSums;
        kernels().silu_mul(gate, gate + kUpRows, std::min(kUpRows, stride - task.row), a.dtype, h + i * stride);
        std::fill_n(gate, kSums, 0.f);
      }
    }
  };
  run_tasks(tasks.size(), cost / std::max<int64_t>(tasks.size(), 1), parallel, [&] { return Worker{a, tasks, tokens}; });
}

// y = sum over slots of scale * (w2 h). A task is some rows of every expert, so it adds up in the order of the experts.
void down_projection(const Experts& a, const Plan& plan, const ParallelFor& parallel) {
  // Few rows make many tasks; but every task reads all of h, which few tokens leave in L2.
  const int64_t rows = a.tokens <= kChunk ? 32 : 128;
  std::vector<Token> tokens(plan.token.size());
  int64_t cost = 0;
  for (const Group& group : plan.groups) {
    cost += group.count * group.intermediate * rows;
    for (int64_t i = 0; i < group.count; ++i) {
      const int64_t slot = group.begin + i;
      tokens[slot] = {group.h + i * padded(group.intermediate), plan.token[slot] * rows, plan.scale[slot]};
    }
  }

  struct Worker {
    const Experts& a;
    const std::vector<Group>& groups;
    const std::vector<Token>& tokens;
    const int64_t rows;
    std::vector<float> sums = std::vector<float>(a.tokens * rows, 0.f);

    void plan(int64_t task, std::vector<Block>& blocks) {
      for (const Group& group : groups) {
        Block block{};
        block.dtype = a.dtype;
        block.weight = group.w2;
        block.tokens = tokens.data() + group.begin;
        block.count = group.count;
        block.out = sums.data();
        append_blocks(block, task * rows, std::min((task + 1) * rows, a.hidden), group.intermediate, blocks);
      }
    }
    void finish(int64_t task) {
      const int64_t first = task * rows, count = std::min(rows, a.hidden - first);
      for (int64_t t = 0; t < a.tokens; ++t)
        kernels().narrow(sums.data() + t * rows, count, a.dtype,
                         const_cast<void*>(at(a.y, a.dtype, t * a.hidden + first)));
      std::fill(sums.begin(), sums.end(), 0.f);
    }
  };
  run_tasks(ceil_div(a.hidden, rows), cost, parallel, [&] { return Worker{a, plan.groups, tokens, rows}; });
}

}  // namespace

void experts_forward(const Experts& args, const ParallelFor& parallel) {
  if (args.tokens == 0) return;
  const Plan plan = plan_of(args);
  const Activations x = widen(args.x, args.dtype, args.tokens, args.hidden, args.dtype, parallel);
  up_projection(args, plan, x, parallel);
  down_projection(args, plan, parallel);
}

void linear_f32(const void* x, Dtype x_dtype, const void* weight, Dtype weight_dtype, int64_t tokens, int64_t hidden,
                int64_t rows, float* out, const ParallelFor& parallel) {
  if (tokens == 0 || rows == 0) return;
  const Activations wide = widen(x, x_dtype, tokens, hidden, weight_dtype, parallel);
  std::vector<Token> list(tokens);
  for (int64_t t = 0; t < tokens; ++t) list[t] = {wide.row(t), t * rows, 1.f};
  std::fill_n(out, tokens * rows, 0.f);

  struct Worker {
    Block block;
    int64_t chunks, hidden, rows;

    void plan(int64_t task, std::vector<Block>& blocks) {
      const int64_t tokens = block.count, row = task / chunks * kLinearRows, chunk = task % chunks;
      Block part = block;
      part.tokens += tokens * chunk / chunks;
      part.count = tokens * (chunk + 1) / chunks - tokens * chunk / chunks;
      part.out += row;
      append_blocks(part, row, std::min(row + kLinearRows, rows), hidden, blocks);
    }
    void finish(int64_t) {}
  };
  Block block{};
  block.dtype = weight_dtype;
  block.weight = weight;
  block.tokens = list.data();
  block.count = tokens;
  block.out = out;
  const int64_t chunks = ceil_div(tokens, kChunk);
  run_tasks(ceil_div(rows, kLinearRows) * chunks, ceil_div(tokens, chunks) * kLinearRows * hidden, parallel,
            [&] { return Worker{block, chunks, hidden, rows}; });
}

const char* isa() { return kernels().name; }

}  // namespace dmoe::cpu
