// What every table of dot_kernels.h shares; no include guard, each instruction set includes it once.
#include "dot_kernels.h"
#include "elementwise.h"

namespace dmoe::cpu {
namespace {

using Vec = VectorOf<float, 16>::type;

// One step of one token: where its 64 bytes go within a tile is the instruction set's choice.
void place(const char* line, int64_t step, int64_t token, int64_t width, char* to);

void pack(const char* const* token, int64_t width, int64_t bytes, char* to) {
  const int64_t whole = bytes / kStepBytes;
  for (int64_t step = 0; step < whole; ++step)
    for (int64_t t = 0; t < width; ++t) place(token[t] + step * kStepBytes, step, t, width, to);
  if (whole * kStepBytes == bytes) return;
  for (int64_t t = 0; t < width; ++t) {
    char line[kStepBytes] = {};
    std::memcpy(line, token[t] + whole * kStepBytes, bytes - whole * kStepBytes);
    place(line, whole, t, width, to);
  }
}

void hidden(const float* gate_up, int64_t stride, int64_t rows, int64_t width, int64_t step, char* to) {
  for (int64_t t = 0; t < width; ++t) {
    alignas(64) uint16_t line[kStepDepth] = {};
    for (int64_t i = 0; i < rows; i += 8) {
      const float* gate = gate_up + t * stride + i;
      const Eight value = gated(load<Eight>(gate), load<Eight>(gate + kDotRows));
      store(line + i, __builtin_convertvector(narrow_eight(value, Dtype::bf16), EightShorts));
    }
    for (int64_t i = rows; i < kStepDepth; ++i) line[i] = 0;  // sums past the last row are not its own
    place(reinterpret_cast<const char*>(line), step, t, width, to);
  }
}

int64_t steps_of(int64_t depth) { return (depth + kStepDepth - 1) / kStepDepth; }

// Whole steps of some rows. Rows past the last repeat it; their sums go nowhere.
struct Rows {
  const char* first;
  int64_t stride, count;
  const char* operator()(int64_t row) const { return first + (row < count ? row : count - 1) * stride; }
};

// As they are in memory or, where the depth does not fill its last step, copied into block.panel.
Rows rows_of(const DotBlock& block, int64_t row, int64_t rows) {
  const int64_t count = block.rows - row < rows ? block.rows - row : rows;
  const char* from = block.weight + row * block.stride;
  if (block.depth % kStepDepth == 0) return {from, block.stride, count};
  const int64_t stride = panel_stride(block.depth);
  for (int64_t r = 0; r < count; ++r) {
    std::memcpy(block.panel + r * stride, from + r * block.stride, block.depth * 2);
    std::memset(block.panel + r * stride + block.depth * 2, 0, stride - block.depth * 2);
  }
  return {block.panel, stride, count};
}

}  // namespace
}  // namespace dmoe::cpu
