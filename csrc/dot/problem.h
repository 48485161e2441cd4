// What the dot family computes: scores l_ij = scale <x_i, y_j>, reduced over rows and columns (csrc/dot/sweep.h).
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace ck {

struct DotProblem {
  const void* x;  // (n, d) row-major, contiguous
  const void* y;  // (m, d)
  int32_t dtype;  // of x, y, dx, dy
  int64_t n, m, d;
  float scale;
  int64_t
      first_positive;  // row i's positive is column first_positive + i, which exists; for DotSoftplus where it is in [0, m)
  const int32_t *row_ids, *col_ids;  // (n,), (m,) groups, numbered in [0, n + m), or both null; their
                                     // pairs take no part
  int32_t threads;
};

// A problem with gradients for the features: dx = scale (G y + positive_grad y+), dy likewise.
struct DotGradient : DotProblem {
  const float* positive_grad;  // (n,) d loss / d l_i,first_positive+i, added exactly, or null
  void* dx;                    // (n, d) or null
  void* dy;                    // (m, d) or null
  float* dscale;               // (1,) sum_ij d loss / d l_ij  <x_i, y_j>; written where dx or dy is
};

struct DotForward : DotProblem {
  int32_t mask_positives;    // 1: the positives take no part in the sums
  const float* row_limits;   // (n,) or null: a pair with l_ij > row_limits_i takes no part; only without col_lse
  float *row_lse, *col_lse;  // (n,) log sum_j exp l_ij, (m,) log sum_i exp l_ij or null; -inf where the sum is empty
  float *row_max, *col_max;  // (n,) or null, (m,) or null: the largest l_ij of each sum
  float* positives;          // (n,)  l_i,first_positive+i
  void* stash;               // (ceil(m / 32), n, 32) exp(l_ij - stash_shift), or null
  int32_t stash_dtype;
  float* stash_shift;  // (1,) of the exponentials, for the backward; NaN in online mode, which writes no stash
};

struct DotBackward : DotGradient {
  // G_ij = exp(l_ij - row_lse_i) row_weight_i + exp(l_ij - col_lse_j) col_weight_j
  int32_t mask_positives;
  const float* row_limits;            // the forward's
  const float *row_lse, *row_weight;  // (n,)
  const float *col_lse, *col_weight;  // (m,) or null
  const void* stash;                  // null: the logits are computed again
  int32_t stash_dtype;
  float stash_shift;  // the forward's, with or without a stash
};

// The loss of the two directions and its gradients in one call: p_i the positives, R_i and C_i the sums without them,
// loss = mean of softplus(R_i - p_i) and, unless one_way, softplus(C_i - p_i)
struct ClipLoss : DotGradient {  // square, first_positive 0; positive_grad is made here
  int32_t one_way;
  float* loss;  // (1,)
};

// t_ij = l_ij + bias, without the positives; its negative at the pairs of one group that attract
struct DotSoftplus : DotGradient {
  float bias;
  int32_t attract;                       // 0: the pairs of one group take no part
  const float *row_weight, *col_weight;  // (n,), (m,) or null: of the gradients; no row_weight: no gradients
  float *row_sum, *col_sum;              // (n,) sum_j softplus(t_ij), (m,) sum_i softplus(t_ij) or null
  float* dbias;                          // (1,) sum_ij G_ij
};

// The SigLIP loss of the whole batch and its gradients
struct SiglipLoss : DotGradient {  // square, first_positive 0; positive_grad is made here
  float bias, share;               // share: of each pair's softplus in the loss
  float *loss, *dbias;             // (1,), (1,) written where dx or dy is
};

}  // namespace ck
