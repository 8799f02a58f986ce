#include "widen.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "isa.h"
#include "widen_kernels.h"
#include "work.h"

namespace dmoe::cpu {

const WidenKernels& widen_kernels() {
#ifdef __x86_64__
  if (isa() >= Isa::avx512) return kWidenAvx512;
  if (isa() >= Isa::avx2) return kWidenAvx2;
#endif
  return kWidenPlain;
}

namespace {

// What one task takes, tuned on 2 cores of AMD Zen 3; `dmoe bench layer --device cpu --tokens 32` repeats it.
constexpr int64_t kChunk = 96;       // tokens at most: over kBlockDepth their activations stay in L2
constexpr int64_t kUpRows = 64;      // rows of gate, and as many of up
constexpr int64_t kLinearRows = 16;  // rows of linear_f32: a router has few

// What a worker multiplies: a block of the kernels. Where `matrix` is set it is unpacked to fp32 first.
struct Piece : Block {
  const Matrix* matrix = nullptr;
  int64_t row = 0;
};

// Appends rows [first, last) of a matrix, in blocks. `unpack`: whatever its format, it is multiplied as fp32.
void append_blocks(Block block, const Matrix& matrix, bool unpack, int64_t first, int64_t last,
                   std::vector<Piece>& pieces) {
  const bool few = block.count <= kFewTokens;
  float* out = block.out;
  block.dtype = unpack ? Dtype::f32 : matrix.dtype;
  block.stride = matrix.depth;
  for (block.begin = 0; block.begin < matrix.depth; block.begin = block.end) {
    block.end = few ? matrix.depth : std::min(block.begin + kBlockDepth, matrix.depth);
    for (int64_t row = first; row < last; row += kBlockRows) {
      block.weight = matrix.row(row);
      block.rows = std::min(kBlockRows, last - row);
      block.out = out + (row - first);
      pieces.push_back({block, unpack ? &matrix : nullptr, row});
    }
  }
}

// Multiplies pieces, one after the other.
struct Multiplier {
  Buffer<float> scratch;

  explicit Multiplier(int64_t depth = 0) : scratch(uninitialized<float>(kBlockRows * depth)) {}
  void operator()(const Piece& piece, const Piece& next) {
    if (!piece.matrix) return widen_kernels().multiply(piece, next.matrix ? Block{} : static_cast<const Block&>(next));
    Block block = piece;
    for (int64_t r = 0; r < block.rows; ++r)
      dequantize(*piece.matrix, piece.row + r, block.begin, block.end, scratch.get() + r * block.stride + block.begin);
    block.weight = scratch.get();
    widen_kernels().multiply(block, {});
  }
};

struct Activations {
  int64_t stride;
  Buffer<float> data;
  const float* row(int64_t t) const { return data.get() + t * stride; }
};

Activations widen(const void* x, Dtype dtype, int64_t tokens, int64_t hidden, Dtype weight,
                  const ParallelFor& parallel) {
  // Rows a multiple of 4 KiB apart would all fall into the same few sets of L1.
  const int64_t stride = padded(hidden) + (padded(hidden) % 1024 ? 0 : kBlockDepth);
  Activations wide{stride, uninitialized<float>(tokens * stride)};
  parallel(tokens, 1 + (1 << 14) / hidden, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      widen_kernels().widen(at(x, dtype, t * hidden), dtype, hidden, weight, wide.data.get() + t * stride);
  });
  return wide;
}

// Against int8 weights x may be rounded to int8 too.
struct Inputs {
  Activations x, rounded;
  const Activations& of(const Group& group) const {
    return rounded.data && group.w13.weight.format == Format::int8 ? rounded : x;
  }
};

// Each number becomes round(number / scale) * scale, scale = max / 127. A NaN stays one, and infinity makes all of them NaN:
// either way every product with the row is NaN.
void round_to_int8(float* row, int64_t n) {
  float most = 0.f;
  for (int64_t i = 0; i < n; ++i) most = std::max(most, std::fabs(row[i]));
  const float scale = most / 127 == 0 ? 1.f : most / 127;
  for (int64_t i = 0; i < n; ++i) row[i] = std::clamp(std::nearbyint(row[i] / scale), -127.f, 127.f) * scale;
}

// activation(gate x) * (up x) of every slot, as activations.
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
void up_projection(const Experts& a, const Slots& slots, const Inputs& x, const Hidden& h, bool unpack,
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
          tokens[group.begin + i] = {x.of(group).row(slots.token[group.begin + i]), (i - begin) * kSums, 1.f};
      }
  }

  struct Worker {
    const Experts& a;
    const std::vector<Task>& tasks;
    const std::vector<Token>& tokens;
    const Hidden& h;
    const bool unpack;
    Multiplier multiply{!unpack ? 0 : a.hidden};
    std::vector<float> sums = std::vector<float>(kChunk * kSums, 0.f);

    void plan(int64_t index, std::vector<Piece>& pieces) {
      const Task& task = tasks[index];
      const Group& group = *task.group;
      const int64_t end = std::min(task.row + kUpRows, group.intermediate);
      Block block{};
      block.tokens = tokens.data() + task.begin;
      block.count = task.count;
      block.out = sums.data();
      append_blocks(block, group.w13, unpack, task.row, end, pieces);
      block.out += kUpRows;
      append_blocks(block, group.w13, unpack, group.intermediate + task.row, group.intermediate + end, pieces);
    }
    void finish(int64_t index) {
      const Task& task = tasks[index];
      const int64_t stride = padded(task.group->intermediate);
      for (int64_t i = 0; i < task.count; ++i) {
        float* gate = sums.data() + i * kSums;
        widen_kernels().hidden(a.activation, gate, gate + kUpRows, std::min(kUpRows, stride - task.row),
                               unpack ? Dtype::f32 : a.dtype, h.row(task.begin + i) + task.row);
        std::fill_n(gate, kSums, 0.f);
      }
    }
  };
  run_tasks<Piece>(tasks.size(), cost / std::max<int64_t>(tasks.size(), 1), parallel,
                   [&] { return Worker{a, tasks, tokens, h, unpack}; });
}

