// The backward of additive_moments: the gradients of L, which the forward has made, and the n positives of J.
//
//   da_i = g_l dL/da_i + (g_j / n) w phi'(t_i)    t_i = a_i + b_{first_positive+i}    db the same, dw with phi(t_i)
//
// A positive has one row of a and one of b, so whoever owns the row of b writes both.  O(m h), one writer per number.
#pragma once

#include "additive/activations.cuh"

namespace ck {
namespace cuda {

constexpr int POSITIVE_THREADS = 256;

#define CK_POSITIVES_PARAMETERS                                                                                      \
  const void *a, const void *b, int dtype, const void *w, int w_dtype, int n, int m, int h, int first_positive,      \
      float slope, const float *g_j, const float *g_l, const void *da_of_l, const void *db_of_l, void *da, void *db, \
      float *parts
#define CK_POSITIVES_ARGUMENTS \
  a, b, dtype, w, w_dtype, n, m, h, first_positive, slope, g_j, g_l, da_of_l, db_of_l, da, db, parts

// One of the gradients of J and L, which null pointers are 0 for.
__device__ inline float upstream(const float* g, int64_t group) { return g ? g[group] : 0.0f; }

// da (n, h) and db (m, h), each with its *_of_l or null; parts (gridDim.y, h) or null: the sum of phi over the positives
// of a chunk of rows of b.  blockIdx.z is the group, blockIdx.x has 32 units.
template <class Phi>
__device__ __forceinline__ void positives(CK_POSITIVES_PARAMETERS) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, unit = blockIdx.x * 32 + lane;
  const int chunk = (m + gridDim.y - 1) / gridDim.y;
  const int64_t group = blockIdx.z, end = static_cast<int64_t>(blockIdx.y + 1) * chunk, last = end < m ? end : m;
  float sum = 0.0f;
  if (unit < h) {
    const float of_l = upstream(g_l, group);
    const float weight = load_as_float(w, w_dtype, group * h + unit) * (upstream(g_j, group) / n);
    for (int64_t j = static_cast<int64_t>(blockIdx.y) * chunk + warp; j < last; j += POSITIVE_THREADS / 32) {
      const int64_t i = j - first_positive, at_b = (group * m + j) * h + unit, at_a = (group * n + i) * h + unit;
      float positive = 0.0f;
      if (i >= 0 && i < n) {
        const ValueAndSlope f = Phi::at(load_as_float(a, dtype, at_a) + load_as_float(b, dtype, at_b), slope);
        positive = f.slope * weight;
        sum += f.value;
        if (da) store_as(da, dtype, at_a, load_as_float(da_of_l, dtype, at_a) * of_l + positive);
      }
      if (db) store_as(db, dtype, at_b, load_as_float(db_of_l, dtype, at_b) * of_l + positive);
    }
  }
  if (!parts) return;
  __shared__ float shared[POSITIVE_THREADS / 32][32];
  shared[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || unit >= h) return;
  for (int i = 1; i < POSITIVE_THREADS / 32; i++) sum += shared[i][lane];
  parts[(group * gridDim.y + blockIdx.y) * h + unit] = sum;
}

// dw (h,) = g_l dw_of_l + (g_j / n) times the sum of `count` parts, each (h,).  blockIdx.y is the group.
extern "C" __global__ void __launch_bounds__(POSITIVE_THREADS)
    additive_moments_positive_weights_kernel(const float* parts, int count, int n, int h, const float* g_j,
                                             const float* g_l, const void* dw_of_l, void* dw, int dtype) {
  const int unit = blockIdx.x * POSITIVE_THREADS + threadIdx.x;
  const int64_t group = blockIdx.y, at = group * h + unit;
  if (unit >= h) return;
  double sum = 0.0;
  for (int i = 0; i < count; i++) sum += parts[(group * count + i) * h + unit];
  const float of_j = static_cast<float>(sum) * (upstream(g_j, group) / n);
  store_as(dw, dtype, at, load_as_float(dw_of_l, dtype, at) * upstream(g_l, group) + of_j);
}

}  // namespace cuda
}  // namespace ck
