#define DMOE_LANES 4
#include "experts_body.h"

const dmoe::cpu::Kernels dmoe::cpu::kPlain = {"plain", multiply_any, silu_mul, widen, narrow};