// y = sum over slots of scale * (w2 h). A task is some rows of every expert, so it adds up in the order of the experts.
void down_projection(const Experts& a, const Slots& slots, const Hidden& h, bool unpack, const ParallelFor& parallel) {
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
    const bool unpack;
    Multiplier multiply{!unpack ? 0 : std::max(a.intermediate, a.shared_intermediate)};
    std::vector<float> sums = std::vector<float>(a.tokens * rows, 0.f);

    void plan(int64_t task, std::vector<Piece>& pieces) {
      for (const Group& group : groups) {
        Block block{};
        block.tokens = tokens.data() + group.begin;
        block.count = group.count;
        block.out = sums.data();
        append_blocks(block, group.w2, unpack, task * rows, std::min((task + 1) * rows, a.hidden), pieces);
      }
    }
    void start(int64_t task) {
      const int64_t first = task * rows, count = std::min(rows, a.hidden - first);
      for (int64_t t = 0; t < a.tokens; ++t) first_sums(a, t, first, count, sums.data() + t * rows);
    }
    void finish(int64_t task) {
      const int64_t first = task * rows, count = std::min(rows, a.hidden - first);
      for (int64_t t = 0; t < a.tokens; ++t) {
        const float* from = sums.data() + t * rows;
        const int64_t to = t * a.hidden + first;
        if (a.last_wave()) {
          widen_kernels().narrow(from, count, a.dtype, const_cast<void*>(at(a.y, a.dtype, to)));
        } else {
          std::copy_n(from, count, a.carry + to);
        }
      }
    }
  };
  run_tasks<Piece>(ceil_div(a.hidden, rows), cost, parallel,
                   [&] { return Worker{a, slots.groups, tokens, rows, unpack}; });
}

}  // namespace

void widen_forward(const Experts& args, const Slots& slots, const ParallelFor& parallel) {
  // Activations are stored for one dtype of weights: if one matrix is quantised, all become fp32, here or in another wave.
  const bool unpack = args.w13.format != Format::plain || args.shared_w13.format != Format::plain;
  const Dtype weight = unpack ? Dtype::f32 : args.dtype;
  Inputs x{widen(args.x, args.dtype, args.tokens, args.hidden, weight, parallel), {}};
  if (args.quantize_activations) {
    x.rounded = widen(args.x, args.dtype, args.tokens, args.hidden, weight, parallel);
    for (int64_t t = 0; t < args.tokens; ++t) round_to_int8(x.rounded.data.get() + t * x.rounded.stride, args.hidden);
  }
  const Hidden h(args, slots);
  up_projection(args, slots, x, h, unpack, parallel);
  if (args.quantize_activations)
    for (const Group& group : slots.groups)
      for (int64_t i = 0; i < group.count && group.w2.weight.format == Format::int8; ++i)
        round_to_int8(h.row(group.begin + i), group.intermediate);
  down_projection(args, slots, h, unpack, parallel);
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
    const Matrix& matrix;
    int64_t chunks;
    Multiplier multiply;

    void plan(int64_t task, std::vector<Piece>& pieces) {
      const int64_t tokens = block.count, row = task / chunks * kLinearRows, chunk = task % chunks;
      Block part = block;
      part.tokens += tokens * chunk / chunks;
      part.count = tokens * (chunk + 1) / chunks - tokens * chunk / chunks;
      part.out += row;
      append_blocks(part, matrix, false, row, std::min(row + kLinearRows, matrix.rows), pieces);
    }
    void finish(int64_t) {}
  };
  const Matrix matrix{weight, weight_dtype, rows, hidden, 1};
  Block block{};
  block.tokens = list.data();
  block.count = tokens;
  block.out = out;
  const int64_t chunks = ceil_div(tokens, kChunk);
  run_tasks<Piece>(ceil_div(rows, kLinearRows) * chunks, ceil_div(tokens, chunks) * kLinearRows * hidden, parallel,
                   [&] { return Worker{block, matrix, chunks, Multiplier()}; });
}

}  // namespace dmoe::cpu
