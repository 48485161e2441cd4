// log-mean-exp of a list of scores; the mathematics is in cibr_kernels/primitives/log_mean_exp/op.py.
#pragma once

#include "common/dtype.h"
#include "common/isa.h"

namespace ck {

struct LogMeanExp {
  const void* scores;   // (count,) contiguous
  const uint8_t* mask;  // (count,) nonzero entries take part; null: all do
  int32_t dtype;        // of scores and dscores
  int64_t count;
  int32_t threads;
  float* el;          // (1,) written by the forward, read by the backward
  const float* grad;  // (1,) backward only
  void* dscores;      // (count,) backward only
};

CK_DECLARE(log_mean_exp_forward, LogMeanExp)
CK_DECLARE(log_mean_exp_backward, LogMeanExp)

}  // namespace ck
