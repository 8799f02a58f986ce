#ifdef __x86_64__
#define DMOE_LANES 16
#include "widen_body.h"

const dmoe::cpu::WidenKernels dmoe::cpu::kWidenAvx512 = {"avx512", multiply_any, hidden, widen,
                                                         narrow,   max_of,       sum_exp};
#endif
