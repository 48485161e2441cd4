// K cyclic shifts of an additive critic on a GPU: K n h pairs and units, so memory sets the time and nothing is packed first.
//
// Both directions keep units in the lanes, 4 neighbours each, so that every load is a run of a row.  4 rows x 4 shifts
// take 4 rows of a and 7 of b.  Deterministic: one writer per number, no atomics.
#include "additive/shifts/cuda.h"

#include "additive/activations.cuh"
#include "common/cuda/launcher.cuh"

namespace ck {
namespace cuda {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int UNITS = 128;  // of a warp: 4 for each lane
constexpr int ROWS = 4;     // of a warp, neighbours
constexpr int SHIFTS = 4;   // of a warp in the forward
constexpr int GROUPS = 4;   // groups of ROWS that a warp of the backward takes one after the other

// 4 units of a row from `unit` on, 0 past the end; `whole`: float32, and every 4 units 16-byte aligned
__device__ inline void load_units(const void* x, int dtype, bool whole, int64_t row, int h, int unit, float (&v)[4]) {
  const int64_t at = row * h + unit;
  if (whole && unit < h) {
    store4(v, load4(static_cast<const float*>(x) + at));
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] = unit + i < h ? load_as_float(x, dtype, at + i) : 0.0f;
}

// i modulo m for -m <= i < 2^32 - m
__device__ inline int modulo(int64_t i, int m) {
  return static_cast<int>(static_cast<uint32_t>(i < 0 ? i + m : i) % static_cast<uint32_t>(m));
}

}  // namespace

#define CK_SHIFT_SCORES_PARAMETERS                                                                                \
  const void *a, const void *b, int dtype, int whole, const void *w, int w_dtype, int n, int m, int h, int first, \
      int k, float slope, float *scores
#define CK_SHIFT_SCORES_ARGUMENTS a, b, dtype, whole, w, w_dtype, n, m, h, first, k, slope, scores

// A warp has ROWS rows x SHIFTS shifts; a block has neighbouring rows, blockIdx.y the shifts.
template <class Phi>
__device__ __forceinline__ void shifted_scores(CK_SHIFT_SCORES_PARAMETERS) {
  const int lane = threadIdx.x % 32;
  const int64_t row0 = (static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32) * ROWS;
  const int shift0 = blockIdx.y * SHIFTS;
  if (row0 >= n) return;
  float sum[ROWS][SHIFTS] = {};
  for (int unit = 4 * lane; unit < h; unit += UNITS) {
    float weight[4], x[ROWS][4], y[ROWS + SHIFTS - 1][4];
    load_units(w, w_dtype, false, 0, h, unit, weight);
#pragma unroll
    for (int i = 0; i < ROWS; i++) load_units(a, dtype, whole, row0 + i < n ? row0 + i : n - 1, h, unit, x[i]);
#pragma unroll
    for (int i = 0; i < ROWS + SHIFTS - 1; i++)
      load_units(b, dtype, whole, modulo(row0 + first + shift0 + i, m), h, unit, y[i]);
#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
      for (int s = 0; s < SHIFTS; s++)
#pragma unroll
        for (int q = 0; q < 4; q++) {
          const float t = x[i][q] + y[i + s][q];
          sum[i][s] = fmaf(weight[q], fmaf(t, 0.0f, Phi::at(t, slope).value), sum[i][s]);  // NaN where t is not finite
        }
  }
#pragma unroll
  for (int i = 0; i < ROWS; i++)
#pragma unroll
    for (int s = 0; s < SHIFTS; s++) {
      float v = sum[i][s];
      for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(0xffffffffu, v, lanes);
      if (lane == 0 && row0 + i < n && shift0 + s < k) scores[static_cast<int64_t>(shift0 + s) * n + row0 + i] = v;
    }
}

#define CK_SHIFT_SWEEP_PARAMETERS                                                                                      \
  const void *own, const void *other, int dtype, int whole, const void *w, int w_dtype, int rows, int n, int m, int h, \
      int first, int k, int direction, float slope, const float *g, void *out, float *weights
#define CK_SHIFT_SWEEP_ARGUMENTS \
  own, other, dtype, whole, w, w_dtype, rows, n, m, h, first, k, direction, slope, g, out, weights

// out (rows, h) or null: the gradient of `own`, a if direction is 1, b if it is -1.  Row i of it meets row
// (i + direction (first + r)) mod m of `other`, in a only if that is below n.
// weights (gridDim.y, h) or null: sum of g phi over the block's rows.  A warp has UNITS units x GROUPS x ROWS rows.
template <class Phi>
__device__ __forceinline__ void shifted_sweep(CK_SHIFT_SWEEP_PARAMETERS) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, unit = blockIdx.x * UNITS + 4 * lane;
  const bool forwards = direction > 0;
  float weight[4], value[4] = {};
  load_units(w, w_dtype, false, 0, h, unit, weight);
  for (int group = 0; group < GROUPS; group++) {
    const int64_t row0 = ((static_cast<int64_t>(blockIdx.y) * GROUPS + group) * WARPS + warp) * ROWS;
    if (row0 >= rows) break;
    float x[ROWS][4], y[ROWS][4], sum[ROWS][4] = {};
    int place[ROWS] = {};  // y[i] is the row of `other` that row0 + i meets, place[i] its number
    const auto load_other = [&](int i) {
      if (forwards || place[i] < n) load_units(other, dtype, whole, place[i], h, unit, y[i]);
    };
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      load_units(own, dtype, whole, row0 + i < rows ? row0 + i : rows - 1, h, unit, x[i]);
      place[i] = modulo(row0 + i + (forwards ? first : -(first % m)), m);
      load_other(i);
    }
    for (int r = 0; r < k; r++) {
      const float* const weights_of_shift = g + static_cast<int64_t>(r) * n;
#pragma unroll
      for (int i = 0; i < ROWS; i++) {
        const int64_t at = forwards ? row0 + i : place[i];
        if (row0 + i >= rows || at >= n) continue;
        const float gi = weights_of_shift[at];
#pragma unroll
        for (int q = 0; q < 4; q++) {
          const float t = x[i][q] + y[i][q];
          const ValueAndSlope f = Phi::at(t, slope);
          sum[i][q] = fmaf(gi, fmaf(t, 0.0f, f.slope), sum[i][q]);  // NaN where t is not finite
          value[q] = fmaf(gi, fmaf(t, 0.0f, f.value), value[q]);
        }
      }
      if (r + 1 == k) break;
      // the window moves by one row, forwards or backwards
      if (forwards) {
#pragma unroll
        for (int i = 0; i + 1 < ROWS; i++) {
          place[i] = place[i + 1];
#pragma unroll
          for (int q = 0; q < 4; q++) y[i][q] = y[i + 1][q];
        }
        place[ROWS - 1] = place[ROWS - 1] + 1 < m ? place[ROWS - 1] + 1 : 0;
        load_other(ROWS - 1);
      } else {
#pragma unroll
        for (int i = ROWS - 1; i > 0; i--) {
          place[i] = place[i - 1];
#pragma unroll
          for (int q = 0; q < 4; q++) y[i][q] = y[i - 1][q];
        }
        place[0] = place[0] > 0 ? place[0] - 1 : m - 1;
        load_other(0);
      }
    }
    if (!out) continue;
#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
      for (int q = 0; q < 4; q++)
        if (row0 + i < rows && unit + q < h) store_as(out, dtype, (row0 + i) * h + unit + q, weight[q] * sum[i][q]);
  }
  if (!weights) return;
  __shared__ float shared[WARPS][UNITS];
