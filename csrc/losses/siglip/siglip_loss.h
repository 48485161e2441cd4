// The SigLIP loss and its gradients; the mathematics is in cibr_kernels/losses/siglip/op.py.
#pragma once

#include "common/isa.h"
#include "dot/problem.h"

namespace ck {

CK_DECLARE(siglip_loss, SiglipLoss)

}  // namespace ck
