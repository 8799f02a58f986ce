// What every table of dot_kernels.h shares; no include guard, each instruction set includes it once.
#include "dot_kernels.h"
#include "elementwise.h"

namespace dmoe::cpu {
namespace {

using Vec = VectorOf<float, 16>::type;

// 64 bytes of every line, from `offset` on, into a step of a tile: in which order is the instruction set's choice.
void place(const char* const* line, int64_t offset, int64_t width, char* to);

void pack(const char* const* line, int64_t width, int64_t bytes, char* to) {
  const int64_t whole = bytes / kStepBytes * kStepBytes;
  for (int64_t offset = 0; offset < whole; offset += kStepBytes) place(line, offset, width, to + offset * width);
  if (whole == bytes) return;
  alignas(64) char last[2 * kMostTile][kStepBytes] = {};
  const char* last_line[2 * kMostTile];
  for (int64_t t = 0; t < width; ++t) {
    std::memcpy(last[t], line[t] + whole, bytes - whole);
    last_line[t] = last[t];
  }
  place(last_line, 0, width, to + whole * width);
}

void hidden(Activation activation, const float* gate_up, int64_t stride, int64_t rows, int64_t width, int64_t step,
            char* to) {
  alignas(64) uint16_t lines[kMostTile][kStepDepth] = {};
  const char* line[kMostTile];
  for (int64_t t = 0; t < width; ++t) {
    for (int64_t i = 0; i < rows; i += 8) {
      const float* gate = gate_up + t * stride + i;
      const Eight value = gated(load<Eight>(gate), load<Eight>(gate + kUpRows), activation);
      store(lines[t] + i, __builtin_convertvector(narrow_eight(value, Dtype::bf16), EightShorts));
    }
    for (int64_t i = rows; i < kStepDepth; ++i) lines[t][i] = 0;  // sums past the last row are not its own
    line[t] = reinterpret_cast<const char*>(lines[t]);
  }
  place(line, 0, width, to + step * width * kStepBytes);
}

void hidden_f32(Activation activation, const float* gate_up, int64_t stride, int64_t rows, int64_t width, float* to,
                int64_t to_stride) {
  for (int64_t t = 0; t < width; ++t)
    for (int64_t i = 0; i < rows; i += 8) {
      const float* gate = gate_up + t * stride + i;
      const Eight value = gated(load<Eight>(gate), load<Eight>(gate + kUpRows), activation);
      std::memcpy(to + t * to_stride + i, &value, 4 * (rows - i < 8 ? rows - i : 8));
    }
}

void quantize(const void* x, Dtype dtype, int64_t n, Parts parts, int8_t* q, float* scale, int32_t sum[2]) {
  const auto at = [&](int64_t i) {
    return dtype == Dtype::f32 ? static_cast<const uint32_t*>(x)[i]
                               : static_cast<uint32_t>(static_cast<const uint16_t*>(x)[i]) << 16;
  };
  uint32_t most = 0;  // magnitudes are in the order of their bits
  for (int64_t i = 0; i < n; ++i) most = most < (at(i) & 0x7fffffff) ? at(i) & 0x7fffffff : most;
  float largest;
  std::memcpy(&largest, &most, 4);
  const float limit = parts == Parts::int16 ? 127 * 256 : 127;
  *scale = largest / limit == 0 ? 1.f : largest / limit;
  sum[0] = sum[1] = 0;
  if (most >= 0x7f800000) {
    *scale = __builtin_nanf("");
    std::memset(q, 0, n * lines_of(parts));
    return;
  }
  const auto rounded = [&](int64_t i) {
    const uint32_t bits = at(i);
    float value;
    std::memcpy(&value, &bits, 4);
    value /= *scale;
    value = value < -limit ? -limit : value > limit ? limit : value;
    return static_cast<int32_t>(value + 0x1.8p23f - 0x1.8p23f);
  };
  int32_t first = 0, second = 0;
  if (parts == Parts::int8) {
    for (int64_t i = 0; i < n; ++i) first += q[i] = rounded(i);
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const int32_t value = rounded(i), high = (value + 128) >> 8, low = value - 256 * high;
      q[i] = high, q[n + i] = low;
      first += high, second += low;
    }
  }
  sum[0] = first, sum[1] = second;
}

void narrow(const float* sums, int64_t n, uint16_t* y) {
  for (int64_t i = 0; i < n; i += 8) {
    const int64_t count = n - i < 8 ? n - i : 8;
    Eight eight{};
    std::memcpy(&eight, sums + i, 4 * count);
    const EightShorts out = __builtin_convertvector(narrow_eight(eight, Dtype::bf16), EightShorts);
    std::memcpy(y + i, &out, 2 * count);
  }
}

// Whole steps of some rows. Rows past the last repeat it; their sums go nowhere.
struct Rows {
  const char* first;
  int64_t stride, count;
  const char* operator()(int64_t row) const { return first + (row < count ? row : count - 1) * stride; }
};

// Neighbouring rows of a token's sums, from `row` on, go where they go.
template <bool down, class Sums>
void put_sums(const DotBlock& block, int64_t row, int64_t slot, Sums sums) {
  if constexpr (down) {
    float* to = block.out + block.token[slot] * block.out_stride + row;
    store(to, load<Sums>(to) + block.scale[slot] * sums);
  } else {
    store(block.out + (slot - block.tiles[0]) * block.out_stride + row, sums);
  }
}

// As they are in memory or, where they do not fill their last step, in block.panel.
Rows rows_of(const DotBlock& block, int64_t row, int64_t rows) {
  const Matrix& matrix = *block.matrix;
  const int64_t count = block.rows - row < rows ? block.rows - row : rows, first = block.row + row;
  const int64_t bytes = matrix.row_bytes(), stride = panel_stride(matrix.depth);
  if (bytes % kStepBytes == 0) return {matrix.row(first), bytes, count};
  for (int64_t r = 0; r < count; ++r) {
    std::memcpy(block.panel + r * stride, matrix.row(first + r), bytes);
    std::memset(block.panel + r * stride + bytes, 0, stride - bytes);
  }
  return {block.panel, stride, count};
}

// The weights that come next, a few cache lines a step: memory works while the tiles compute, and a burst would stall them.
// They come a whole block ahead: hardware follows neither from row to row nor from expert to expert.
struct Ahead {
  const char* at = nullptr;
  int64_t lines = 0, steps, owed = 0;  // spread evenly: `lines` over `steps`

  Ahead(const DotBlock& next, int64_t steps) : steps(steps) {
    if (next.rows <= 0) return;
    at = next.matrix->row(next.row);
    lines = (next.rows * next.matrix->row_bytes() + kStepBytes - 1) / kStepBytes;
  }
  void fetch() {
    for (owed += lines; owed >= steps; owed -= steps, at += kStepBytes) __builtin_prefetch(at, 0, 2);  // into L2
  }
};

}  // namespace
}  // namespace dmoe::cpu
