// Host versions of the CUDA intrinsics that the kernels use; included by cuda_emu.h.
#pragma once

// ---- barriers
inline void __syncthreads() { emu::sync_block(); }
inline void __syncwarp(unsigned = ~0u) { emu::sync_warp(); }
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- shuffles and votes of a whole warp
namespace emu {
inline int lane() { return current()->linear & 31; }
// The source lane if it lies in the segment of `width` lanes, else the own lane.
inline int in_segment(int source, int width) { return source / width == lane() / width && source >= 0 ? source : lane(); }
inline unsigned ballot(bool predicate) {
  const int me = lane();
  Warp& w = *current()->warp;
  w.slot[me][0] = predicate;
  sync_warp();
  unsigned all = 0;
  for (int l = 0; l < 32; ++l) all |= static_cast<unsigned>(w.slot[l][0]) << l;
  sync_warp();
  return all;
}
}  // namespace emu

template <class T>
T __shfl_sync(unsigned, T v, int source, int width = 32) {
  return emu::exchange(v, (emu::lane() & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned, T v, int mask, int width = 32) {
  return emu::exchange(v, emu::in_segment(emu::lane() ^ mask, width));
}
template <class T>
T __shfl_down_sync(unsigned, T v, int delta, int width = 32) {
  return emu::exchange(v, emu::in_segment(emu::lane() + delta, width));
}
template <class T>
T __shfl_up_sync(unsigned, T v, int delta, int width = 32) {
  return emu::exchange(v, emu::in_segment(emu::lane() - delta, width));
}
inline unsigned __ballot_sync(unsigned, int p) { return emu::ballot(p); }
inline int __any_sync(unsigned, int p) { return emu::ballot(p) != 0; }
inline int __all_sync(unsigned, int p) { return emu::ballot(p) == ~0u; }

// ---- loads and stores with a cache hint
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcg(T* p, T v) {
  *p = v;
}
template <class T>
void __stcs(T* p, T v) {
  *p = v;
}

// ---- bits
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v ? __builtin_clz(v) : 32; }
template <class To, class From>
To emu_bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}
inline unsigned __float_as_uint(float v) { return emu_bits<unsigned>(v); }
inline int __float_as_int(float v) { return emu_bits<int>(v); }
inline float __uint_as_float(unsigned v) { return emu_bits<float>(v); }
inline float __int_as_float(int v) { return emu_bits<float>(v); }

// ---- arithmetic.  Some names with two underscores are glibc's own: macros replace those.
#define __expf emu_expf_
#define __logf emu_logf_
#define __log2f emu_log2f_
#define __exp2f emu_exp2f_
#define __powf emu_powf_
#define __sinf emu_sinf_
#define __cosf emu_cosf_
#define __tanhf emu_tanhf_
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __exp2f(float x) { return std::exp2(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __tanhf(float x) { return std::tanh(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frsqrt_rn(float a) { return 1.0f / std::sqrt(a); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __saturatef(float a) { return a < 0 ? 0 : a > 1 ? 1 : a; }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline float normcdff(float a) { return 0.5f * std::erfc(-a * 0.70710678118654752440f); }
using std::max;
using std::min;

// ---- bf16 and half arithmetic that the toolkit's headers have for the device only
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  return __float2bfloat16(std::fma(__bfloat162float(a), __bfloat162float(b), __bfloat162float(c)));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return __halves2bfloat162(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y));
}
inline __half __hfma(__half a, __half b, __half c) {
  return __float2half(std::fma(__half2float(a), __half2float(b), __half2float(c)));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return __halves2half2(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y));
}

// ---- mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32: c += a b
inline void mma16816(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emu::Warp& w = *emu::current()->warp;
  const int me = emu::lane(), group = me >> 2, pair = me & 3;
  for (int i = 0; i < 4; ++i) w.slot[me][i] = a[i];
  for (int i = 0; i < 2; ++i) w.slot[me][4 + i] = b[i];
  emu::sync_warp();
  const auto half = [](uint64_t two, int which) { return __uint_as_float(static_cast<uint32_t>(two >> 16 * which) << 16); };
  for (int q = 0; q < 4; ++q) {
    const int row = group + 8 * (q >> 1), column = 2 * pair + (q & 1);
    for (int k = 0; k < 16; ++k) {
      const uint64_t left = w.slot[(row & 7) * 4 + k % 8 / 2][(row >= 8) + 2 * (k >= 8)];
      const uint64_t right = w.slot[column * 4 + k % 8 / 2][4 + (k >= 8)];
      c[q] += half(left, k & 1) * half(right, k & 1);
    }
  }
  emu::sync_warp();
}

// ---- the run-time calls that a launcher makes; there is no device to report an error
namespace emu {
template <class... A>
cudaError_t success(A&&...) {
  return cudaSuccess;
}
}  // namespace emu
#define cudaGetLastError() emu::success()
#define cudaPeekAtLastError() emu::success()
#define cudaDeviceSynchronize() emu::success()
#define cudaStreamSynchronize(...) emu::success(__VA_ARGS__)
#define cudaSetDevice(...) emu::success()
#define cudaFuncSetAttribute(...) emu::success()
#define cudaGetErrorString(...) "no error"
