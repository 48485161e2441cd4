// dot_moments on the CPU: one global log-sum-exp around the sweeps of common/dot.h.
#include "dot_moments.h"

#include "common/dot.h"

namespace ck {
namespace CK_ISA {

static double log_pairs(const DotProblem& p) {
  return ::log(static_cast<double>(p.n) * p.m - (p.mask_positives ? p.n : 0));
}

void dot_moments_forward(const DotMomentsForward& p) {
  Buffer<float> row_lse(p.n), positives(p.n);
  float stash_offset;
  DotForward q{};
  static_cast<DotProblem&>(q) = p;
  q.row_lse = row_lse.data;
  q.positives = positives.data;
  q.stash_offset = &stash_offset;
  dot_forward(q);
  double top = neg_inf(), sum = 0, j = 0;
  for (int64_t i = 0; i < p.n; i++) {
    top = row_lse.data[i] > top ? row_lse.data[i] : top;
    j += positives.data[i];
  }
  for (int64_t i = 0; i < p.n; i++) sum += ::exp(row_lse.data[i] - top);
  p.moments[0] = static_cast<float>(j / p.n);
  p.moments[1] = static_cast<float>(top + ::log(sum) - log_pairs(p));
}

void dot_moments_backward(const DotMomentsBackward& p) {
  Buffer<float> lse(p.n), weight(p.n), positive_grad(p.n);
  const float total = static_cast<float>(*p.el + log_pairs(p));
  for (int64_t i = 0; i < p.n; i++) {
    lse.data[i] = total;
    weight.data[i] = *p.grad_l;
    positive_grad.data[i] = *p.grad_j / p.n;
  }
  double dscale;
  DotBackward q{};
  static_cast<DotProblem&>(q) = p;
  q.row_lse = lse.data;
  q.row_weight = weight.data;
  q.positive_grad = positive_grad.data;
  q.dx = p.dx;
  q.dy = p.dy;
  q.dscale = &dscale;
  dot_backward(q);
}

}  // namespace CK_ISA
}  // namespace ck
