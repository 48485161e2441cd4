// Instruction sets the kernels are compiled for, and the choice among them at run time.
#pragma once

namespace ck {

// `generic` is NEON on aarch64, and SSE2 on x86-64; `neonbf16` has its products of bf16.
enum class Isa { generic, avx2, avx512, avx512bf16, amx, neonbf16 };

// The set in use: the best this processor has, or the one asked for.
Isa isa();
const char* isa_name(Isa);
bool isa_supported(Isa);  // built in and present in this processor
void set_isa(Isa);

}  // namespace ck

// Declares one function per instruction set, all of the same parameter struct.
#define CK_DECLARE(function, Params) \
  namespace generic {                \
  void function(const Params&);      \
  }                                  \
  namespace avx2 {                   \
  void function(const Params&);      \
  }                                  \
  namespace avx512 {                 \
  void function(const Params&);      \
  }                                  \
  namespace avx512bf16 {             \
  void function(const Params&);      \
  }                                  \
  namespace amx {                    \
  void function(const Params&);      \
  }                                  \
  namespace neonbf16 {               \
  void function(const Params&);      \
  }
