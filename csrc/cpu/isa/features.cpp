// CPU detection: by the compiler's builtins, which also check that the operating system saves the registers, or by what
// Linux reports.
#include "cpu/isa/features.h"

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace qlora::cpu {
namespace {
constexpr const char* kNames[kIsaCount] = {"scalar", "avx2", "avx512", "avx512bf16", "amx", "neon", "neonbf16"};

#if defined(__x86_64__)
// Tile registers hold 8 KiB of state; Linux saves them only for processes that request permission.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// CPUID leaf 7: EDX bit 22 is amx-bf16 and bit 24 is amx-tile. In subleaf 1, EAX bit 5 is avx512-bf16. GCC 12's
// __builtin_cpu_supports has no names for the first two.
bool has_avx512bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 5 & 1u) != 0;
}
// Leaf 7, ECX bit 8.
bool has_gfni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (ecx >> 8 & 1u) != 0;
}
bool has_bfloat16_tiles() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx >> 22 & 1u) != 0 && (edx >> 24 & 1u) != 0 &&
         may_use_tiles();
}
#elif defined(__aarch64__)
// Bit 14 of Linux's second word of features is FEAT_BF16.
bool has_bfloat16_products() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP2) >> 14 & 1u) != 0;
#else
  return false;
#endif
}
#endif
}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool parse_isa(const char* name, Isa* out) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) {
      *out = static_cast<Isa>(i);
      return true;
    }
  }
  return false;
}

Isa detect_isa() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && has_avx512bf16()) return has_bfloat16_tiles() ? Isa::kAmx : Isa::kAvx512Bf16;
  return avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kScalar;
#elif defined(__aarch64__)
  return has_bfloat16_products() ? Isa::kNeonBf16 : Isa::kNeon;  // every 64-bit ARM processor has NEON
#else
  return Isa::kScalar;
#endif
}

Isa preferred_isa() {
  const Isa best = detect_isa();
#if defined(__x86_64__)
  if (best == Isa::kAvx512Bf16 && !__builtin_cpu_is("amd")) return Isa::kAvx512;
#endif
  return best;
}

bool has_one_shuffle_port() {
#if defined(__x86_64__)
  static const bool has_one = __builtin_cpu_is("intel") && !has_gfni();
  return has_one;
#else
  return false;
#endif
}

}  // namespace qlora::cpu