#pragma unroll
  for (int q = 0; q < 4; q++) shared[warp][4 * lane + q] = value[q];
  __syncthreads();
  const int mine = blockIdx.x * UNITS + threadIdx.x;
  if (threadIdx.x >= UNITS || mine >= h) return;
  float total = 0.0f;
  for (int i = 0; i < WARPS; i++) total += shared[i][threadIdx.x];
  weights[static_cast<int64_t>(blockIdx.y) * h + mine] = total;
}

// dw (h,) = the sum of `count` parts, each (h,)
extern "C" __global__ void __launch_bounds__(THREADS)
    additive_shifts_weights_kernel(const float* parts, int count, int h, void* dw, int dtype) {
  const int unit = blockIdx.x * THREADS + threadIdx.x;
  if (unit >= h) return;
  double sum = 0.0;
  for (int i = 0; i < count; i++) sum += parts[static_cast<int64_t>(i) * h + unit];
  store_as(dw, dtype, unit, static_cast<float>(sum));
}

#define CK_SHIFT_KERNELS(name, Phi)                                        \
  extern "C" __global__ void __launch_bounds__(THREADS, 2)                 \
      additive_shifts_scores_##name##_kernel(CK_SHIFT_SCORES_PARAMETERS) { \
    shifted_scores<Phi>(CK_SHIFT_SCORES_ARGUMENTS);                        \
  }                                                                        \
  extern "C" __global__ void __launch_bounds__(THREADS, 2)                 \
      additive_shifts_sweep_##name##_kernel(CK_SHIFT_SWEEP_PARAMETERS) {   \
    shifted_sweep<Phi>(CK_SHIFT_SWEEP_ARGUMENTS);                          \
  }

