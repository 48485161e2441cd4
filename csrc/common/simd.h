// Portable SIMD: one vector type per instruction set, from GCC/Clang vector extensions.
//
// Every kernel source is compiled once per instruction set (CMakeLists.txt) with CK_ISA set to the namespace the copy
// lives in.  Everything here is inside that namespace, so the linker can never mix code built for different machines.
// For the same reason kernels use no standard-library templates that may be emitted as shared weak symbols.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#endif

#include "common/dtype.h"

#ifndef CK_ISA
#error "compile kernel sources with -DCK_ISA=<namespace>"
#endif

namespace ck {
namespace CK_ISA {

#if defined(__AVX512F__)
constexpr int VL = 16;  // floats per vector
#elif defined(__AVX2__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef float vf_any __attribute__((vector_size(VL * 4), aligned(4), may_alias));  // loads and stores at any address
typedef int32_t vi_any __attribute__((vector_size(VL * 4), aligned(4), may_alias));

static inline vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
static inline void store(float* p, vf v) { *reinterpret_cast<vf_any*>(p) = v; }
static inline vi load(const int32_t* p) { return *reinterpret_cast<const vi_any*>(p); }
static inline vf broadcast(float s) { return s - vf{}; }  // s + 0 would cost an add: it turns -0 into 0
static inline float neg_inf() { return -__builtin_inff(); }
static inline vf vmax(vf a, vf b) { return a > b ? a : b; }  // the second operand where either is NaN
static inline vf vmin(vf a, vf b) { return a < b ? a : b; }
static inline vf select(vi mask, vf a, vf b) { return mask ? a : b; }

// The sum of the lanes, always in the same order.
static inline float reduce_add(vf v) {
  float lane[VL];
  store(lane, v);
  for (int width = VL / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) lane[i] += lane[i + width];
  return lane[0];
}

static inline float reduce_max(vf v) {
  float lane[VL];
  store(lane, v);
  for (int width = VL / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  return lane[0];
}

// 0, 1, ..., VL - 1
static inline vi iota() {
  vi v{};
  for (int i = 0; i < VL; i++) v[i] = i;
  return v;
}

// ---------------------------------------------------------------- eight elements of any dtype, as float
typedef float floats8 __attribute__((vector_size(32)));
typedef double doubles8 __attribute__((vector_size(64)));
typedef uint32_t words8 __attribute__((vector_size(32)));
typedef uint16_t halves8 __attribute__((vector_size(16)));

template <typename V, typename P>
static inline V load_as(const P* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

static inline floats8 load8(const float* p) { return load_as<floats8>(p); }
static inline floats8 load8(const bf16* p) {
  return reinterpret_cast<floats8>(__builtin_convertvector(load_as<halves8>(p), words8) << 16);
}
static inline floats8 load8(const fp16* p) {
  floats8 v;
  for (int i = 0; i < 8; i++) v[i] = static_cast<float>(p[i]);
  return v;
}

static inline void store8(floats8 v, float* p) { std::memcpy(p, &v, sizeof v); }
static inline void store8(floats8 v, bf16* p) {  // as from_float
  const words8 u = reinterpret_cast<words8>(v), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const halves8 bits = __builtin_convertvector(v != v ? words8{} + 0x7fc0 : rounded, halves8);
  std::memcpy(p, &bits, sizeof bits);
}
static inline void store8(floats8 v, fp16* p) {
  for (int i = 0; i < 8; i++) p[i] = static_cast<fp16>(v[i]);
}

// VL elements, as float.
static inline vf load(const bf16* p) {
#if defined(__AVX512F__)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (__m512)_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, bits), 16);
#else
  typedef uint16_t halves __attribute__((vector_size(VL * 2)));
  typedef uint32_t words __attribute__((vector_size(VL * 4)));
  return reinterpret_cast<vf>(__builtin_convertvector(load_as<halves>(p), words) << 16);
#endif
}
#if defined(__AVX512F__)
static inline vf load(const fp16* p) {
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
#endif

// e^x, relative error below 2e-7 for -87 <= x <= 88; 0 below -87.3, saturated at e^88 above, NaN for NaN.
// Cody-Waite reduction to |r| <= ln2 / 2, then the degree-6 minimax polynomial of Cephes' expf.
static inline vf vexp(vf x) {
  const vf lo = broadcast(-87.33654f), hi = broadcast(88.0f);
  const vf tiny = x;
  x = x < lo ? lo : x;  // NaN stays NaN
  x = x > hi ? hi : x;
  const vf magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const vf shifted = x * 1.44269504088896341f + magic;
  const vf k = shifted - magic;
  vf r = x - k * 0.693359375f;
  r = r + k * 2.12194440e-4f;
  vf p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const vi bits = reinterpret_cast<vi>(shifted) << 23;  // the low bits of `shifted` hold k
  const vf y = reinterpret_cast<vf>(reinterpret_cast<vi>(p) + bits);
  return tiny < lo ? vf{} : y;
}

// 2^x, relative error below 7e-8 for -126 <= x <= 127; 0 below -126, NaN for NaN, nothing promised above 127.
// x - round(x) is exact, and the degree-6 minimax polynomial of 2^r on |r| <= 1/2 is off by 3e-9 before rounding.
static inline vf vexp2(vf x) {
  const vf magic = broadcast(12582912.0f), lo = broadcast(-126.0f);  // as in vexp
  const vf shifted = x + magic;
  const vf r = x - (shifted - magic);
  vf p = broadcast(1.53264453e-4f);
  p = p * r + 1.33908063e-3f;
  p = p * r + 9.61850584e-3f;
  p = p * r + 5.55035993e-2f;
  p = p * r + 2.40226477e-1f;
  p = p * r + 6.93147182e-1f;
  p = p * r + 1.0f;
  const vi power = reinterpret_cast<vi>(p) + (reinterpret_cast<vi>(shifted) << 23);
#if defined(__AVX512F__)
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, lo, _CMP_NLT_UQ), reinterpret_cast<vf>(power));
#else
  return x < lo ? vf{} : reinterpret_cast<vf>(power);
#endif
}

// out[i] = the sum of the lanes of v[i], in the order of reduce_add, for VL vectors.
static inline void reduce_add_each(const vf* v, float* out) {
#if defined(__AVX512F__)
  constexpr __mmask16 kAll = 0xffff;  // the unmasked forms make GCC 12 warn of its own headers
  __m512 a[8], b[4], c[2];            // halves of the lanes of two vectors in one, then quarters of four, ...
  for (int i = 0; i < 8; i++)
    a[i] = _mm512_add_ps(_mm512_maskz_shuffle_f32x4(kAll, v[i], v[i + 8], 0x44),
                         _mm512_maskz_shuffle_f32x4(kAll, v[i], v[i + 8], 0xee));
  for (int i = 0; i < 4; i++)
    b[i] = _mm512_add_ps(_mm512_maskz_shuffle_f32x4(kAll, a[i], a[i + 4], 0x88),
                         _mm512_maskz_shuffle_f32x4(kAll, a[i], a[i + 4], 0xdd));
  for (int i = 0; i < 2; i++)
    c[i] = _mm512_add_ps(_mm512_maskz_shuffle_ps(kAll, b[i], b[i + 2], 0x44),
                         _mm512_maskz_shuffle_ps(kAll, b[i], b[i + 2], 0xee));
  const vf sums =
      _mm512_add_ps(_mm512_maskz_shuffle_ps(kAll, c[0], c[1], 0x88), _mm512_maskz_shuffle_ps(kAll, c[0], c[1], 0xdd));
  // the vectors 0, 1, ... whose sums stand in lanes 0, 1, ...
  const __m512i place = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
  store(out, _mm512_maskz_permutexvar_ps(kAll, place, sums));
#else
  for (int i = 0; i < VL; i++) out[i] = reduce_add(v[i]);
#endif
}

}  // namespace CK_ISA
}  // namespace ck
