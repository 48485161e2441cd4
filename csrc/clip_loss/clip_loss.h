// The CLIP loss and, of a small batch, its gradients; the mathematics is in cibr_kernels/ops/clip_loss/plain.py.
#pragma once

#include "common/isa.h"
#include "common/problem.h"

namespace ck {

CK_DECLARE(clip_loss, ClipLoss)

}  // namespace ck
