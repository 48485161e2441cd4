// The two moments of a separable critic over all pairs; the mathematics is in cibr_kernels/ops/dot_moments/op.py.
#pragma once

#include "common/isa.h"
#include "common/problem.h"

namespace ck {

struct DotMomentsForward : DotProblem {
  float* moments;  // (2,) J, L
};

struct DotMomentsBackward : DotProblem {
  const float *grad_j, *grad_l;  // (1,)
  const float* el;               // (1,) L from the forward
  void *dx, *dy;                 // (n, d) (m, d), each null unless needed
};

CK_DECLARE(dot_moments_forward, DotMomentsForward)
CK_DECLARE(dot_moments_backward, DotMomentsBackward)

}  // namespace ck
