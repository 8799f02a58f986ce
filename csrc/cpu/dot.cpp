#include "dot.h"

#include <algorithm>
#include <vector>

#include "dot_kernels.h"
#include "isa.h"
#include "work.h"

namespace dmoe::cpu {
namespace {

// Tuned on 2 cores of AMD Zen 4 (1 MiB of L2 each); `dmoe bench layer --device cpu --tokens 32` and
// `dmoe bench experts --device cpu --tokens 128,512` repeat it.
constexpr int64_t kUpTokens = 96;       // of a task of up: with the weights of its rows, their activations stay in L2
constexpr int64_t kChunkTokens = 512;   // of a task of down: its sums stay in L2
constexpr int64_t kSumsBytes = 1 << 18;  // of a task of down

int64_t steps(int64_t depth) { return ceil_div(depth, kStepDepth); }

// The slots of every group cut into tiles that do not cross a chunk of tokens.
struct Tiles {
  int64_t chunk, chunks;              // tokens of a chunk
  std::vector<int64_t> begin;         // the first slot of every tile, and the end
  std::vector<int64_t> first;         // first[group * chunks + chunk]: its first tile, and the end

  Tiles(const Slots& slots, int64_t tokens, int64_t width)
      : chunk(std::min(tokens, kChunkTokens)), chunks(ceil_div(tokens, chunk)) {
    for (const Group& group : slots.groups) {
      int64_t slot = group.begin;
      for (int64_t c = 0; c < chunks; ++c) {
        first.push_back(begin.size());
        const int64_t from = slot;
        while (slot < group.begin + group.count && slots.token[slot] < (c + 1) * chunk) ++slot;
        const int64_t count = slot - from, tiles = ceil_div(count, width);
        for (int64_t i = 0; i < tiles; ++i) begin.push_back(from + count * i / tiles);
      }
    }
    first.push_back(begin.size());
    begin.push_back(slots.token.size());
  }
  int64_t count() const { return begin.size() - 1; }
};

// Packed activations, one area per depth: the routed slots and those of the shared expert differ in h.
struct Packed {
  int64_t routed, routed_steps, shared_steps;
  Buffer<char> data;

  Packed(const Slots& slots, int64_t routed_depth, int64_t shared_depth)
      : routed(slots.routed),
        routed_steps(steps(routed_depth)),
        shared_steps(steps(shared_depth)),
        data(uninitialized<char>((routed * routed_steps + (slots.token.size() - routed) * shared_steps) * kStepBytes)) {}
  char* at(int64_t slot) const {
    return data.get() + (slot < routed ? slot * routed_steps : base_of_shared() + slot * shared_steps) * kStepBytes;
  }
  // What DotBlock::x of a group is: as if slot 0 had the group's depth.
  const char* base(int64_t slot) const { return data.get() + (slot < routed ? 0 : base_of_shared()) * kStepBytes; }

