#ifdef __x86_64__
#define DMOE_LANES 16
#include "experts_body.h"

const dmoe::cpu::Kernels dmoe::cpu::kAvx512 = {"avx512", multiply_any, silu_mul, widen, narrow};
#endif
