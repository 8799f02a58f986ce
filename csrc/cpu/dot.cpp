#include "dot.h"

#include <algorithm>
#include <vector>

#include "dot_kernels.h"
#include "isa.h"
#include "matrix.h"
#include "work.h"

namespace dmoe::cpu {
namespace {

// Tuned on 2 cores of AMD Zen 4 (1 MiB of L2 each); `dmoe bench layer --device cpu --tokens 32` and
// `dmoe bench experts --device cpu --tokens 128,512` repeat it.
constexpr int64_t kMostTile = 16;
constexpr int64_t kUpTokens = 96;       // of a task of up: with the weights of its rows, their activations stay in L2
constexpr int64_t kChunkTokens = 512;   // of a task of down: its sums stay in L2
constexpr int64_t kSumsBytes = 1 << 18;  // of a task of down

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

  Packed(const Slots& slots, int64_t routed_steps, int64_t shared_steps)
      : routed(slots.routed),
        routed_steps(routed_steps),
        shared_steps(shared_steps),
        data(uninitialized<char>((routed * routed_steps + (slots.token.size() - routed) * shared_steps) * kStepBytes)) {}
  char* at(int64_t slot) const {
    return data.get() + (slot < routed ? slot * routed_steps : base_of_shared() + slot * shared_steps) * kStepBytes;
  }
  // What DotBlock::x of a group is: as if slot 0 had the group's depth.
  const char* base(int64_t slot) const { return data.get() + (slot < routed ? 0 : base_of_shared()) * kStepBytes; }

 private:
  int64_t base_of_shared() const { return routed * (routed_steps - shared_steps); }
};

// Rows rounded to int8, with their scales and sums.
struct Rounded {
  int64_t depth;
  Buffer<int8_t> q;
  std::vector<float> scale;
  std::vector<int32_t> sum;

  Rounded(int64_t rows, int64_t depth)
      : depth(depth), q(uninitialized<int8_t>(rows * depth)), scale(rows), sum(rows) {}
  void fill(const DotKernels& kernels, const void* x, Dtype dtype, const ParallelFor& parallel) {
    parallel(scale.size(), 1 + (1 << 14) / depth, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        kernels.quantize(dmoe::cpu::at(x, dtype, i * depth), dtype, depth, q.get() + i * depth, &scale[i], &sum[i]);
    });
  }
};

// What the two projections of a call share.
struct Call {
  const Experts& a;
  const Slots& slots;
  const DotKernels& kernels;
  const ParallelFor& parallel;
  Tiles tiles;
  bool routed_int8, shared_int8;  // whether activations are rounded to int8
  Packed x, h;
  std::vector<float> x_scale, h_scale;  // of every slot whose activations are int8
  std::vector<int32_t> x_sum, h_sum;

  Call(const Experts& a, const Slots& slots, const DotKernels& kernels, const ParallelFor& parallel)
      : a(a),
        slots(slots),
        kernels(kernels),
        parallel(parallel),
        tiles(slots, a.tokens, kernels.tile),
        routed_int8(a.quantize_activations && a.w13.format == Format::int8),
        shared_int8(a.quantize_activations && a.shared_w13.format == Format::int8),
        x(slots, steps_of(a.hidden, routed_int8), steps_of(a.hidden, shared_int8)),
        h(slots, steps_of(a.intermediate, routed_int8), steps_of(a.shared_intermediate, shared_int8)) {
    if (!routed_int8 && !shared_int8) return;
    for (auto* scale : {&x_scale, &h_scale}) scale->resize(slots.token.size());
    for (auto* sum : {&x_sum, &h_sum}) sum->resize(slots.token.size());
  }
  bool int8(int64_t slot) const { return slot < slots.routed ? routed_int8 : shared_int8; }
};

// pack_tile(i, slot, width) for every tile.
template <class PackTile>
void each_tile(const Call& call, int64_t bytes, const PackTile& pack_tile) {
  const auto& begin_of = call.tiles.begin;
  call.parallel(call.tiles.count(), 1 + (1 << 16) / (bytes * call.kernels.tile), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pack_tile(begin_of[i], begin_of[i + 1] - begin_of[i]);
  });
}

