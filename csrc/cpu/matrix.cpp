#include "matrix.h"

#include <algorithm>

namespace dmoe::cpu {
namespace {

template <class Value>
void scaled(const Matrix& matrix, int64_t r, int64_t begin, int64_t end, float* to, const Value& value) {
  const int64_t scales = matrix.scales_of(r), per_group = matrix.weight.format == Format::int8 ? 0 : 1;
  for (int64_t k = begin; k < end;) {
    const float scale = matrix.scale_at(scales + k / kScaleGroup * per_group);
    for (const int64_t stop = std::min(end, (k / kScaleGroup + 1) * kScaleGroup); k < stop; ++k)
      *to++ = value(k) * scale;
  }
}

float half(uint16_t bits) {
  const uint32_t magnitude = bits & 0x7fff, sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  uint32_t shifted = magnitude << 13;
  float value;
  std::memcpy(&value, &shifted, 4);
  value *= 0x1p112f;
  std::memcpy(&shifted, &value, 4);
  shifted |= sign | (magnitude >= 0x7c00 ? 0x7f800000 : 0);
  std::memcpy(&value, &shifted, 4);
  return value;
}

}  // namespace

void dequantize(const Matrix& matrix, int64_t r, int64_t begin, int64_t end, float* to) {
  const char* row = matrix.row(r);
  const auto* bytes = reinterpret_cast<const uint8_t*>(row);
  switch (matrix.weight.format) {
    case Format::fp8:
      return scaled(matrix, r, begin, end, to,
                    [&](int64_t k) { return bytes[k] & 128 ? -kFp8.value[bytes[k] & 127] : kFp8.value[bytes[k]]; });
    case Format::int8:
      return scaled(matrix, r, begin, end, to,
                    [&](int64_t k) { return static_cast<float>(static_cast<int8_t>(bytes[k])); });
    case Format::int4:
      return scaled(matrix, r, begin, end, to,
                    [&](int64_t k) { return static_cast<float>((bytes[k / 2] >> k % 2 * 4 & 15) - 8); });
    case Format::plain:
      break;
  }
  for (int64_t k = begin; k < end; ++k, ++to) {
    if (matrix.dtype == Dtype::f32) {
      std::memcpy(to, row + k * 4, 4);
      continue;
    }
    uint16_t bits;
    std::memcpy(&bits, row + k * 2, 2);
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    if (matrix.dtype == Dtype::bf16) std::memcpy(to, &wide, 4);
    if (matrix.dtype == Dtype::f16) *to = half(bits);
  }
}

}  // namespace dmoe::cpu
