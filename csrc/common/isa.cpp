#include "common/isa.h"

#include <cstdlib>
#include <initializer_list>
#include <cstring>
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace ck {
namespace {

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}

unsigned leaf7(unsigned subleaf, int reg) {  // reg: 0 eax, 3 edx
  unsigned r[4] = {0, 0, 0, 0};
  return __get_cpuid_count(7, subleaf, &r[0], &r[1], &r[2], &r[3]) ? r[reg] : 0;
}

bool has_bf16() { return has_avx512() && (leaf7(1, 0) >> 5 & 1); }

bool has_amx() {  // the processor has it, and Linux lets this process use the tile registers
  if (!has_bf16() || (leaf7(0, 3) >> 22 & 5) != 5) return false;  // AMX-BF16, AMX-TILE
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

#if defined(CK_HAVE_neonbf16)
bool has_neon_bf16() {
#if defined(__linux__)
  constexpr unsigned long kHwcap2Bf16 = 1 << 14;  // HWCAP2_BF16 of Linux 5.6
  return getauxval(AT_HWCAP2) & kHwcap2Bf16;
#elif defined(__APPLE__)
  int32_t has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has;
#else
  return false;
#endif
}
#endif

bool detect(Isa i) {
  switch (i) {
    case Isa::generic:
      return true;
#if defined(__x86_64__)
#ifdef CK_HAVE_avx2
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#ifdef CK_HAVE_avx512
    case Isa::avx512:
      return has_avx512();
#endif
#ifdef CK_HAVE_avx512bf16
    case Isa::avx512bf16:
      return has_bf16();
#endif
#ifdef CK_HAVE_amx
    case Isa::amx:
      return has_amx();
#endif
#endif
#ifdef CK_HAVE_neonbf16
    case Isa::neonbf16:
      return has_neon_bf16();
#endif
    default:
      return false;
  }
}

// Intel's bf16 dot product runs at half the rate of its float FMA (measured: 76 against 166 GF/s on one core of a 5th
// generation Xeon), so there the upcast wins and `avx512bf16` is taken on AMD only.
bool fast_bf16_dot() {
#if defined(__x86_64__)
  return !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

Isa best() {
  if (const char* wanted = std::getenv("CIBR_KERNELS_ISA"))
    for (Isa i : {Isa::generic, Isa::avx2, Isa::avx512, Isa::avx512bf16, Isa::amx, Isa::neonbf16})
      if (!std::strcmp(wanted, isa_name(i)) && detect(i)) return i;
  if (detect(Isa::neonbf16)) return Isa::neonbf16;
  if (detect(Isa::amx)) return Isa::amx;
  if (detect(Isa::avx512bf16) && fast_bf16_dot()) return Isa::avx512bf16;
  if (detect(Isa::avx512)) return Isa::avx512;
  if (detect(Isa::avx2)) return Isa::avx2;
  return Isa::generic;
}

Isa& current() {
  static Isa chosen = best();
  return chosen;
}

}  // namespace

Isa isa() { return current(); }

void set_isa(Isa i) { current() = i; }

bool isa_supported(Isa i) { return detect(i); }

const char* isa_name(Isa i) {
  switch (i) {
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512bf16:
      return "avx512bf16";
    case Isa::amx:
      return "amx";
    case Isa::neonbf16:
      return "neonbf16";
    default:
      return "generic";
  }
}

}  // namespace ck