void pack_tokens(Call& call) {
  const Experts& a = call.a;
  const bool some_int8 = call.routed_int8 || call.shared_int8;
  Rounded rounded(some_int8 ? a.tokens : 0, a.hidden);
  if (some_int8) rounded.fill(call.kernels, a.x, a.dtype, call.parallel);
  each_tile(call, a.hidden * 2, [&](int64_t slot, int64_t width) {
    const char* token[kMostTile];
    const bool int8 = call.int8(slot);
    for (int64_t t = 0; t < width; ++t) {
      const int64_t row = call.slots.token[slot + t];
      token[t] = int8 ? reinterpret_cast<const char*>(rounded.q.get()) + row * a.hidden
                      : static_cast<const char*>(a.x) + row * a.hidden * 2;
      if (int8) call.x_scale[slot + t] = rounded.scale[row], call.x_sum[slot + t] = rounded.sum[row];
    }
    call.kernels.pack(token, width, a.hidden * (int8 ? 1 : 2), call.x.at(slot));
  });
}

// Hidden values that are rounded to int8: in fp32 first, as a row has one scale.
void pack_hidden(Call& call, const float* h, int64_t h_stride) {
  const auto part = [&](int64_t first, int64_t count, int64_t depth) {
    each_tile(call, depth * 4, [&](int64_t slot, int64_t width) {
      if (slot < first || slot >= first + count) return;
      std::vector<int8_t> q(width * depth);
      const char* token[kMostTile];
      for (int64_t t = 0; t < width; ++t) {
        int8_t* row = q.data() + t * depth;
        call.kernels.quantize(h + (slot + t) * h_stride, Dtype::f32, depth, row, &call.h_scale[slot + t],
                              &call.h_sum[slot + t]);
        token[t] = reinterpret_cast<const char*>(row);
      }
      call.kernels.pack(token, width, depth, call.h.at(slot));
    });
  };
  const int64_t routed = call.slots.routed;
  if (call.routed_int8) part(0, routed, call.a.intermediate);
  if (call.shared_int8) part(routed, call.slots.token.size() - routed, call.a.shared_intermediate);
}

// h = silu(gate x) * (up x) of every slot. A task is kDotRows hidden values of an expert for some of its tiles.
// Where activations are rounded to int8, h_f32 [slots, h_stride] takes them.
void up_projection(const Call& call, float* h_f32, int64_t h_stride) {
  const Experts& a = call.a;
  const Slots& slots = call.slots;
  const Tiles& tiles = call.tiles;
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
    const Call& call;
    const std::vector<Task>& tasks;
    float* h_f32;
    int64_t h_stride;
    Buffer<float> sums;
    Buffer<char> panel = uninitialized<char>(kPanelRows * panel_stride(call.a.hidden));

    void plan(int64_t index, std::vector<DotBlock>& blocks) {
      const Task& task = tasks[index];
      const Group& group = *task.group;
      DotBlock block{};
      block.matrix = &group.w13;
      block.rows = std::min(kDotRows, group.intermediate - task.row);
      block.int8 = call.int8(group.begin);
      block.tiles = call.tiles.begin.data() + task.tile;
      block.n_tiles = task.n_tiles;
      block.x = call.x.base(group.begin);
      block.x_scale = call.x_scale.data();
      block.x_sum = call.x_sum.data();
      block.panel = panel.get();
      block.out_stride = kSums;
      for (int half = 0; half < 2; ++half) {
        block.row = half * group.intermediate + task.row;
        block.out = sums.get() + half * kDotRows;
        blocks.push_back(block);
      }
    }
    void multiply(const DotBlock& block, const DotBlock& next) { call.kernels.up(block, next); }
    void finish(int64_t index) {
      const Task& task = tasks[index];
      const int64_t* begin = call.tiles.begin.data() + task.tile;
      const int64_t rows = std::min(kDotRows, task.group->intermediate - task.row);
      for (int64_t i = 0; i < task.n_tiles; ++i) {
        const float* from = sums.get() + (begin[i] - begin[0]) * kSums;
        const int64_t width = begin[i + 1] - begin[i];
        if (call.int8(begin[i])) {
          call.kernels.hidden_f32(from, kSums, rows, width, h_f32 + begin[i] * h_stride + task.row, h_stride);
        } else {
          call.kernels.hidden(from, kSums, rows, width, task.row / kDotRows, call.h.at(begin[i]));
        }
      }
    }
  };
  run_tasks<DotBlock>(tasks.size(), cost / std::max<int64_t>(tasks.size(), 1), call.parallel,
                      [&] { return Worker{call, tasks, h_f32, h_stride, uninitialized<float>(most * kSums)}; });
}

