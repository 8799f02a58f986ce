// The experts and the router's gate in fp32 arithmetic: weights of any dtype are widened on the way.
#pragma once

#include "experts.h"

namespace dmoe::cpu {

struct Slots;

void widen_forward(const Experts& args, const Slots& slots, const ParallelFor& parallel);

}  // namespace dmoe::cpu
