// Scores of a panel of rows against all columns, the largest of each tile, and the sum of its exponentials.
//
// A block has a tile of 128 x 128 pairs, a thread 8 x 8 of them; both operands come transposed, (units, rows), so that a
// thread reads its 8 rows of one unit with two 16-byte loads.  Per pair and unit: FMNMX + FFMA for the ReLU family.
#pragma once

#include "additive/activations.cuh"

namespace ck {
namespace cuda {

constexpr int TILE = 128;        // rows and columns of a tile of scores; every panel is a whole number of them
constexpr int SCORE_UNITS = 16;  // units of one stage in shared memory
constexpr int SCORE_THREADS = 256;

// ReLU and leaky ReLU.  The part of the score that is linear in a or in b comes with row_term and column_term.
struct Kinked {};

#define CK_SCORES_PARAMETERS                                                                                           \
  const float *a, const float *b, int64_t a_stride, int64_t b_stride, const float *w, const float *centre,             \
      const float *row_term, const float *column_term, int units, int all_units, int first_row, int n, int m,          \
      int first_positive, int include_diagonal, float slope, float *scores, int64_t scores_of_group, float *positives, \
      float *tile_max, float *tile_sum
#define CK_SCORES_ARGUMENTS                                                                                      \
  a, b, a_stride, b_stride, w, centre, row_term, column_term, units, all_units, first_row, n, m, first_positive, \
      include_diagonal, slope, scores, scores_of_group, positives, tile_max, tile_sum

// blockIdx.z is the group if GROUPED; each array has one part for each.  (One critic has no registers for its offsets.)  a (all_units, a_stride) from the panel's first row on,
// b (all_units, b_stride), w (all_units,): the first `units`, a multiple of SCORE_UNITS, with w = 0 in the padding; centre,
// row_term and column_term are read for Kinked only.  scores (rows of the panel, b_stride) or null, -inf outside P and in
// the padding, the next group's scores_of_group further; positives (n,); tile_max and tile_sum (tiles of the panel,).
template <class Phi, bool GROUPED>
__device__ __forceinline__ void scores_of_tile(CK_SCORES_PARAMETERS) {
  constexpr bool KINKED = std::is_same_v<Phi, Kinked>;
  alignas(16) __shared__ float left[2][SCORE_UNITS][TILE], right[2][SCORE_UNITS][TILE], weight[2][SCORE_UNITS];
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * TILE, column0 = static_cast<int64_t>(blockIdx.x) * TILE;
  const int thread = threadIdx.x, tx = thread % 16, ty = thread / 16;
  const int unit = thread / 32, place = thread % 32 * 4;  // what this thread stages: units `unit` and `unit` + 8

  const int64_t group = GROUPED ? blockIdx.z : 0;
  if constexpr (GROUPED) {
    a += group * all_units * a_stride, b += group * all_units * b_stride;
    w += group * all_units, centre += group * all_units;
    row_term += group * n, column_term += group * m, positives += group * n;
    if (scores) scores += group * scores_of_group;
  }
  float4 next_left[2], next_right[2];
  float next_weight = 0.0f;
  const auto fetch = [&](int first_unit) {
    for (int i = 0; i < 2; i++) {
      const int64_t k = first_unit + unit + 8 * i;
      float4 x = load4(a + k * a_stride + row0 + place), y = load4(b + k * b_stride + column0 + place);
      if constexpr (KINKED) {
        const float c = centre[k];
        x = make_float4(x.x + c, x.y + c, x.z + c, x.w + c);
        y = make_float4(c - y.x, c - y.y, c - y.z, c - y.w);
      }
      next_left[i] = x, next_right[i] = y;
    }
    if (thread < SCORE_UNITS) next_weight = w[first_unit + thread];
  };
  const auto stage = [&](int buffer) {
    for (int i = 0; i < 2; i++) {
      store4(&left[buffer][unit + 8 * i][place], next_left[i]);
      store4(&right[buffer][unit + 8 * i][place], next_right[i]);
    }
    if (thread < SCORE_UNITS) weight[buffer][thread] = next_weight;
  };

  // the thread's rows are 4 ty + {0 1 2 3} and those + 64, its columns 4 tx + ... likewise
  float sum[8][8] = {};
  fetch(0);
  stage(0);
  __syncthreads();
  for (int first = 0, buffer = 0; first < units; first += SCORE_UNITS, buffer ^= 1) {
    const bool more = first + SCORE_UNITS < units;
    if (more) fetch(first + SCORE_UNITS);
#pragma unroll(KINKED ? 2 : 1)
    for (int k = 0; k < SCORE_UNITS; k++) {
      float x[8], y[8];
      store4(x, load4(&left[buffer][k][4 * ty])), store4(x + 4, load4(&left[buffer][k][64 + 4 * ty]));
      store4(y, load4(&right[buffer][k][4 * tx])), store4(y + 4, load4(&right[buffer][k][64 + 4 * tx]));
      const float wk = weight[buffer][k];
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) {
          if constexpr (KINKED)
            sum[i][j] = fmaf(wk, fmaxf(x[i], y[j]), sum[i][j]);
          else
            sum[i][j] = fmaf(wk, Phi::at(x[i] + y[j], slope).value, sum[i][j]);
        }
    }
    if (more) stage(buffer ^ 1);
    __syncthreads();
  }

  float highest = -INFINITY;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int64_t row = row0 + 4 * ty + i % 4 + i / 4 * 64, global_row = first_row + row;
    const float of_row = KINKED && global_row < n ? row_term[global_row] : 0.0f;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const int64_t column = column0 + 4 * tx + j % 4 + j / 4 * 64;
      float s = sum[i][j];
      if (KINKED && column < m) s += of_row + column_term[column];
      if (global_row >= n || column >= m) s = -INFINITY;
      if (global_row < n && column == global_row + first_positive) {
        positives[global_row] = s;
        if (!include_diagonal) s = -INFINITY;
      }
      sum[i][j] = s;
      highest = fmaxf(highest, s);
    }
    if (scores) {
      float* out = scores + row * b_stride + column0 + 4 * tx;
      store4(out, make_float4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]));
      store4(out + 64, make_float4(sum[i][4], sum[i][5], sum[i][6], sum[i][7]));
    }
  }
  __shared__ float partial[SCORE_THREADS / 32];
  highest = block_reduce<SCORE_THREADS>(highest, partial, Max());
  const float shift = highest == -INFINITY ? 0.0f : highest;
  float mass = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < 8; j++) mass += exp_fast(sum[i][j] - shift);
  mass = block_reduce<SCORE_THREADS>(mass, partial, Add());
  if (thread == 0) {
    const int64_t tile = (group * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    tile_max[tile] = highest;
    tile_sum[tile] = mass;
  }
}

}  // namespace cuda
}  // namespace ck
