// Symmetric InfoNCE over all pairs; the mathematics is in cibr_kernels/ops/clip_loss/op.py.
#pragma once

#include "common/isa.h"
#include "common/problem.h"

namespace ck {

struct ClipLossForward : DotForward {
  int32_t one_way;  // 1: rows only
  float* loss;      // (1,)
};

struct ClipLossBackward : DotProblem {
  int32_t one_way;
  const float* grad;                           // (1,) d / d loss
  const float *row_lse, *col_lse, *positives;  // (n,) (m,) (n,) from the forward, without the positives
  const void* stash;                           // from the forward, or null
  int32_t stash_dtype;
  const float* stash_offset;                   // (1,)
  void *dx, *dy;                               // (n, d) (m, d), each null unless needed
  float* dscale;                               // (1,)
};

CK_DECLARE(clip_loss_forward, ClipLossForward)
CK_DECLARE(clip_loss_backward, ClipLossBackward)

}  // namespace ck
