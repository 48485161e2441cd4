// Element types that cross the language border, and their conversions to and from float.
#pragma once

#include <cstdint>
#include <cstring>

namespace ck {

enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct bf16 {
  uint16_t bits;
};

#if defined(__aarch64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
typedef __fp16 fp16;  // GCC has _Float16 in C++ on this machine from 13 on
#else
typedef _Float16 fp16;
#endif

static inline float to_float(float v) { return v; }

static inline float to_float(bf16 v) {
  const uint32_t u = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

static inline float to_float(fp16 v) { return static_cast<float>(v); }

static inline void from_float(float v, float* out) { *out = v; }

static inline void from_float(float v, bf16* out) {  // round to nearest even; NaN stays NaN
  uint32_t u;
  std::memcpy(&u, &v, 4);
  out->bits = v != v ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

static inline void from_float(float v, fp16* out) { *out = static_cast<fp16>(v); }

}  // namespace ck
