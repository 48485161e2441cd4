// Row and column log-sum-exp of all-pairs dot products; the mathematics is in cibr_kernels/primitives/dot/lse/op.py.
#pragma once

#include "common/isa.h"
#include "dot/problem.h"

namespace ck {

CK_DECLARE(dot_lse_forward, DotForward)
CK_DECLARE(dot_lse_backward, DotBackward)

}  // namespace ck
