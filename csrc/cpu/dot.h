// The experts of bf16 by dot products along the depth, for CPUs that multiply pairs of bf16.
#pragma once

#include "experts.h"

namespace dmoe::cpu {

struct Slots;
struct DotKernels;

// The kernels that run here, or null where the CPU has no such instruction.
const DotKernels* dot_kernels();

void dot_forward(const Experts& args, const Slots& slots, const DotKernels& kernels, const ParallelFor& parallel);

}  // namespace dmoe::cpu
