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
constexpr int64_t kUpTokens = 96;      // of a task of up: with the weights of its rows, their activations stay in L2
constexpr int64_t kChunkTokens = 512;  // of a task of down: its sums stay in L2
constexpr int64_t kDownRows = 64;      // of a task of down

// UNMEASURED: tokens of an expert from which its weights go through AMX. A product of tiles takes 16 cycles whatever the
// number of its tokens, and the same weights take vdpbf16ps 16 for each; memory brings them in 50 and more, so one token is
// enough. More than 1 would let a token's bits depend on how many others chose its expert.
constexpr int64_t kAmxTokens = 1;

// The kernels of a group: those given, or AMX where the CPU has it and the weights are no other numbers than it multiplies.
const DotKernels* kernels_of(const Group& group, const DotKernels& kernels) {
#if defined(__x86_64__) || defined(DMOE_EMULATE)
  const Format format = group.w13.weight.format;
  const bool as_is = format == Format::plain || format == Format::int8;
  if (isa() >= Isa::amx && as_is && group.count >= kAmxTokens) return &kDotAmx;
#endif
  return &kernels;
}

// The slots of every group cut into tiles that do not cross a chunk of tokens.
struct Tiles {
  int64_t chunk, chunks;                   // tokens of a chunk
  std::vector<int64_t> begin;              // the first slot of every tile, and the end
  std::vector<int64_t> first;              // first[group * chunks + chunk]: its first tile, and the end
  std::vector<const DotKernels*> kernels;  // of every tile

  Tiles(const Slots& slots, int64_t tokens, const DotKernels& vectors)
      : chunk(std::min(tokens, kChunkTokens)), chunks(ceil_div(tokens, chunk)) {
    for (const Group& group : slots.groups) {
      const DotKernels* own = kernels_of(group, vectors);
      int64_t slot = group.begin;
      for (int64_t c = 0; c < chunks; ++c) {
        first.push_back(begin.size());
        const int64_t from = slot;
        while (slot < group.begin + group.count && slots.token[slot] < (c + 1) * chunk) ++slot;
        const int64_t count = slot - from, tiles = ceil_div(count, own->tile);
        for (int64_t i = 0; i < tiles; ++i) begin.push_back(from + (own->even ? count * i / tiles : own->tile * i));
        kernels.resize(begin.size(), own);
      }
    }
    first.push_back(begin.size());
    begin.push_back(slots.token.size());
  }
  int64_t count() const { return begin.size() - 1; }
};

// Packed activations, one area per depth: the routed slots and those of the shared expert differ in h.
struct Packed {
  int64_t routed, routed_bytes, shared_bytes;
  Buffer<char> data;

  Packed(const Slots& slots, int64_t routed_bytes, int64_t shared_bytes)
      : routed(slots.routed),
        routed_bytes(routed_bytes),
        shared_bytes(shared_bytes),
        data(uninitialized<char>(routed * routed_bytes + (slots.token.size() - routed) * shared_bytes)) {}
  char* at(int64_t slot) const {
    return data.get() + (slot < routed ? slot * routed_bytes : base_of_shared() + slot * shared_bytes);
  }
  // What DotBlock::x of a group is: as if slot 0 had the group's depth.
  const char* base(int64_t slot) const { return data.get() + (slot < routed ? 0 : base_of_shared()); }

 private:
  int64_t base_of_shared() const { return routed * (routed_bytes - shared_bytes); }
};

// Scales and sums of rows that were rounded to integers.
struct Rounding {
  std::vector<float> scale;
  std::vector<int32_t> sum;

  explicit Rounding(int64_t rows) : scale(rows), sum(2 * rows) {}
};

// What the two projections of a call share.
struct Call {
  const Experts& a;
  const Slots& slots;
  const DotKernels& kernels;
  const ParallelFor& parallel;
  Tiles tiles;
  Parts routed_parts, shared_parts;
  Packed x, h;
  Rounding x_rounding, h_rounding;  // of every slot

