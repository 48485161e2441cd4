// The two moments of an additive critic over all pairs, and the gradients of the second, in one sweep.
//
//   t_ijh = a_ih + b_jh        S_ij = sum_h w_h phi(t_ijh)
//   J = c + mean_i S_{i, first_positive+i}    L = c + log( 1/|P| sum_{(i,j) in P} e^{S_ij} )
//   da_ih = dL/da_ih,  db_jh = dL/db_jh,  dw_h = dL/dw_h
//
// P is all n m pairs, or all but the n positives (i, first_positive + i).  A NaN or an infinity anywhere in a, b or w makes every
// output NaN.  Results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "additive/problem.h"
#include "common/isa.h"

namespace ck {

// All sizes are >= 1, and P is not empty; a, b, da, db point to `features_dtype` on the CPU.
struct AdditiveMoments : AdditiveProblem {
  const float* bias;               // (1,) c, or null for 0
  int64_t first_positive;          // column of row 0's positive; 0 <= first_positive, first_positive + n <= m
  int32_t include_diagonal;        // 1: the positives count among the pairs of L
  int32_t need_a, need_b, need_w;  // which gradients to compute; the pointers of the others may be null
  int32_t features_dtype;          // a Dtype (common/dtype.h); on the CPU
  float *j, *el;        // (1,), (1,) J, L
  float *da, *db, *dw;  // (n, h), (m, h), (h,)
};

// Its backward, for gradients g_j and g_l (groups,) of J and L, null for 0, of `groups` critics one after the other.  Each of
// da, db and dw is null where it is not needed, or has the gradient of L that the forward made beside it.
struct AdditiveMomentsBackward : AdditiveProblem {  // a, b and their gradients point to `features_dtype`
  int64_t first_positive, groups;
  int32_t features_dtype;
  const float *g_j, *g_l;
  const float *da_of_l, *db_of_l, *dw_of_l;
  float *da, *db, *dw;
};

CK_DECLARE(additive_moments, AdditiveMoments)
CK_DECLARE(additive_moments_backward, AdditiveMomentsBackward)

}  // namespace ck
