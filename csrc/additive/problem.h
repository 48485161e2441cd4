// What the kernels of an additive critic all take: the counterpart of primitives/additive/problem.py.
#pragma once

#include <cstdint>

#include "additive/activation_names.h"

namespace ck {

struct AdditiveProblem {
  const float *a, *b, *w;  // (n, h), (m, h), (h,) contiguous
  int64_t n, m, h;
  int32_t activation;  // an Activation (additive/activation_names.h)
  float slope;         // leaky_relu's negative slope; elu's alpha
  int32_t threads;
};

}  // namespace ck
