// Scores of an additive critic for n x m pairs, and the gradients of a weighted sum of them.
//
//   S_ij = sum_h w_h phi(a_ih + b_jh)
//   da_ih = w_h sum_j g_ij phi'(t_ijh)    db_jh = w_h sum_i g_ij phi'(t_ijh)    dw_h = sum_ij g_ij phi(t_ijh)
//
// A NaN or an infinity anywhere in the input makes every output NaN.  Results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "additive/problem.h"
#include "common/isa.h"

namespace ck {

struct AdditiveScores : AdditiveProblem {  // a, b, da, db point to `features_dtype`
  int32_t features_dtype;                  // a Dtype (common/dtype.h)
  float* scores;                           // (n, m), forward
  const float* grad;                       // (n, m), backward
  float *da, *db, *dw;                     // (n, h), (m, h), (h,), backward; null where not needed
};

CK_DECLARE(additive_scores_forward, AdditiveScores)
CK_DECLARE(additive_scores_backward, AdditiveScores)

}  // namespace ck
