#include "experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace dmoe::cpu {
namespace {

float load(const void* p, Dtype dtype, int64_t i) {
  if (dtype == Dtype::f32) return static_cast<const float*>(p)[i];
  const uint32_t bits = static_cast<const uint16_t*>(p)[i];
  uint32_t wide = bits << 16;
  if (dtype == Dtype::f16) {
    const uint32_t magnitude = bits & 0x7fff, sign = (bits & 0x8000) << 16;
    float value;
    const uint32_t shifted = magnitude << 13;
    std::memcpy(&value, &shifted, 4);
    value *= 0x1p112f;
    std::memcpy(&wide, &value, 4);
    if (magnitude >= 0x7c00) wide |= 0x7f800000;
    wide |= sign;
  }
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

void store(void* p, Dtype dtype, int64_t i, float value) {
  if (dtype == Dtype::f32) {
    static_cast<float*>(p)[i] = value;
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint16_t out;
  if (dtype == Dtype::bf16) {
    out = value != value ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  } else {
    const uint32_t magnitude = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
    if (magnitude > 0x7f800000) {
      out = 0x7e00;
    } else if (magnitude >= 0x477ff000) {
      out = 0x7c00;
    } else if (magnitude < 0x38800000) {
      const float shifted = std::fabs(value) + 0.5f;
      uint32_t s;
      std::memcpy(&s, &shifted, 4);
      out = s - 0x3f000000;
    } else {
      out = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    }
    out |= sign;
  }
  static_cast<uint16_t*>(p)[i] = out;
}

}  // namespace

void experts_forward(const Experts& a, const ParallelFor& parallel) {
  parallel(a.tokens, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      std::vector<float> y(a.hidden, 0.f);
      const auto add = [&](const void* w13, const void* w2, int64_t e, int64_t inter, float weight) {
        std::vector<float> h(inter);
        for (int64_t i = 0; i < inter; ++i) {
          float g = 0, u = 0;
          for (int64_t k = 0; k < a.hidden; ++k) {
            const float x = load(a.x, a.dtype, t * a.hidden + k);
            g += x * load(w13, a.dtype, ((2 * e) * inter + i) * a.hidden + k);
            u += x * load(w13, a.dtype, ((2 * e + 1) * inter + i) * a.hidden + k);
          }
          h[i] = g / (1 + std::exp(-g)) * u;
        }
        for (int64_t k = 0; k < a.hidden; ++k) {
          float sum = 0;
          for (int64_t i = 0; i < inter; ++i) sum += h[i] * load(w2, a.dtype, (e * a.hidden + k) * inter + i);
          y[k] += weight * sum;
        }
      };
      for (int64_t j = 0; j < a.top_k; ++j) {
        const int32_t e = a.topk_ids[t * a.top_k + j];
        if (e >= 0 && e < a.experts) add(a.w13, a.w2, e, a.intermediate, a.topk_weights[t * a.top_k + j]);
      }
      if (a.shared_intermediate > 0) add(a.shared_w13, a.shared_w2, 0, a.shared_intermediate, 1.f);
      for (int64_t k = 0; k < a.hidden; ++k) store(a.y, a.dtype, t * a.hidden + k, y[k]);
    }
  });
}

void linear_f32(const void* x, Dtype x_dtype, const void* weight, Dtype weight_dtype, int64_t tokens, int64_t hidden,
                int64_t rows, float* out, const ParallelFor& parallel) {
  parallel(tokens, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t r = 0; r < rows; ++r) {
        float sum = 0;
        for (int64_t k = 0; k < hidden; ++k)
          sum += load(x, x_dtype, t * hidden + k) * load(weight, weight_dtype, r * hidden + k);
        out[t * rows + r] = sum;
      }
  });
}

const char* isa() { return "plain"; }

}  // namespace dmoe::cpu
