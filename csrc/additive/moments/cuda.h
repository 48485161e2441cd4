// additive_moments on a CUDA device: additive_moments.h's problem with device pointers.
#pragma once

#include "additive/moments/additive_moments.h"
#include "common/cuda/launch.h"

namespace ck {
namespace cuda {

// `a`, `b`, `da`, `db` point to `dtype`, `w` and `dw` to `w_dtype` (common/dtype.h); moments are float32.  n, m < 2^31 - 128.
struct AdditiveMoments : ck::AdditiveMoments {
  int32_t dtype, w_dtype;
  int32_t device, processors;
  int64_t score_budget;  // bytes of scores kept at a time; at least 128 rows of them are
  void* workspace;       // additive_moments_workspace(p) bytes, 256-byte aligned
  void* stream;          // a cudaStream_t
};

// Bytes; depends on everything but the pointers.
int64_t additive_moments_workspace(const AdditiveMoments& p);

// Enqueues the kernels; returns a cudaError_t.  Nothing waits for the device.
int additive_moments(const AdditiveMoments& p);

// What additive_moments would launch.
Plan additive_moments_plan(const AdditiveMoments& p);

}  // namespace cuda
}  // namespace ck