  Call(const Experts& a, const Slots& slots, const DotKernels& kernels, const ParallelFor& parallel)
      : a(a),
        slots(slots),
        kernels(kernels),
        parallel(parallel),
        tiles(slots, a.tokens, kernels),
        routed_parts(parts_for(a.w13)),
        shared_parts(parts_for(a.shared_w13)),
        x(slots, packed_bytes(a.hidden, routed_parts), packed_bytes(a.hidden, shared_parts)),
        h(slots, packed_bytes(a.intermediate, routed_parts), packed_bytes(a.shared_intermediate, shared_parts)),
        x_rounding(integers() ? slots.token.size() : 0),
        h_rounding(integers() ? slots.token.size() : 0) {}
  Parts parts_for(const Weight& weight) const {
    if (weight.format != Format::int8) return Parts::bf16;
    return a.quantize_activations ? Parts::int8 : Parts::int16;
  }
  Parts parts(int64_t slot) const { return slot < slots.routed ? routed_parts : shared_parts; }
  bool integers() const { return routed_parts != Parts::bf16 || shared_parts != Parts::bf16; }
};

// pack_tile(kernels, slot, width) for every tile.
template <class PackTile>
void each_tile(const Call& call, int64_t bytes, const PackTile& pack_tile) {
  const auto& begin_of = call.tiles.begin;
  call.parallel(call.tiles.count(), 1 + (1 << 16) / (bytes * call.kernels.tile), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pack_tile(*call.tiles.kernels[i], begin_of[i], begin_of[i + 1] - begin_of[i]);
  });
}

// Packs a tile of integers, q_of(t) being token t's rows of `depth` numbers, one for each part.
template <class RowOf>
void pack_integers(const DotKernels& kernels, int64_t width, int64_t depth, Parts parts, const RowOf& q_of, char* to) {
  const char* line[2 * kMostTile];
  const int64_t lines = lines_of(parts);
  for (int64_t t = 0; t < width; ++t)
    for (int64_t p = 0; p < lines; ++p) line[t * lines + p] = reinterpret_cast<const char*>(q_of(t)) + p * depth;
  kernels.pack(line, width * lines, depth, to);
}

void pack_tokens(Call& call) {
  const Experts& a = call.a;
  const Parts integers = call.routed_parts != Parts::bf16 ? call.routed_parts : call.shared_parts;
  const int64_t row = a.hidden * lines_of(integers);
  const Buffer<int8_t> q = uninitialized<int8_t>(call.integers() ? a.tokens * row : 0);
  Rounding rounding(call.integers() ? a.tokens : 0);
  call.parallel(rounding.scale.size(), 1 + (1 << 14) / a.hidden, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      call.kernels.quantize(at(a.x, a.dtype, t * a.hidden), a.dtype, a.hidden, integers, q.get() + t * row,
                            &rounding.scale[t], &rounding.sum[2 * t]);
  });
  each_tile(call, a.hidden * 2, [&](const DotKernels& kernels, int64_t slot, int64_t width) {
    const int64_t* token = call.slots.token.data() + slot;
    const Parts parts = call.parts(slot);
    if (parts == Parts::bf16) {
      const char* line[kMostTile];
      for (int64_t t = 0; t < width; ++t) line[t] = static_cast<const char*>(at(a.x, a.dtype, token[t] * a.hidden));
      return kernels.pack(line, width, a.hidden * 2, call.x.at(slot));
    }
    for (int64_t t = 0; t < width; ++t) {
      call.x_rounding.scale[slot + t] = rounding.scale[token[t]];
      std::copy_n(&rounding.sum[2 * token[t]], 2, &call.x_rounding.sum[2 * (slot + t)]);
    }
    pack_integers(
        kernels, width, a.hidden, parts, [&](int64_t t) { return q.get() + token[t] * row; }, call.x.at(slot));
  });
}

