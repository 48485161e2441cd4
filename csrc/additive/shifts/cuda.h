// additive_shifts on a CUDA device: additive_shifts.h's problem with device pointers.
#pragma once

#include "additive/shifts/additive_shifts.h"
#include "common/cuda/launch.h"

namespace ck {
namespace cuda {

// `a`, `b`, `da`, `db` point to `dtype`, `w` and `dw` to `w_dtype` (common/dtype.h); scores and g are float32.
// 1 <= n <= m < 2^30, 0 <= first, 1 <= k, first + k < 2^30, h >= 1.
struct AdditiveShifts : ck::AdditiveShifts {
  int32_t dtype, w_dtype;
  int32_t device;
  void* workspace;  // additive_shifts_backward_workspace(p) bytes; the forward has none
  void* stream;     // a cudaStream_t
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