// y = sum over slots of scale * (w2 h). A task is some rows of every expert for a chunk of tokens, so it adds up in the
// order of the experts, whatever the other tokens are.
void down_projection(const Call& call) {
  const Experts& a = call.a;
  const Slots& slots = call.slots;
  const Tiles& tiles = call.tiles;
  const int64_t fit = kSumsBytes / (tiles.chunk * call.kernels.lanes * 4) / 8 * 8;
  const int64_t rows = std::clamp<int64_t>(fit, 8, kDotRows), row_tasks = ceil_div(a.hidden, rows);
  std::vector<int32_t> token(slots.token.size());  // within its chunk
  for (size_t slot = 0; slot < token.size(); ++slot) token[slot] = slots.token[slot] % tiles.chunk;
  int64_t cost = 0;
  for (const Group& group : slots.groups) cost += group.count * group.intermediate * rows;

  struct Worker {
    const Call& call;
    const Experts& a;
    const Tiles& tiles;
    const std::vector<int32_t>& token;
    int64_t rows, row_tasks;
    std::vector<float> sums = std::vector<float>(rows * tiles.chunk * call.kernels.lanes, 0.f);
    Buffer<char> panel =
        uninitialized<char>(kPanelRows * panel_stride(std::max(a.intermediate, a.shared_intermediate)));

    int64_t tokens(int64_t task) const { return std::min(tiles.chunk, a.tokens - task / row_tasks * tiles.chunk); }
    void plan(int64_t task, std::vector<DotBlock>& blocks) {
      const int64_t row = task % row_tasks * rows, chunk = task / row_tasks;
      for (size_t g = 0; g < call.slots.groups.size(); ++g) {
        const Group& group = call.slots.groups[g];
        const int64_t first = tiles.first[g * tiles.chunks + chunk], end = tiles.first[g * tiles.chunks + chunk + 1];
        if (first == end) continue;
        DotBlock block{};
        block.matrix = &group.w2;
        block.row = row;
        block.rows = std::min(rows, a.hidden - row);
        block.int8 = call.int8(group.begin);
        block.tiles = tiles.begin.data() + first;
        block.n_tiles = end - first;
        block.x = call.h.base(group.begin);
        block.x_scale = call.h_scale.data();
        block.x_sum = call.h_sum.data();
        block.panel = panel.get();
        block.sums = sums.data();
        block.tokens = tokens(task);
        block.token = token.data();
        block.scale = call.slots.scale.data();
        blocks.push_back(block);
      }
    }
    void multiply(const DotBlock& block, const DotBlock& next) { call.kernels.down(block, next); }
    void finish(int64_t task) {
      const int64_t row = task % row_tasks * rows, begin = task / row_tasks * tiles.chunk;
      call.kernels.finish(sums.data(), std::min(rows, a.hidden - row), tokens(task),
                     static_cast<uint16_t*>(a.y) + begin * a.hidden + row, a.hidden);
    }
  };
  run_tasks<DotBlock>(row_tasks * tiles.chunks, cost / tiles.chunks, call.parallel,
                      [&] { return Worker{call, a, tiles, token, rows, row_tasks}; });
}

}  // namespace

const DotKernels* dot_kernels() {
#ifdef __x86_64__
  if (isa() >= Isa::avx512_bf16) return &kDotAvx512;
#endif
  return nullptr;
}

void dot_forward(const Experts& args, const Slots& slots, const DotKernels& kernels, const ParallelFor& parallel) {
  Call call(args, slots, kernels, parallel);
  pack_tokens(call);
  const int64_t h_stride = std::max(call.routed_int8 ? args.intermediate : 0, call.shared_int8 ? args.shared_intermediate : 0);
  const Buffer<float> h_f32 = uninitialized<float>(slots.token.size() * h_stride);
  up_projection(call, h_f32.get(), h_stride);
  if (h_stride) pack_hidden(call, h_f32.get(), h_stride);
  down_projection(call);
}

}  // namespace dmoe::cpu
