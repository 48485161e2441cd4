// Scores of an additive critic on k cyclic shifts of the batch, and their gradients, without the (k, n, h) activations.
//
//   S_ri = sum_h w_h phi(t_rih)           t_rih = a_ih + b_jh, j = (i + first + r) mod m, r = 0 ... k - 1
//   da_ih = w_h sum_r g_ri phi'(t_rih)    db_jh = w_h sum over the (r, i) that meet j of g_ri phi'(t_rih)
//   dw_h = sum_ri g_ri phi(t_rih)         g = dL/dS
//
// A NaN or an infinity in a row makes the outputs that it enters NaN: on the CPU the scores of the row, the rows of da and
// db that meet it, and dw.  Results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "additive/problem.h"
#include "common/isa.h"

namespace ck {

struct AdditiveShifts : AdditiveProblem {  // n <= m
  int64_t first, k;
  float* scores;                   // (k, n), forward only
  const float* g;                  // (k, n), backward only
  int32_t need_a, need_b, need_w;  // backward only: which gradients to compute; the pointers of the others may be null
  float *da, *db, *dw;             // (n, h), (m, h), (h,)
};

CK_DECLARE(additive_shifts_forward, AdditiveShifts)
CK_DECLARE(additive_shifts_backward, AdditiveShifts)

}  // namespace ck
