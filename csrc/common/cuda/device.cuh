// What the kernels share: loads of any feature type, asynchronous copies, fast exponentials, reductions of a block.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "common/dtype.h"

namespace ck {
namespace cuda {

// ---- element types (common/dtype.h), converted one by one where speed does not matter
__device__ inline float load_as_float(const void* x, int dtype, int64_t at) {
  if (dtype == kFloat32) return static_cast<const float*>(x)[at];
  const uint16_t bits = static_cast<const uint16_t*>(x)[at];
  if (dtype == kBFloat16) return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  return __half2float(__ushort_as_half(bits));
}

__device__ inline void store_as(void* x, int dtype, int64_t at, float v) {
  if (dtype == kFloat32) {
    static_cast<float*>(x)[at] = v;
  } else if (dtype == kBFloat16) {  // to nearest even; NaN stays NaN
    const uint32_t u = __float_as_uint(v);
    static_cast<uint16_t*>(x)[at] = static_cast<uint16_t>(v != v ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16);
  } else {
    static_cast<uint16_t*>(x)[at] = __half_as_ushort(__float2half_rn(v));
  }
}

// ---- 16 bytes from global to shared memory, without registers
__device__ inline void copy_async(float* shared, const float* global) {
#ifdef __CUDACC__
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
#else
  for (int i = 0; i < 4; i++) shared[i] = global[i];
#endif
}

// All copies of this thread have landed; a barrier shows them to the others.
__device__ inline void wait_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

__device__ inline float4 load4(const float* x) { return *reinterpret_cast<const float4*>(x); }
__device__ inline void store4(float* x, float4 v) { *reinterpret_cast<float4*>(x) = v; }

// ---- the special function unit; results below 2^-126 are 0
__device__ inline float exp2_fast(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

__device__ inline float exp_fast(float x) { return exp2_fast(x * 1.44269504088896341f); }

__device__ inline float reciprocal(float x) {
#ifdef __CUDACC__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

struct Add {
  template <typename T>
  __device__ T operator()(T x, T y) const {
    return x + y;
  }
};

struct Max {
  template <typename T>
  __device__ T operator()(T x, T y) const {
    return x > y ? x : y;
  }
};

// The reduction over a block of THREADS threads, at every thread.  `shared` has room for THREADS / 32 values.
template <int THREADS, typename T, typename Op>
__device__ T block_reduce(T v, T* shared, Op op) {
  for (int lanes = 16; lanes > 0; lanes /= 2) v = op(v, __shfl_xor_sync(0xffffffffu, v, lanes));
  __syncthreads();  // the values of an earlier call have been read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  v = shared[0];
  for (int warp = 1; warp < THREADS / 32; warp++) v = op(v, shared[warp]);
  return v;
}

}  // namespace cuda
}  // namespace ck