// Hidden values that are rounded to integers: in fp32 first, as a row has one scale.
void pack_hidden(Call& call, const float* h, int64_t h_stride) {
  each_tile(call, h_stride * 4, [&](const DotKernels& kernels, int64_t slot, int64_t width) {
    const Parts parts = call.parts(slot);
    if (parts == Parts::bf16) return;
    const int64_t depth = slot < call.slots.routed ? call.a.intermediate : call.a.shared_intermediate;
    const int64_t row = depth * lines_of(parts);
    std::vector<int8_t> q(width * row);
    for (int64_t t = slot; t < slot + width; ++t)
      call.kernels.quantize(h + t * h_stride, Dtype::f32, depth, parts, q.data() + (t - slot) * row,
                            &call.h_rounding.scale[t], &call.h_rounding.sum[2 * t]);
    pack_integers(kernels, width, depth, parts, [&](int64_t t) { return q.data() + t * row; }, call.h.at(slot));
  });
}

// h = activation(gate x) * (up x) of every slot. A task is kUpRows hidden values of an expert for some of its tiles.
// Those that are to be rounded to integers stay fp32, in h_f32 [slots, h_stride].
void up_projection(const Call& call, float* h_f32, int64_t h_stride) {
  const Experts& a = call.a;
  const Slots& slots = call.slots;
  const Tiles& tiles = call.tiles;
  struct Task {
    const Group* group;
    int64_t row, tile, n_tiles;
  };
  constexpr int64_t kSums = 2 * kUpRows;  // gate, up
  std::vector<Task> tasks;
  int64_t cost = 0, most = 0;
  for (size_t g = 0; g < slots.groups.size(); ++g) {
    const Group& group = slots.groups[g];
    cost += group.count * group.intermediate * a.hidden * 2;
    const int64_t first = tiles.first[g * tiles.chunks], n = tiles.first[(g + 1) * tiles.chunks] - first;
    const int64_t parts = ceil_div(group.count, kUpTokens);
    for (int64_t row = 0; row < group.intermediate; row += kUpRows)
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
    Buffer<char> tables = uninitialized<char>(table_bytes(call.a.hidden));

    void plan(int64_t index, std::vector<DotBlock>& blocks) {
      const Task& task = tasks[index];
      const Group& group = *task.group;
      DotBlock block{};
      block.kernels = call.tiles.kernels[task.tile];
      block.matrix = &group.w13;
      block.rows = std::min(kUpRows, group.intermediate - task.row);
      block.parts = call.parts(group.begin);
      block.tiles = call.tiles.begin.data() + task.tile;
      block.n_tiles = task.n_tiles;
      block.x = call.x.base(group.begin);
      block.x_scale = call.x_rounding.scale.data();
      block.x_sum = call.x_rounding.sum.data();
      block.panel = panel.get();
      block.tables = tables.get();
      block.out_stride = kSums;
      for (int half = 0; half < 2; ++half) {
        block.row = half * group.intermediate + task.row;
        block.out = sums.get() + half * kUpRows;
        blocks.push_back(block);
      }
    }
    void multiply(const DotBlock& block, const DotBlock& next) { block.kernels->up(block, next); }
    void finish(int64_t index) {
      const Task& task = tasks[index];
      const int64_t* begin = call.tiles.begin.data() + task.tile;
      const int64_t rows = std::min(kUpRows, task.group->intermediate - task.row);
      for (int64_t i = 0; i < task.n_tiles; ++i) {
        const float* from = sums.get() + (begin[i] - begin[0]) * kSums;
        const int64_t width = begin[i + 1] - begin[i];
        if (call.parts(begin[i]) != Parts::bf16) {
          call.kernels.hidden_f32(call.a.activation, from, kSums, rows, width, h_f32 + begin[i] * h_stride + task.row,
                                  h_stride);
        } else {
          call.tiles.kernels[task.tile + i]->hidden(call.a.activation, from, kSums, rows, width, task.row / kUpRows,
                                                    call.h.at(begin[i]));
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
  const int64_t row_tasks = ceil_div(a.hidden, kDownRows);
  std::vector<int32_t> token(slots.token.size());  // within its chunk
  for (size_t slot = 0; slot < token.size(); ++slot) token[slot] = slots.token[slot] % tiles.chunk;
  int64_t cost = 0;
  for (const Group& group : slots.groups) cost += group.count * group.intermediate * kDownRows;

  struct Worker {
    const Call& call;
    const Experts& a;
    const Tiles& tiles;
    const std::vector<int32_t>& token;
    int64_t row_tasks;
    std::vector<float> sums = std::vector<float>(tiles.chunk * kDownRows, 0.f);
    int64_t depth = std::max(a.intermediate, a.shared_intermediate);
    Buffer<char> panel = uninitialized<char>(kPanelRows * panel_stride(depth));
    Buffer<char> tables = uninitialized<char>(table_bytes(depth));

    struct Part {
      int64_t token, tokens, row, rows;  // of y
    };
    Part part_of(int64_t task) const {
      const int64_t token = task / row_tasks * tiles.chunk, row = task % row_tasks * kDownRows;
      return {token, std::min(tiles.chunk, a.tokens - token), row, std::min(kDownRows, a.hidden - row)};
    }

    void plan(int64_t task, std::vector<DotBlock>& blocks) {
      const int64_t chunk = task / row_tasks;
      const Part part = part_of(task);
      for (size_t g = 0; g < call.slots.groups.size(); ++g) {
        const Group& group = call.slots.groups[g];
        const int64_t first = tiles.first[g * tiles.chunks + chunk], end = tiles.first[g * tiles.chunks + chunk + 1];
        if (first == end) continue;
        DotBlock block{};
        block.kernels = tiles.kernels[first];
        block.matrix = &group.w2;
        block.row = part.row;
        block.rows = part.rows;
        block.parts = call.parts(group.begin);
        block.tiles = tiles.begin.data() + first;
        block.n_tiles = end - first;
        block.x = call.h.base(group.begin);
        block.x_scale = call.h_rounding.scale.data();
        block.x_sum = call.h_rounding.sum.data();
        block.panel = panel.get();
        block.tables = tables.get();
        block.out = sums.data();
        block.out_stride = kDownRows;
        block.token = token.data();
        block.scale = call.slots.scale.data();
        blocks.push_back(block);
      }
    }
    void multiply(const DotBlock& block, const DotBlock& next) { block.kernels->down(block, next); }
    void start(int64_t task) {
      const Part part = part_of(task);
      for (int64_t t = 0; t < part.tokens; ++t)
        first_sums(a, part.token + t, part.row, part.rows, sums.data() + t * kDownRows);
    }
    void finish(int64_t task) {
      const Part part = part_of(task);
      for (int64_t t = 0; t < part.tokens; ++t) {
        const float* from = sums.data() + t * kDownRows;
        const int64_t to = (part.token + t) * a.hidden + part.row;
        if (a.last_wave()) {
          call.kernels.narrow(from, part.rows, static_cast<uint16_t*>(a.y) + to);
        } else {
          std::copy_n(from, part.rows, a.carry + to);
        }
      }
    }
  };
  run_tasks<DotBlock>(row_tasks * tiles.chunks, cost / tiles.chunks, call.parallel,
                      [&] { return Worker{call, a, tiles, token, row_tasks}; });
}

}  // namespace

const DotKernels* dot_kernels() {
#if defined(__x86_64__) || defined(DMOE_EMULATE)
  if (isa() >= Isa::avx512_bf16) return &kDotAvx512;
#endif
  return nullptr;
}

void dot_forward(const Experts& args, const Slots& slots, const DotKernels& kernels, const ParallelFor& parallel) {
  Call call(args, slots, kernels, parallel);
  pack_tokens(call);
  const int64_t h_stride = std::max(call.routed_parts != Parts::bf16 ? args.intermediate : 0,
                                    call.shared_parts != Parts::bf16 ? args.shared_intermediate : 0);
  const Buffer<float> h_f32 = uninitialized<float>(slots.token.size() * h_stride);
  up_projection(call, h_f32.get(), h_stride);
  if (h_stride) pack_hidden(call, h_f32.get(), h_stride);
  down_projection(call);
}

}  // namespace dmoe::cpu
