// What experts apply to gate, before it is multiplied with up: ACTIVATIONS of dmoe_ops/formats.py.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace dmoe {

enum class Activation : int32_t { silu, gelu_tanh };

inline std::optional<Activation> activation_of(std::string_view name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  return std::nullopt;
}

// Both are gate / (1 + exp(-z)). silu: z = gate. gelu_tanh = gate (1 + tanh(u)) / 2, u = sqrt(2 / pi) (gate + 0.044715 gate^3):
// as (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), z = 2u = gate (kGeluLinear + kGeluCubic gate^2).
constexpr float kGeluLinear = 1.5957691216057308f, kGeluCubic = 0.07135481627260025f;

}  // namespace dmoe
