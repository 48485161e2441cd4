// Row and column sums of softplus over all-pairs dot products, and the gradients of a weighted sum of them; the
// mathematics is in cibr_kernels/primitives/dot/softplus/op.py.
#pragma once

#include "common/isa.h"
#include "dot/problem.h"

namespace ck {

CK_DECLARE(dot_softplus, DotSoftplus)

}  // namespace ck
