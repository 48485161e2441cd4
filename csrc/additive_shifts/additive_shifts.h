// Scores of an additive critic on K cyclic shifts of the batch, and their gradients.
//
//   S_ri = sum_h w_h phi(t_rih)           t_rih = a_ih + b_jh, j = (i + first + r) mod m, r = 0 ... k - 1
//   da_ih = w_h sum_r g_ri phi'(t_rih)    db_jh = w_h sum over the (r, i) that meet j of g_ri phi'(t_rih)
//   dw_h = sum_ri g_ri phi(t_rih)         g = dL/dS
//
// A NaN or an infinity in a row makes the outputs that it enters NaN.
#pragma once

#include <cstdint>

#include "common/cuda/launch.h"

namespace ck {
namespace cuda {

struct AdditiveShifts {
  const void *a, *b, *w;           // (n, h), (m, h) of `dtype`, (h,) of `w_dtype` (common/dtype.h), contiguous
  int32_t dtype, w_dtype;
  int64_t n, m, h, first, k;       // 1 <= n <= m < 2^30, 0 <= first, 1 <= k, first + k < 2^30, h >= 1
  int32_t activation;              // an Activation (additive_moments/additive_moments.h)
  float slope;                     // leaky_relu's negative slope; elu's alpha
  float* scores;                   // (k, n), forward only
  const float* g;                  // (k, n), backward only
  int32_t need_a, need_b, need_w;  // backward only: which gradients to compute; the pointers of the others may be null
  void *da, *db, *dw;              // as a, b, w
  int32_t device;
  void* workspace;                 // additive_shifts_backward_workspace(p) bytes; the forward has none
  void* stream;                    // a cudaStream_t
};

// Enqueue the kernels; return a cudaError_t.  Nothing waits for the device.
int additive_shifts_forward(const AdditiveShifts& p);
int additive_shifts_backward(const AdditiveShifts& p);
int64_t additive_shifts_forward_workspace(const AdditiveShifts& p);
int64_t additive_shifts_backward_workspace(const AdditiveShifts& p);
// What they would launch.
Plan additive_shifts_forward_plan(const AdditiveShifts& p);
Plan additive_shifts_backward_plan(const AdditiveShifts& p);

}  // namespace cuda
}  // namespace ck
