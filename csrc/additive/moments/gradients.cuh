// U = sum of P phi' over the other operand: over the columns for the rows of a, over the rows for those of b.
//
// A block owns 128 vectors x 64 units, a thread 8 x 4, kept in registers through the whole sum; P = e^{S - shift} is made
// from the stored scores as they are staged.  Per pair and unit: FSET + FFMA for the ReLU family.
#pragma once

#include "additive/moments/scores.cuh"

namespace ck {
namespace cuda {

constexpr int UNITS = 64;   // of a block; operands are padded to a multiple of it
constexpr int OTHERS = 16;  // vectors of the other operand in one stage
constexpr int SWEEP_THREADS = 256;
constexpr int PITCH = OTHERS + 4;  // keeps eight 16-byte reads of neighbouring rows in different banks

template <bool LEAKY>
struct Step {};  // phi' = [t > 0], or slope + (1 - slope) [t > 0]

#define CK_SWEEP_PARAMETERS                                                                                       \
  const float *own, int64_t own_stride, int count, const float *other, int64_t other_stride, const float *scores, \
      int64_t scores_stride, int64_t scores_of_group, int others, int split, int splits, const float *shift,      \
      int panels, int h, float slope, const float *factor, float *u, int64_t u_stride, float *weights
#define CK_SWEEP_ARGUMENTS                                                                                           \
  own, own_stride, count, other, other_stride, scores, scores_stride, scores_of_group, others, split, splits, shift, \
      panels, h, slope, factor, u, u_stride, weights

// blockIdx.z is group * splits + part; each array has one part for each group, shift and factor `panels` numbers.
// own (units, own_stride) and other (units, other_stride) transposed; scores (own, other), or (other, own) if COLUMNS.
// A part sums over others [part split, (part + 1) split), both multiples of OTHERS, into u + z u_stride, (count, h): onto
// *factor times what is there, or onto nothing if factor is null.  weights (blocks z, y; h) or null: sum of P phi over the
// block's vectors; not for Step.
template <class Phi, bool COLUMNS>
__device__ __forceinline__ void sweep(CK_SWEEP_PARAMETERS) {
  constexpr bool RELU = std::is_same_v<Phi, Step<false>>, LEAKY = std::is_same_v<Phi, Step<true>>;
  constexpr bool KINKED = RELU || LEAKY;
  alignas(16) __shared__ float x[2][UNITS][PITCH], p[2][OTHERS][TILE + 4];
  const int thread = threadIdx.x, lane = thread % 16, group = thread / 16;
  const int64_t own0 = static_cast<int64_t>(blockIdx.y) * TILE, unit0 = static_cast<int64_t>(blockIdx.x) * UNITS;
  const int64_t member = blockIdx.z / splits;  // of the groups
  const int first = blockIdx.z % splits * split, last = first + split < others ? first + split : others;
  own += member * gridDim.x * UNITS * own_stride, other += member * gridDim.x * UNITS * other_stride;
  scores += member * scores_of_group, shift += member * panels;
  const float top = *shift == -INFINITY ? 0.0f : *shift;
  // the thread's units are lane + 16 q, its vectors 4 group + {0 1 2 3} and those + 64
  const auto vector = [&](int r) { return 4 * group + r % 4 + r / 4 * 64; };

  float mine[8][4], sum[8][4] = {}, value_sum[4] = {}, mass[4] = {};  // mass: of the p this thread stages
#pragma unroll
  for (int q = 0; q < 4; q++)
#pragma unroll
    for (int r = 0; r < 8; r++) {
      const float v = own[(unit0 + lane + 16 * q) * own_stride + own0 + vector(r)];
      mine[r][q] = KINKED ? -v : v;
    }

  // Of one stage a thread has 4 values of x and twice 4 of p, neighbours in memory: 4 others of a vector or, if COLUMNS, 4
  // vectors of an other.
  float4 next[2];
  const auto fetch = [&](int at, int buffer) {
    copy_async(&x[buffer][thread / 4][thread % 4 * 4],
               other + (unit0 + thread / 4) * other_stride + at + thread % 4 * 4);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if constexpr (COLUMNS)
        next[i] = load4(scores + (at + thread / 32 + 8 * i) * scores_stride + own0 + thread % 32 * 4);
      else
        next[i] = load4(scores + (own0 + thread / 4 + 64 * i) * scores_stride + at + thread % 4 * 4);
    }
  };
  const auto stage = [&](int buffer) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float4 s = next[i];
      const float4 e = make_float4(exp_fast(s.x - top), exp_fast(s.y - top), exp_fast(s.z - top), exp_fast(s.w - top));
      if constexpr (COLUMNS) {
        store4(&p[buffer][thread / 32 + 8 * i][thread % 32 * 4], e);
        if constexpr (LEAKY) mass[0] += e.x, mass[1] += e.y, mass[2] += e.z, mass[3] += e.w;
      } else {
        const int k = thread % 4 * 4, row = thread / 4 + 64 * i;
        p[buffer][k][row] = e.x, p[buffer][k + 1][row] = e.y, p[buffer][k + 2][row] = e.z, p[buffer][k + 3][row] = e.w;
        if constexpr (LEAKY) mass[i] += (e.x + e.y) + (e.z + e.w);
      }
    }
    wait_copies();
  };

  fetch(first, 0);
  stage(0);
  __syncthreads();
  for (int at = first, buffer = 0; at < last; at += OTHERS, buffer ^= 1) {
    const bool more = at + OTHERS < last;
    if (more) fetch(at + OTHERS, buffer ^ 1);
    const auto add = [&](int r, float weight, const float (&theirs)[4]) {
#pragma unroll
      for (int q = 0; q < 4; q++) {
        if constexpr (KINKED) {
          sum[r][q] = fmaf(weight, theirs[q] > mine[r][q] ? 1.0f : 0.0f, sum[r][q]);  // t > 0, exactly
        } else {
          const ValueAndSlope f = Phi::at(mine[r][q] + theirs[q], slope);
          sum[r][q] = fmaf(weight, f.slope, sum[r][q]);
          if constexpr (!COLUMNS) value_sum[q] = fmaf(weight, f.value, value_sum[q]);
        }
      }
    };
    if constexpr (KINKED) {
#pragma unroll 1
      for (int k = 0; k < OTHERS; k += 4) {
        float theirs[4][4];  // [other][unit]
#pragma unroll
        for (int q = 0; q < 4; q++) {
          const float4 v = load4(&x[buffer][lane + 16 * q][k]);
          theirs[0][q] = v.x, theirs[1][q] = v.y, theirs[2][q] = v.z, theirs[3][q] = v.w;
        }
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
          for (int r = 0; r < 8; r += 4) {
            const float4 v = load4(&p[buffer][k + j][vector(r)]);
            add(r, v.x, theirs[j]), add(r + 1, v.y, theirs[j]), add(r + 2, v.z, theirs[j]), add(r + 3, v.w, theirs[j]);
          }
      }
    } else {  // reads cost nothing next to phi: less code
#pragma unroll 1
      for (int k = 0; k < OTHERS; k++) {
        float theirs[4];
#pragma unroll
        for (int q = 0; q < 4; q++) theirs[q] = x[buffer][lane + 16 * q][k];
#pragma unroll
        for (int r = 0; r < 8; r++) add(r, p[buffer][k][vector(r)], theirs);
      }
    }
    if (more) stage(buffer ^ 1);
    __syncthreads();
  }

  float* const shared = &x[0][0][0];  // its last readers are past the barrier
  if constexpr (LEAKY) {              // (4 or 8 threads that staged a vector's p, 128 vectors)
    for (int i = 0; i < (COLUMNS ? 4 : 2); i++)
      shared[COLUMNS ? thread / 32 * TILE + thread % 32 * 4 + i : thread % 4 * TILE + thread / 4 + 64 * i] = mass[i];
    __syncthreads();
  }
  u += blockIdx.z * u_stride;
  const float keep = factor ? factor[member * panels] : 0.0f;
#pragma unroll
  for (int r = 0; r < 8; r++) {
    const int64_t row = own0 + vector(r);
    float constant = 0.0f;
    if constexpr (LEAKY) {
      for (int i = 0; i < (COLUMNS ? 8 : 4); i++) constant += shared[i * TILE + vector(r)];
      constant *= slope;
    }
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const int64_t unit = unit0 + lane + 16 * q;
      if (row >= count || unit >= h) continue;
      float* out = u + row * h + unit;
      const float total = LEAKY ? fmaf(1.0f - slope, sum[r][q], constant) : sum[r][q];
      *out = factor ? fmaf(keep, *out, total) : total;
    }
  }
  if constexpr (!KINKED && !COLUMNS) {
    if (!weights) return;
#pragma unroll
    for (int q = 0; q < 4; q++) shared[group * UNITS + lane + 16 * q] = value_sum[q];  // (16 groups, UNITS)
    __syncthreads();
    if (thread < UNITS && unit0 + thread < h) {
      float total = 0.0f;
      for (int g = 0; g < 16; g++) total += shared[g * UNITS + thread];
      weights[(static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * h + unit0 + thread] = total;
    }
  }
}

}  // namespace cuda
}  // namespace ck