CK_SHIFT_KERNELS(relu, Relu)
CK_SHIFT_KERNELS(leaky_relu, LeakyRelu)
CK_SHIFT_KERNELS(gelu, Gelu)
CK_SHIFT_KERNELS(gelu_tanh, GeluTanh)
CK_SHIFT_KERNELS(silu, Silu)
CK_SHIFT_KERNELS(elu, Elu)
CK_SHIFT_KERNELS(softplus, Softplus)
CK_SHIFT_KERNELS(tanh, Tanh)

namespace {

struct Kernels {
  const char *scores_name, *sweep_name;
  void (*scores)(CK_SHIFT_SCORES_PARAMETERS);
  void (*sweep)(CK_SHIFT_SWEEP_PARAMETERS);
};

#define CK_ENTRY(name)                                                                  \
  {"additive_shifts_scores_" #name "_kernel", "additive_shifts_sweep_" #name "_kernel", \
   additive_shifts_scores_##name##_kernel, additive_shifts_sweep_##name##_kernel}
const Kernels KERNELS[] = {CK_ENTRY(relu), CK_ENTRY(leaky_relu), CK_ENTRY(gelu),     CK_ENTRY(gelu_tanh),
                           CK_ENTRY(silu), CK_ENTRY(elu),        CK_ENTRY(softplus), CK_ENTRY(tanh)};

int blocks(int64_t count, int64_t size) { return static_cast<int>((count + size - 1) / size); }
int row_blocks(int64_t rows) { return blocks(rows, WARPS * ROWS * GROUPS); }

bool whole(const AdditiveShifts& p) {
  const auto aligned = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  return p.dtype == kFloat32 && p.h % 4 == 0 && aligned(p.a) && aligned(p.b);
}

Workspace launch_forward(const AdditiveShifts& p, Launcher& run) {
  const Kernels& kernels = KERNELS[p.activation];
  run(kernels.scores_name, kernels.scores, dim3(blocks(p.n, WARPS * ROWS), blocks(p.k, SHIFTS)), THREADS, p.a, p.b,
      p.dtype, whole(p), p.w, p.w_dtype, p.n, p.m, p.h, p.first, p.k, p.slope, p.scores);
  return Workspace(nullptr);
}

float* take_parts(const AdditiveShifts& p, Workspace& workspace) {
  return workspace.take<float>("parts", p.need_w ? row_blocks(p.n) * p.h : 0);
}

Workspace launch_backward(const AdditiveShifts& p, Launcher& run) {
  Workspace workspace(p.workspace);
  const Kernels& kernels = KERNELS[p.activation];
  float* const parts = take_parts(p, workspace);
  const int unit_blocks = blocks(p.h, UNITS);
  if (p.need_a || p.need_w)
    run(kernels.sweep_name, kernels.sweep, dim3(unit_blocks, row_blocks(p.n)), THREADS, p.a, p.b, p.dtype, whole(p),
        p.w, p.w_dtype, p.n, p.n, p.m, p.h, p.first, p.k, 1, p.slope, p.g, p.need_a ? p.da : nullptr, parts);
  if (p.need_b)
    run(kernels.sweep_name, kernels.sweep, dim3(unit_blocks, row_blocks(p.m)), THREADS, p.b, p.a, p.dtype, whole(p),
        p.w, p.w_dtype, p.m, p.n, p.m, p.h, p.first, p.k, -1, p.slope, p.g, p.db, nullptr);
  if (p.need_w)
    run("additive_shifts_weights_kernel", additive_shifts_weights_kernel, dim3(blocks(p.h, THREADS)), THREADS, parts,
        row_blocks(p.n), p.h, p.dw, p.w_dtype);
  return workspace;
}

}  // namespace

int64_t additive_shifts_forward_workspace(const AdditiveShifts&) { return 0; }

int64_t additive_shifts_backward_workspace(const AdditiveShifts& p) {
  Workspace counter(nullptr);
  take_parts(p, counter);
  return counter.size();
}

int additive_shifts_forward(const AdditiveShifts& p) {
  return launched(p, [&](Launcher& run) { launch_forward(p, run); });
}

int additive_shifts_backward(const AdditiveShifts& p) {
  return launched(p, [&](Launcher& run) { launch_backward(p, run); });
}

Plan additive_shifts_forward_plan(const AdditiveShifts& p) {
  return planned([&](Launcher& run) { return launch_forward(p, run); });
}

Plan additive_shifts_backward_plan(const AdditiveShifts& p) {
  return planned([&](Launcher& run) { return launch_backward(p, run); });
}

}  // namespace cuda
}  // namespace ck
