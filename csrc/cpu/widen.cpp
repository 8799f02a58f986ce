#include "widen.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "isa.h"
#include "widen_kernels.h"
#include "work.h"

namespace dmoe::cpu {
namespace {

// What one task takes, tuned on 2 cores of AMD Zen 3; `dmoe bench layer --device cpu --tokens 32` repeats it.
constexpr int64_t kChunk = 96;       // tokens at most: over kBlockDepth their activations stay in L2
constexpr int64_t kUpRows = 64;      // rows of gate, and as many of up
constexpr int64_t kLinearRows = 16;  // rows of linear_f32: a router has few

const WidenKernels& kernels() {
#ifdef __x86_64__
  if (isa() >= Isa::avx512) return kWidenAvx512;
  if (isa() >= Isa::avx2) return kWidenAvx2;
#endif
  return kWidenPlain;
}

int64_t padded(int64_t n) { return ceil_div(n, kPad) * kPad; }

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
  Buffer<float> data;
  const float* row(int64_t t) const { return data.get() + t * stride; }
};

Activations widen(const void* x, Dtype dtype, int64_t tokens, int64_t hidden, Dtype weight, const ParallelFor& parallel) {
  // Rows a multiple of 4 KiB apart would all fall into the same few sets of L1.
  const int64_t stride = padded(hidden) + (padded(hidden) % 1024 ? 0 : kBlockDepth);
  Activations wide{stride, uninitialized<float>(tokens * stride)};
  parallel(tokens, 1 + (1 << 14) / hidden, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      kernels().widen(at(x, dtype, t * hidden), dtype, hidden, weight, wide.data.get() + t * stride);
  });
  return wide;
}

// silu(gate x) * (up x) of every slot, as activations.
struct Hidden {
  int64_t routed, routed_stride, shared_stride;
  Buffer<float> data;

  Hidden(const Experts& a, const Slots& slots)
      : routed(slots.routed),
        routed_stride(padded(a.intermediate)),
        shared_stride(padded(a.shared_intermediate)),
        data(uninitialized<float>(routed * routed_stride +
                                  static_cast<int64_t>(slots.token.size() - routed) * shared_stride)) {}
  float* row(int64_t slot) const {
    return slot < routed ? data.get() + slot * routed_stride
                         : data.get() + routed * routed_stride + (slot - routed) * shared_stride;
  }
};

// A task is some rows of an expert and some of its tokens.
void up_projection(const Experts& a, const Slots& slots, const Activations& x, const Hidden& h,
                   const ParallelFor& parallel) {
  struct Task {
    const Group* group;
    int64_t row, begin, count;  // count slots from begin
  };
  constexpr int64_t kSums = 2 * kUpRows;  // gate, up
  std::vector<Task> tasks;
  std::vector<Token> tokens(slots.token.size());
  int64_t cost = 0;
  for (const Group& group : slots.groups) {
    cost += group.count * group.intermediate * a.hidden * 2;
    const int64_t chunks = ceil_div(group.count, kChunk);
    for (int64_t row = 0; row < group.intermediate; row += kUpRows)
      for (int64_t c = 0; c < chunks; ++c) {
        const int64_t begin = group.count * c / chunks, end = group.count * (c + 1) / chunks;
        tasks.push_back({&group, row, group.begin + begin, end - begin});
        for (int64_t i = begin; i < end; ++i)
          tokens[group.begin + i] = {x.row(slots.token[group.begin + i]), (i - begin) * kSums, 1.f};
      }
  }

  struct Worker {
    const Experts& a;
    const std::vector<Task>& tasks;
    const std::vector<Token>& tokens;
    const Hidden& h;
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
    void multiply(const Block& block, const Block& next) { kernels().multiply(block, next); }
    void finish(int64_t index) {
      const Task& task = tasks[index];
      const int64_t stride = padded(task.group->intermediate);
      for (int64_t i = 0; i < task.count; ++i) {
        float* gate = sums.data() + i * kSums;
        kernels().silu_mul(gate, gate + kUpRows, std::min(kUpRows, stride - task.row), a.dtype,
                           h.row(task.begin + i) + task.row);
        std::fill_n(gate, kSums, 0.f);
      }
    }
  };
  run_tasks<Block>(tasks.size(), cost / std::max<int64_t>(tasks.size(), 1), parallel,
                   [&] { return Worker{a, tasks, tokens, h}; });
}

// y = sum over slots of scale * (w2 h). A task is some rows of every expert, so it adds up in the order of the experts.
void down_projection(const Experts& a, const Slots& slots, const Hidden& h, const ParallelFor& parallel) {
  // Few rows make many tasks; but every task reads all of h, which few tokens leave in L2.
  const int64_t rows = a.tokens <= kChunk ? 32 : 128;
  std::vector<Token> tokens(slots.token.size());
  int64_t cost = 0;
  for (const Group& group : slots.groups) {
    cost += group.count * group.intermediate * rows;
    for (int64_t i = 0; i < group.count; ++i) {
      const int64_t slot = group.begin + i;
      tokens[slot] = {h.row(slot), slots.token[slot] * rows, slots.scale[slot]};
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
    void multiply(const Block& block, const Block& next) { kernels().multiply(block, next); }
    void finish(int64_t task) {
      const int64_t first = task * rows, count = std::min(rows, a.hidden - first);
      for (int64_t t = 0; t < a.tokens; ++t)
        kernels().narrow(sums.data() + t * rows, count, a.dtype,
                         const_cast<void*>(at(a.y, a.dtype, t * a.hidden + first)));
      std::fill(sums.begin(), sums.end(), 0.f);
    }
  };
  run_tasks<Block>(ceil_div(a.hidden, rows), cost, parallel, [&] { return Worker{a, slots.groups, tokens, rows}; });
}

}  // namespace

void widen_forward(const Experts& args, const Slots& slots, const ParallelFor& parallel) {
  const Activations x = widen(args.x, args.dtype, args.tokens, args.hidden, args.dtype, parallel);
  const Hidden h(args, slots);
  up_projection(args, slots, x, h, parallel);
  down_projection(args, slots, h, parallel);
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
    void multiply(const Block& block, const Block& next) { kernels().multiply(block, next); }
    void finish(int64_t) {}
  };
  Block block{};
  block.dtype = weight_dtype;
  block.weight = weight;
  block.tokens = list.data();
  block.count = tokens;
  block.out = out;
  const int64_t chunks = ceil_div(tokens, kChunk);
  run_tasks<Block>(ceil_div(rows, kLinearRows) * chunks, ceil_div(tokens, chunks) * kLinearRows * hidden, parallel,
            [&] { return Worker{block, chunks, hidden, rows}; });
}

}  // namespace dmoe::cpu
