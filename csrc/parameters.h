// The kernels and the fields of their parameter structs by name: for Python (bindings.cpp) and for a caller without it
// (tests/aarch64/driver.cpp).
#pragma once

#include "additive/moments/additive_moments.h"
#include "additive/scores/additive_scores.h"
#include "additive/shifts/additive_shifts.h"
#include "dot/lse/dot_lse.h"
#include "dot/softplus/dot_softplus.h"
#include "issue_rate/issue_rate.h"
#include "log_mean_exp/log_mean_exp.h"
#include "losses/clip/clip_loss.h"
#include "losses/siglip/siglip_loss.h"

// kernel(name, struct), of each that has copies with products of bf16 (CMakeLists.txt), and of each that has not.
#define CK_BF16_KERNELS(kernel)                                                                         \
  kernel(dot_lse_forward, DotForward) kernel(dot_lse_backward, DotBackward) kernel(clip_loss, ClipLoss) \
      kernel(dot_softplus, DotSoftplus) kernel(siglip_loss, SiglipLoss)
#define CK_FLOAT_KERNELS(kernel)                                                                       \
  kernel(additive_moments, AdditiveMoments) kernel(additive_moments_backward, AdditiveMomentsBackward)         \
      kernel(additive_scores_forward, AdditiveScores) kernel(additive_scores_backward, AdditiveScores)         \
          kernel(additive_shifts_forward, AdditiveShifts) kernel(additive_shifts_backward, AdditiveShifts)     \
              kernel(log_mean_exp_forward, LogMeanExp) kernel(log_mean_exp_backward, LogMeanExp)               \
                  kernel(issue_rate, IssueRate)

namespace ck {

template <typename P>
struct Of {};  // says of which struct each_field tells

// each_field(Of<P>{}, visit) calls visit("n", &P::n) for each field of P, those of its base included.
#define CK_FIELD(name) visit(#name, &P::name)

template <typename Visit>
void each_field(Of<DotProblem>, const Visit& visit) {
  using P = DotProblem;
  CK_FIELD(x), CK_FIELD(y), CK_FIELD(dtype), CK_FIELD(n), CK_FIELD(m), CK_FIELD(d), CK_FIELD(scale),
      CK_FIELD(first_positive), CK_FIELD(row_ids), CK_FIELD(col_ids), CK_FIELD(threads);
}

template <typename Visit>
void each_field(Of<DotGradient>, const Visit& visit) {
  using P = DotGradient;
  each_field(Of<DotProblem>{}, visit);
  CK_FIELD(positive_grad), CK_FIELD(dx), CK_FIELD(dy), CK_FIELD(dscale);
}

template <typename Visit>
void each_field(Of<DotForward>, const Visit& visit) {
  using P = DotForward;
  each_field(Of<DotProblem>{}, visit);
  CK_FIELD(mask_positives), CK_FIELD(row_limits), CK_FIELD(row_lse), CK_FIELD(col_lse), CK_FIELD(row_max),
      CK_FIELD(col_max), CK_FIELD(positives), CK_FIELD(stash), CK_FIELD(stash_dtype), CK_FIELD(stash_shift);
}

template <typename Visit>
void each_field(Of<DotBackward>, const Visit& visit) {
  using P = DotBackward;
  each_field(Of<DotGradient>{}, visit);
  CK_FIELD(mask_positives), CK_FIELD(row_limits), CK_FIELD(row_lse), CK_FIELD(row_weight), CK_FIELD(col_lse),
      CK_FIELD(col_weight), CK_FIELD(stash), CK_FIELD(stash_dtype), CK_FIELD(stash_shift);
}

template <typename Visit>
void each_field(Of<ClipLoss>, const Visit& visit) {
  using P = ClipLoss;
  each_field(Of<DotGradient>{}, visit);
  CK_FIELD(one_way), CK_FIELD(loss);
}

template <typename Visit>
void each_field(Of<DotSoftplus>, const Visit& visit) {
  using P = DotSoftplus;
  each_field(Of<DotGradient>{}, visit);
  CK_FIELD(bias), CK_FIELD(attract), CK_FIELD(row_weight), CK_FIELD(col_weight), CK_FIELD(row_sum), CK_FIELD(col_sum),
      CK_FIELD(dbias);
}

template <typename Visit>
void each_field(Of<SiglipLoss>, const Visit& visit) {
  using P = SiglipLoss;
  each_field(Of<DotGradient>{}, visit);
  CK_FIELD(bias), CK_FIELD(share), CK_FIELD(loss), CK_FIELD(dbias);
}

template <typename Visit>
void each_field(Of<AdditiveProblem>, const Visit& visit) {
  using P = AdditiveProblem;
  CK_FIELD(a), CK_FIELD(b), CK_FIELD(w), CK_FIELD(n), CK_FIELD(m), CK_FIELD(h), CK_FIELD(activation), CK_FIELD(slope),
      CK_FIELD(threads);
}

template <typename Visit>
void each_field(Of<AdditiveMoments>, const Visit& visit) {
  using P = AdditiveMoments;
  each_field(Of<AdditiveProblem>{}, visit);
  CK_FIELD(bias), CK_FIELD(first_positive), CK_FIELD(include_diagonal), CK_FIELD(need_a), CK_FIELD(need_b),
      CK_FIELD(need_w), CK_FIELD(features_dtype), CK_FIELD(j), CK_FIELD(el), CK_FIELD(da), CK_FIELD(db), CK_FIELD(dw);
}

template <typename Visit>
void each_field(Of<AdditiveMomentsBackward>, const Visit& visit) {
  using P = AdditiveMomentsBackward;
  each_field(Of<AdditiveProblem>{}, visit);
  CK_FIELD(first_positive), CK_FIELD(groups), CK_FIELD(features_dtype), CK_FIELD(g_j), CK_FIELD(g_l), CK_FIELD(da_of_l),
      CK_FIELD(db_of_l), CK_FIELD(dw_of_l), CK_FIELD(da), CK_FIELD(db), CK_FIELD(dw);
}

template <typename Visit>
void each_field(Of<AdditiveScores>, const Visit& visit) {
  using P = AdditiveScores;
  each_field(Of<AdditiveProblem>{}, visit);
  CK_FIELD(features_dtype), CK_FIELD(scores), CK_FIELD(grad), CK_FIELD(da), CK_FIELD(db), CK_FIELD(dw);
}

template <typename Visit>
void each_field(Of<AdditiveShifts>, const Visit& visit) {
  using P = AdditiveShifts;
  each_field(Of<AdditiveProblem>{}, visit);
  CK_FIELD(first), CK_FIELD(k), CK_FIELD(scores), CK_FIELD(g), CK_FIELD(need_a), CK_FIELD(need_b), CK_FIELD(need_w),
      CK_FIELD(da), CK_FIELD(db), CK_FIELD(dw);
}

template <typename Visit>
void each_field(Of<LogMeanExp>, const Visit& visit) {
  using P = LogMeanExp;
  CK_FIELD(scores), CK_FIELD(mask), CK_FIELD(dtype), CK_FIELD(count), CK_FIELD(threads), CK_FIELD(el), CK_FIELD(grad),
      CK_FIELD(dscores);
}

template <typename Visit>
void each_field(Of<IssueRate>, const Visit& visit) {
  using P = IssueRate;
  CK_FIELD(iterations), CK_FIELD(threads), CK_FIELD(issued);
}

#undef CK_FIELD

}  // namespace ck
