// Rounding and activations, eight numbers at a time; no include guard, each instruction set includes it once.
// Everything is in an unnamed namespace and no function of std:: is called: the linker may merge a function that two
// files define, and hand the AVX-512 version to a CPU without it.
#include <cstdint>
#include <cstring>

#include "experts.h"

namespace dmoe::cpu {
namespace {

template <class T, int n>
struct VectorOf {
  typedef T type __attribute__((vector_size(n * sizeof(T))));
};
using Eight = VectorOf<float, 8>::type;
using EightBits = VectorOf<uint32_t, 8>::type;
using EightShorts = VectorOf<uint16_t, 8>::type;

template <class V>
V load(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

template <class V>
void store(void* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}

Eight exp(Eight x) {
  x = x < -87.f ? Eight{} - 87.f : x;
  x = x > 89.f ? Eight{} + 89.f : x;                    // infinity, as 2^128
  const Eight shifted = x * 0x1.715476p0f + 0x1.8p23f;  // rounds x / ln 2 to an integer in the low bits
  const Eight n = shifted - 0x1.8p23f;
  const Eight r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  const Eight p = (((((r / 720.f + 1 / 120.f) * r + 1 / 24.f) * r + 1 / 6.f) * r + 0.5f) * r + 1.f) * r + 1.f;
  return p * reinterpret_cast<Eight>((reinterpret_cast<EightBits>(shifted) + 127) << 23);
}

EightBits narrow_eight(Eight x, Dtype dtype) {
  const EightBits bits = reinterpret_cast<EightBits>(x), magnitude = bits & 0x7fffffff;
  if (dtype == Dtype::bf16) {
    const EightBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return magnitude > 0x7f800000 ? EightBits{} + 0x7fc0 : rounded;
  }
  // Below 2^-14 adding 0.5 rounds at the last bit of a subnormal half.
  const EightBits subnormal = reinterpret_cast<EightBits>(reinterpret_cast<Eight>(magnitude) + 0.5f) - 0x3f000000;
  EightBits half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  half = magnitude < 0x38800000 ? subnormal : half;
  half = magnitude >= 0x477ff000 ? EightBits{} + 0x7c00 : half;  // rounds to infinity
  half = magnitude > 0x7f800000 ? EightBits{} + 0x7e00 : half;
  return half | ((bits >> 16) & 0x8000);
}

// activation(gate) * up
Eight gated(Eight gate, Eight up, Activation activation) {
  const Eight z = activation == Activation::silu ? gate : gate * (kGeluLinear + kGeluCubic * gate * gate);
  return gate / (exp(-z) + 1.f) * up;
}

}  // namespace
}  // namespace dmoe::cpu
