// What the dot family computes: scores l_ij = scale <x_i, y_j>, reduced over rows and columns (csrc/common/dot.h).
#pragma once

#include <cstdint>

#include "dtype.h"

namespace ck {

struct DotProblem {
  const void* x;  // (n, d) row-major, contiguous
  const void* y;  // (m, d)
  int32_t dtype;  // of x, y, dx, dy
  int64_t n, m, d;
  float scale;
  int64_t offset;         // row i's positive is column offset + i; offset + n <= m
  int32_t mask_positives; // 1: the positives take no part in the sums
  int32_t threads;
};

struct DotForward : DotProblem {
  float* row_lse;    // (n,)  log sum_j exp l_ij
  float* col_lse;    // (m,)  log sum_i exp l_ij, or null
  float* positives;  // (n,)  l_i,offset+i
  void* stash;       // (ceil(m / 32), n, 32) exp(l_ij - stash_offset), or null
  int32_t stash_dtype;
  float* stash_offset;  // (1,) NaN where the stash was not written (online mode)
};

struct DotBackward : DotProblem {
  // P_ij = exp(l_ij - row_lse_i) row_weight_i + exp(l_ij - col_lse_j) col_weight_j
  const float *row_lse, *row_weight;  // (n,)
  const float *col_lse, *col_weight;  // (m,) or null
  const float* positive_grad;         // (n,) d loss / d l_i,offset+i, added exactly
  const void* stash;                  // null: the logits are computed again
  int32_t stash_dtype;
  float stash_offset;
  void* dx;      // (n, d) scale * (P y + positive_grad y), or null
  void* dy;      // (m, d) or null
  double* dscale;  // (1,) sum_ij d loss / d l_ij  <x_i, y_j>
};

}  // namespace ck
