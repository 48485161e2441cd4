// The CLIP loss and, of a small batch, its gradients; the mathematics is in cibr_kernels/losses/clip/fast_path.py.
#pragma once

#include "common/isa.h"
#include "dot/problem.h"

namespace ck {

CK_DECLARE(clip_loss, ClipLoss)

}  // namespace ck
