// The SigLIP loss and its gradients; the mathematics is in cibr_kernels/ops/siglip_loss/op.py.
#pragma once

#include "common/isa.h"
#include "common/problem.h"

namespace ck {

CK_DECLARE(siglip_loss, SiglipLoss)

}  // namespace ck
