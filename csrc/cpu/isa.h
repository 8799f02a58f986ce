// The instruction sets that the CPU kernels have bodies for, and the one that runs here.
#pragma once

namespace dmoe::cpu {

enum class Isa { plain, avx2, avx512, avx512_bf16, amx };

// The best that this CPU has. DMOE_CPU_ISA, one of the names above, lowers it (it never raises it).
// Throws std::invalid_argument where DMOE_CPU_ISA is no such name.
Isa isa();
const char* name_of(Isa isa);

}  // namespace dmoe::cpu
