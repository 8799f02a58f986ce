// A weight matrix as it is stored: in the dtype of x, or quantised (the formats of dmoe_ops/formats.py).
#pragma once

#include <cstdint>
#include <cstring>

#include "experts.h"

namespace dmoe::cpu {

constexpr int64_t kScaleGroup = 128;  // inputs, and for fp8 rows, that share a scale

struct Matrix {
  Weight weight;
  Dtype dtype;  // of plain weights
  int64_t rows, depth;
  int64_t halves;  // 2 for a w13: its gate and up rows have blocks of their own

  bool quantized() const { return weight.format != Format::plain; }
  int64_t row_bytes() const {
    if (weight.format == Format::plain) return depth * size_of(dtype);
    return weight.format == Format::int4 ? (depth + 1) / 2 : depth;
  }
  int64_t groups() const { return (depth + kScaleGroup - 1) / kScaleGroup; }
  const char* row(int64_t r) const { return static_cast<const char*>(weight.data) + r * row_bytes(); }

  // Where the scales of row r begin: dividing is slow, so loops over groups do it once.
  int64_t scales_of(int64_t r) const {
    if (weight.format == Format::int8) return r;
    if (weight.format == Format::int4) return r * groups();
    const int64_t half = rows / halves, blocks = (half + kScaleGroup - 1) / kScaleGroup;
    return (r / half * blocks + r % half / kScaleGroup) * groups();
  }
  // Of int8, row `at` has it.
  float scale_at(int64_t at) const {
    if (!weight.scale_bf16) return static_cast<const float*>(weight.scale)[at];
    const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(weight.scale)[at]) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  int64_t scales() const {
    if (weight.format == Format::int8) return rows;
    if (weight.format == Format::int4) return rows * groups();
    return halves * ((rows / halves + kScaleGroup - 1) / kScaleGroup) * groups();
  }

  // Matrix e of a stack of them.
  Matrix at(int64_t e) const {
    Matrix one = *this;
    one.weight.data = static_cast<const char*>(weight.data) + e * rows * row_bytes();
    if (quantized())
      one.weight.scale = static_cast<const char*>(weight.scale) + e * scales() * (weight.scale_bf16 ? 2 : 4);
    return one;
  }
};

// The 128 magnitudes of float8_e4m3fn.
struct Fp8 {
  float value[128];
  constexpr Fp8() : value() {
    for (int code = 0; code < 127; ++code) {
      const int exponent = code >> 3, mantissa = code & 7;
      float v = exponent ? 8.f + mantissa : mantissa;
      for (int e = exponent ? exponent : 1; e < 10; ++e) v /= 2;
      for (int e = exponent; e > 10; --e) v *= 2;
      value[code] = v;
    }
    value[127] = __builtin_nanf("");
  }
};
inline constexpr Fp8 kFp8;

// Inputs [begin, end) of row r as fp32: each float(q) * scale, rounded once.
void dequantize(const Matrix& matrix, int64_t r, int64_t begin, int64_t end, float* to);

}  // namespace dmoe::cpu
