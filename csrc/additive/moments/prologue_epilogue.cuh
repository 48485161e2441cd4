// The O((n + m) h) work before and after the sweeps: operands transposed and padded, the centre of each unit, the linear
// parts of the scores, the sums that make L, and the scaling of the gradients.
//
// Kernels that treat a and b alike take blockIdx.z for the side and the group, 2 group + side.  Each array has one part for
// each group of a and b, one after the other.
#pragma once

#include "additive/moments/scores.cuh"

namespace ck {
namespace cuda {

constexpr int END_THREADS = 256;
constexpr int TOTAL_THREADS = 1024;

// low and high (groups, 2, chunks, h): the least and the greatest of a chunk of rows, NaN where one is NaN or infinite.
extern "C" __global__ void __launch_bounds__(END_THREADS)
    additive_moments_range_kernel(const void* a, const void* b, int dtype, int n, int m, int h, float* low,
                                  float* high) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, side = blockIdx.z % 2, unit = blockIdx.x * 32 + lane;
  const void* x = side ? b : a;
  const int rows = side ? m : n;
  const int64_t row0 = static_cast<int64_t>(blockIdx.z / 2) * rows, chunk = (rows + gridDim.y - 1) / gridDim.y;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * chunk, last = first + chunk < rows ? first + chunk : rows;
  float least = INFINITY, greatest = -INFINITY, zero = 0.0f;
  if (unit < h)
    for (int64_t row = first + warp; row < last; row += END_THREADS / 32) {
      const float v = load_as_float(x, dtype, (row0 + row) * h + unit);
      least = fminf(least, v), greatest = fmaxf(greatest, v);
      zero += v * 0.0f;  // NaN where v is not finite
    }
  __shared__ float shared[3][END_THREADS / 32][32];
  shared[0][warp][lane] = least, shared[1][warp][lane] = greatest, shared[2][warp][lane] = zero;
  __syncthreads();
  if (warp != 0 || unit >= h) return;
  for (int i = 1; i < END_THREADS / 32; i++) {
    least = fminf(least, shared[0][i][lane]), greatest = fmaxf(greatest, shared[1][i][lane]);
    zero += shared[2][i][lane];
  }
  const int64_t at = (static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * h + unit;
  low[at] = least + zero, high[at] = greatest + zero;
}

// centre_h = -max(a, -b) for the a and the b of unit h nearest to 0: max(a, -b) + b loses digits where both are large
// together, so a + centre and b - centre stand in their place.  weights (units,) = (1 - leak) w, 0 in the padding.
// *poison is NaN if any input is NaN or infinite, else 0.  A block is a group.
extern "C" __global__ void __launch_bounds__(END_THREADS)
    additive_moments_centre_kernel(const float* low, const float* high, int chunks, const void* w, int dtype, int h,
                                   int units, float slope, float leak, float* centre, float* weights, float* poison) {
  const int64_t group = blockIdx.x;
  float zero = slope * 0.0f;
  for (int unit = threadIdx.x; unit < units; unit += END_THREADS) {
    float c = 0.0f, wk = 0.0f;
    if (unit < h) {
      float nearest[2];
      for (int side = 0; side < 2; side++) {
        float least = INFINITY, greatest = -INFINITY;
#pragma unroll 1  // more would not fit its registers
        for (int i = 0; i < chunks; i++) {
          const int64_t at = ((2 * group + side) * chunks + i) * h + unit;
          if (low[at] > high[at]) continue;  // a chunk without rows
          zero += low[at] * 0.0f;
          least = fminf(least, low[at]), greatest = fmaxf(greatest, high[at]);
        }
        nearest[side] = least > 0.0f ? least : greatest < 0.0f ? greatest : 0.0f;
      }
      c = nearest[0] > -nearest[1] ? -nearest[0] : nearest[1];
      wk = load_as_float(w, dtype, group * h + unit);
      zero += wk * 0.0f;
    }
    centre[group * units + unit] = c;
    weights[group * units + unit] = (1.0f - leak) * wk;
  }
  __shared__ float shared[END_THREADS / 32];
  zero = block_reduce<END_THREADS>(zero, shared, Add());
  if (threadIdx.x == 0) poison[group] = zero;
}

// at (units, n_padded) and bt (units, m_padded): a and b in float32, transposed, 0 in the padding.
extern "C" __global__ void __launch_bounds__(END_THREADS)
    additive_moments_pack_kernel(const void* a, const void* b, int dtype, int n, int m, int h, int64_t n_padded,
                                 int64_t m_padded, float* at, float* bt) {
  __shared__ float tile[32][33];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, side = blockIdx.z % 2, unit0 = blockIdx.y * 32;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * 32, stride = side ? m_padded : n_padded;
  const int rows = side ? m : n;
  const int64_t group = blockIdx.z / 2, units = gridDim.y * 32;
  if (row0 >= stride) return;
  for (int i = warp; i < 32; i += END_THREADS / 32) {
    const bool inside = row0 + i < rows && unit0 + lane < h;
    tile[i][lane] = inside ? load_as_float(side ? b : a, dtype, (group * rows + row0 + i) * h + unit0 + lane) : 0.0f;
  }
  __syncthreads();
  for (int i = warp; i < 32; i += END_THREADS / 32)
    (side ? bt : at)[(group * units + unit0 + i) * stride + row0 + lane] = tile[lane][i];
}

// phi(t) = leak t + (1 - leak) max(t, 0) and max(a + b, 0) = max(a + c, c - b) + (b - c):
// row_term_i = leak sum w a, column_term_j = sum w (b - (1 - leak) c).
extern "C" __global__ void __launch_bounds__(END_THREADS)
    additive_moments_terms_kernel(const void* a, const void* b, int dtype, int n, int m, int h, const void* w,
                                  int w_dtype, const float* centre, int units, float leak, float* row_term,
                                  float* column_term) {
  const int lane = threadIdx.x % 32, side = blockIdx.z % 2, rows = side ? m : n;
  const int64_t group = blockIdx.z / 2;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (END_THREADS / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  double sum = 0.0;
  if (side || leak != 0.0f)
    for (int unit = lane; unit < h; unit += 32) {
      const double x = load_as_float(side ? b : a, dtype, (group * rows + row) * h + unit);
      const double wk = load_as_float(w, w_dtype, group * h + unit);
      sum += wk * (side ? x - (1.0 - leak) * centre[group * units + unit] : leak * x);
    }
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  if (lane == 0) (side ? column_term : row_term)[group * rows + row] = static_cast<float>(sum);
}

// Adds a panel's tiles to the running sum of exponentials: running (2,) is the largest score so far and the sum of
// e^{S - largest}.  shift[panel] is that largest, the unit of the panel's P; factor[panel] brings earlier sums to it.  The
// last panel also gives *j, *el and *lse.  A block is a group; shift and factor have `panels` numbers of each.
extern "C" __global__ void __launch_bounds__(TOTAL_THREADS)
    additive_moments_total_kernel(const float* tile_max, const float* tile_sum, int64_t tiles, int panel, int panels,
                                  const float* positives, int n, int m, int include_diagonal, const float* poison,
                                  const float* bias, double* running, float* shift, float* factor, float* lse, float* j,
                                  float* el) {
  const int64_t group = blockIdx.x;
  const bool last = panel + 1 == panels;
  tile_max += group * tiles, tile_sum += group * tiles, positives += group * n, running += 2 * group;
  shift += group * panels, factor += group * panels;
  __shared__ double shared[TOTAL_THREADS / 32];
  double top = -INFINITY;
  for (int64_t i = threadIdx.x; i < tiles; i += TOTAL_THREADS) top = fmax(top, static_cast<double>(tile_max[i]));
  top = block_reduce<TOTAL_THREADS>(top, shared, Max());
  const double before = panel ? running[0] : -INFINITY, mass_before = panel ? running[1] : 0.0;
  const double largest = fmax(before, top), unit = largest == -INFINITY ? 0.0 : largest;
  double mass = 0.0;
  for (int64_t i = threadIdx.x; i < tiles; i += TOTAL_THREADS)
    if (tile_sum[i] != 0.0f)  // and NaN is not
      mass += static_cast<double>(tile_sum[i]) *
              exp_fast(static_cast<float>((tile_max[i] == -INFINITY ? 0.0 : tile_max[i]) - unit));
  mass = block_reduce<TOTAL_THREADS>(mass, shared, Add());
  double sum = 0.0;
  if (last) {
    for (int64_t i = threadIdx.x; i < n; i += TOTAL_THREADS) sum += positives[i];
    sum = block_reduce<TOTAL_THREADS>(sum, shared, Add());
  }
  if (threadIdx.x != 0) return;
  const double rescale = before == -INFINITY ? 0.0 : exp(before - unit);
  const double total = mass_before * rescale + mass;
  running[0] = largest, running[1] = total;
  shift[panel] = static_cast<float>(largest), factor[panel] = static_cast<float>(rescale);
  if (!last) return;
  const double log_sum = largest + log(total) + poison[group];
  const float c = bias ? bias[group] : 0.0f;
  const double pairs = static_cast<double>(n) * m - (include_diagonal ? 0 : n);
  lse[group] = static_cast<float>(log_sum);
  j[group] = static_cast<float>(sum / n) + poison[group] + c;
  el[group] = static_cast<float>(log_sum - log(pairs)) + c;
}

// u (size,) = *factor u, or 0 if factor is null, plus the `count` parts, each (size,).  blockIdx.y is the group, whose u is
// u_of_group further, whose factor is `panels` further.
extern "C" __global__ void __launch_bounds__(END_THREADS)
    additive_moments_fold_kernel(const float* parts, int count, int64_t size, const float* factor, int panels, float* u,
                                 int64_t u_of_group) {
  const int64_t group = blockIdx.y;
  parts += group * count * size, u += group * u_of_group;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * END_THREADS + threadIdx.x;
  if (at >= size) return;
  float sum = factor ? factor[group * panels] * u[at] : 0.0f;
  for (int i = 0; i < count; i++) sum += parts[i * size + at];
  u[at] = sum;
}

// u, the sum of `folds` arrays (count, h), in the unit e^{shift[row / panel_rows]} becomes the gradient g (count, h) = w U,
// U = u e^{shift - lse}; g may be u (of one fold) or null.  parts (gridDim.y, h) or null: sum over a chunk of rows of
// (x + sign centre) U, the share of dw as phi = t phi'; the next group's parts_of_group further.  blockIdx.z is the group.
extern "C" __global__ void __launch_bounds__(END_THREADS)
    additive_moments_scale_kernel(const void* x, int dtype, int count, int h, float sign, const float* centre,
                                  int units, const float* u, int folds, const float* shift, int panels, int panel_rows,
                                  const float* lse, const void* w, int w_dtype, void* g, float* parts,
                                  int64_t parts_of_group) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, unit = blockIdx.x * 32 + lane;
  const int chunk = (count + gridDim.y - 1) / gridDim.y;
  const int64_t group = blockIdx.z, size = static_cast<int64_t>(count) * h;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * chunk, last = first + chunk < count ? first + chunk : count;
  u += group * folds * size, shift += group * panels;
  float sum = 0.0f;
  if (unit < h) {
    const float wk = load_as_float(w, w_dtype, group * h + unit), c = sign * centre[group * units + unit];
    const float total = lse[group];
    for (int64_t row = first + warp; row < last; row += END_THREADS / 32) {
      const int64_t at = row * h + unit;
      float whole = u[at];
#pragma unroll 1  // one or a few; its registers are worth more
      for (int i = 1; i < folds; i++) whole += u[i * size + at];
      const float scaled = whole * exp_fast(shift[static_cast<int>(row) / panel_rows] - total);
      if (parts) sum = fmaf(load_as_float(x, dtype, group * size + at) + c, scaled, sum);
      if (g) store_as(g, dtype, group * size + at, wk * scaled);
    }
  }
  if (!parts) return;
  __shared__ float shared[END_THREADS / 32][32];
  shared[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || unit >= h) return;
  for (int i = 1; i < END_THREADS / 32; i++) sum += shared[i][lane];
  parts[group * parts_of_group + static_cast<int64_t>(blockIdx.y) * h + unit] = sum;
}

// dw (h,) = the sum of `count` parts, each (h,), times e^{*shift - *lse} if shift is not null.  blockIdx.y is the group.
extern "C" __global__ void __launch_bounds__(END_THREADS)
    additive_moments_weights_kernel(const float* parts, int count, int h, const float* shift, int panels,
                                    const float* lse, void* dw, int dtype) {
  const int unit = blockIdx.x * END_THREADS + threadIdx.x;
  const int64_t group = blockIdx.y;
  if (unit >= h) return;
  double sum = 0.0;
  for (int i = 0; i < count; i++) sum += parts[(group * count + i) * h + unit];
  const double unscaled = shift ? sum * exp_fast(shift[group * panels] - lse[group]) : sum;
  store_as(dw, dtype, group * h + unit, static_cast<float>(unscaled));
}

}  // namespace cuda
}  // namespace ck
