// additive_moments on a CUDA device: additive_moments.h's problem with device pointers.
#pragma once

#include "additive/moments/additive_moments.h"
#include "common/cuda/launch.h"

namespace ck {
namespace cuda {

// `a`, `b`, `da`, `db` point to `dtype`, `w` and `dw` to `w_dtype` (common/dtype.h); moments are float32.  n, m < 2^31 - 128.
struct AdditiveMoments : ck::AdditiveMoments {
  int32_t dtype, w_dtype;
  int32_t groups;  // of tensors, one after the other: a (groups, n, h), w (groups, h), j (groups,) ...
  int32_t device, processors;
  int64_t score_budget;  // bytes of scores kept at a time; at least 128 rows of them are
  void* workspace;       // additive_moments_workspace(p) bytes, 256-byte aligned
  void* stream;          // a cudaStream_t
};

// Its backward, for gradients g_j and g_l (groups,) of J and L, null for 0.  Pointers as there; each of da, db and dw is null
// where it is not needed, or has the gradient of L that the forward made beside it.
struct AdditiveMomentsBackward {
  const void *a, *b, *w;
  int64_t n, m, h, first_positive;
  int32_t activation, dtype, w_dtype, groups;
  float slope;
  const float *g_j, *g_l;
  const void *da_of_l, *db_of_l, *dw_of_l;
  void *da, *db, *dw;
  int32_t device;
  void* workspace;  // additive_moments_backward_workspace(p) bytes, 256-byte aligned
  void* stream;     // a cudaStream_t
};

// Bytes; depends on everything but the pointers, and on which of them are null.
int64_t additive_moments_workspace(const AdditiveMoments& p);
int64_t additive_moments_backward_workspace(const AdditiveMomentsBackward& p);

// Enqueues the kernels; returns a cudaError_t.  Nothing waits for the device.
int additive_moments(const AdditiveMoments& p);
int additive_moments_backward(const AdditiveMomentsBackward& p);

// What they would launch.
Plan additive_moments_plan(const AdditiveMoments& p);
Plan additive_moments_backward_plan(const AdditiveMomentsBackward& p);

}  // namespace cuda
}  // namespace ck