 private:
  int64_t base_of_shared() const { return routed * (routed_steps - shared_steps); }
};

void pack_tokens(const Experts& a, const Slots& slots, const Tiles& tiles, const DotKernels& kernels, const Packed& x,
                 const ParallelFor& parallel) {
  const int64_t bytes = a.hidden * 2;
  parallel(tiles.count(), 1 + (1 << 16) / (bytes * kernels.tile), [&](int64_t begin, int64_t end) {
    std::vector<const char*> token(kernels.tile);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t slot = tiles.begin[i], width = tiles.begin[i + 1] - slot;
      for (int64_t t = 0; t < width; ++t)
        token[t] = static_cast<const char*>(a.x) + slots.token[slot + t] * bytes;
      kernels.pack(token.data(), width, bytes, x.at(slot));
    }
  });
}

// h = silu(gate x) * (up x) of every slot. A task is kDotRows hidden values of an expert for some of its tiles.
void up_projection(const Experts& a, const Slots& slots, const Tiles& tiles, const DotKernels& kernels, const Packed& x,
                   const Packed& h, const ParallelFor& parallel) {
  struct Task {
    const Group* group;
    int64_t row, tile, n_tiles;
  };
  constexpr int64_t kSums = 2 * kDotRows;  // gate, up
  std::vector<Task> tasks;
  int64_t cost = 0, most = 0;
  for (size_t g = 0; g < slots.groups.size(); ++g) {
    const Group& group = slots.groups[g];
    cost += group.count * group.intermediate * a.hidden * 2;
    const int64_t first = tiles.first[g * tiles.chunks], n = tiles.first[(g + 1) * tiles.chunks] - first;
    const int64_t parts = ceil_div(group.count, kUpTokens);
    for (int64_t row = 0; row < group.intermediate; row += kDotRows)
      for (int64_t p = 0; p < parts; ++p) {
        const int64_t begin = first + n * p / parts, end = first + n * (p + 1) / parts;
        if (begin == end) continue;
        tasks.push_back({&group, row, begin, end - begin});
        most = std::max(most, tiles.begin[end] - tiles.begin[begin]);
      }
  }

  struct Worker {
    const Experts& a;
    const Tiles& tiles;
    const DotKernels& kernels;
    const Packed &x, &h;
    const std::vector<Task>& tasks;
    Buffer<float> sums;
    Buffer<char> panel = uninitialized<char>(kDotRows * panel_stride(a.hidden));

    void plan(int64_t index, std::vector<DotBlock>& blocks) {
      const Task& task = tasks[index];
      const Group& group = *task.group;
      DotBlock block{};
      block.stride = a.hidden * 2;
      block.rows = std::min(kDotRows, group.intermediate - task.row);
      block.depth = a.hidden;
      block.tiles = tiles.begin.data() + task.tile;
      block.n_tiles = task.n_tiles;
      block.x = x.base(group.begin);
      block.panel = panel.get();
      block.out_stride = kSums;
      for (int half = 0; half < 2; ++half) {
        block.weight = static_cast<const char*>(group.w13) + (half * group.intermediate + task.row) * block.stride;
        block.out = sums.get() + half * kDotRows;
        blocks.push_back(block);
      }
    }
    void multiply(const DotBlock& block, const DotBlock& next) { kernels.up(block, next); }
    void finish(int64_t index) {
      const Task& task = tasks[index];
      const int64_t* begin = tiles.begin.data() + task.tile;
      for (int64_t i = 0; i < task.n_tiles; ++i)
        kernels.hidden(sums.get() + (begin[i] - begin[0]) * kSums, kSums,
                       std::min(kDotRows, task.group->intermediate - task.row), begin[i + 1] - begin[i],
                       task.row / kDotRows, h.at(begin[i]));
    }
  };
  run_tasks<DotBlock>(tasks.size(), cost / std::max<int64_t>(tasks.size(), 1), parallel,
                      [&] { return Worker{a, tiles, kernels, x, h, tasks, uninitialized<float>(most * kSums)}; });
}

// y = sum over slots of scale * (w2 h). A task is some rows of every expert for a chunk of tokens, so it adds up in the
// order of the experts, whatever the other tokens are.
void down_projection(const Experts& a, const Slots& slots, const Tiles& tiles, const DotKernels& kernels, const Packed& h,
                     const ParallelFor& parallel) {
  const int64_t fit = kSumsBytes / (tiles.chunk * kernels.lanes * 4) / 8 * 8;
  const int64_t rows = std::clamp<int64_t>(fit, 8, kDotRows), row_tasks = ceil_div(a.hidden, rows);
  std::vector<int32_t> token(slots.token.size());  // within its chunk
  for (size_t slot = 0; slot < token.size(); ++slot) token[slot] = slots.token[slot] % tiles.chunk;
  int64_t cost = 0;
  for (const Group& group : slots.groups) cost += group.count * group.intermediate * rows;

  struct Worker {
    const Experts& a;
    const Slots& slots;
    const Tiles& tiles;
    const DotKernels& kernels;
    const Packed& h;
    const std::vector<int32_t>& token;
    int64_t rows, row_tasks;
    std::vector<float> sums = std::vector<float>(rows * tiles.chunk * kernels.lanes, 0.f);
    Buffer<char> panel =
        uninitialized<char>(kDotRows * panel_stride(std::max(a.intermediate, a.shared_intermediate)));

    int64_t tokens(int64_t task) const { return std::min(tiles.chunk, a.tokens - task / row_tasks * tiles.chunk); }
    void plan(int64_t task, std::vector<DotBlock>& blocks) {
      const int64_t row = task % row_tasks * rows, chunk = task / row_tasks;
      for (size_t g = 0; g < slots.groups.size(); ++g) {
        const Group& group = slots.groups[g];
        const int64_t first = tiles.first[g * tiles.chunks + chunk], end = tiles.first[g * tiles.chunks + chunk + 1];
        if (first == end) continue;
        DotBlock block{};
        block.stride = group.intermediate * 2;
        block.weight = static_cast<const char*>(group.w2) + row * block.stride;
        block.rows = std::min(rows, a.hidden - row);
        block.depth = group.intermediate;
        block.tiles = tiles.begin.data() + first;
        block.n_tiles = end - first;
        block.x = h.base(group.begin);
        block.panel = panel.get();
        block.sums = sums.data();
        block.tokens = tokens(task);
        block.token = token.data();
        block.scale = slots.scale.data();
        blocks.push_back(block);
      }
    }
    void multiply(const DotBlock& block, const DotBlock& next) { kernels.down(block, next); }
    void finish(int64_t task) {
      const int64_t row = task % row_tasks * rows, begin = task / row_tasks * tiles.chunk;
      kernels.finish(sums.data(), std::min(rows, a.hidden - row), tokens(task),
                     static_cast<uint16_t*>(a.y) + begin * a.hidden + row, a.hidden);
    }
  };
  run_tasks<DotBlock>(row_tasks * tiles.chunks, cost / tiles.chunks, parallel,
                      [&] { return Worker{a, slots, tiles, kernels, h, token, rows, row_tasks}; });
}

}  // namespace

const DotKernels* dot_kernels() {
#ifdef __x86_64__
  if (isa() >= Isa::avx512_bf16) return &kDotAvx512;
#endif
  return nullptr;
}

void dot_forward(const Experts& args, const Slots& slots, const DotKernels& kernels, const ParallelFor& parallel) {
  const Tiles tiles(slots, args.tokens, kernels.tile);
  const Packed x(slots, args.hidden, args.hidden), h(slots, args.intermediate, args.shared_intermediate);
  pack_tokens(args, slots, tiles, kernels, x, parallel);
  up_projection(args, slots, tiles, kernels, x, h, parallel);
  down_projection(args, slots, tiles, kernels, h, parallel);
}

}  // namespace dmoe::cpu
