#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dmoe::cpu {
namespace {

constexpr const char* kNames[] = {"plain", "avx2", "avx512", "avx512_bf16", "amx"};

#ifdef __x86_64__
// Linux hands out the tile registers on request, to the whole process.
bool tiles_granted() {
#ifdef __linux__
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

Isa best() {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::plain;  // F16C is older than both
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return Isa::avx2;
  // Whatever multiplies bf16 has the dot products of bytes and, but for one generation of Xeons, lookups of bytes as well.
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni") ||
      !__builtin_cpu_supports("avx512vbmi"))
    return Isa::avx512;
  // GCC 12 knows no name for AMX here: CPUID 7.0, EDX bits 22 (AMX-BF16), 24 (AMX-TILE) and 25 (AMX-INT8).
  unsigned a = 7, b, c = 0, d;
  asm("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  const bool tiles = (d >> 22 & 1) && (d >> 24 & 3) == 3;
  return tiles && tiles_granted() ? Isa::amx : Isa::avx512_bf16;
}
#else
Isa best() { return Isa::plain; }
#endif

Isa choose() {
  const char* limit = std::getenv("DMOE_CPU_ISA");
  if (!limit) return best();
  for (int i = 0; i < 5; ++i)
    if (std::strcmp(kNames[i], limit) == 0) return std::min(best(), static_cast<Isa>(i));
  std::string why = "DMOE_CPU_ISA must be plain, avx2, avx512, avx512_bf16 or amx, got ";
  throw std::invalid_argument(why.append(limit));
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* name_of(Isa isa) { return kNames[static_cast<int>(isa)]; }

}  // namespace dmoe::cpu
