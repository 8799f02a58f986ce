#ifdef __x86_64__
#define DMOE_LANES 8
#include "experts_body.h"

const dmoe::cpu::Kernels dmoe::cpu::kAvx2 = {"avx2", multiply_any, silu_mul, widen, narrow};
#endif
