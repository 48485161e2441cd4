// clip_loss on the CPU: the loss and its weights, O(n), around the sweeps of common/dot.h.
#include "clip_loss.h"

#include "common/dot.h"

namespace ck {
namespace CK_ISA {

static double softplus(double t) { return t > 0 ? t + ::log1p(::exp(-t)) : ::log1p(::exp(t)); }

static double sigmoid(double t) { return t > 0 ? 1 / (1 + ::exp(-t)) : ::exp(t) / (1 + ::exp(t)); }

static double logaddexp(double a, double b) { return a > b ? a + ::log1p(::exp(b - a)) : b + ::log1p(::exp(a - b)); }

void clip_loss_forward(const ClipLossForward& p) {
  dot_forward(p);
  double rows = 0, cols = 0;
  for (int64_t i = 0; i < p.n; i++) {
    rows += softplus(static_cast<double>(p.row_lse[i]) - p.positives[i]);
    if (!p.one_way) cols += softplus(static_cast<double>(p.col_lse[p.offset + i]) - p.positives[i]);
  }
  *p.loss = static_cast<float>((p.one_way ? rows : (rows + cols) / 2) / p.n);
}

void clip_loss_backward(const ClipLossBackward& p) {
  Buffer<float> row_lse(p.n), row_weight(p.n), col_lse(p.m), col_weight(p.m), positive_grad(p.n);
  const double each = *p.grad / (p.one_way ? 1.0 : 2.0) / p.n;
  for (int64_t j = 0; j < p.m; j++) col_lse.data[j] = col_weight.data[j] = 0;
  for (int64_t i = 0; i < p.n; i++) {
    const double l = p.positives[i], rows = p.row_lse[i], cols = p.one_way ? 0 : p.col_lse[p.offset + i];
    row_lse.data[i] = static_cast<float>(logaddexp(rows, l));
    row_weight.data[i] = static_cast<float>(each);
    if (!p.one_way) {
      col_lse.data[p.offset + i] = static_cast<float>(logaddexp(cols, l));
      col_weight.data[p.offset + i] = static_cast<float>(each);
    }
    positive_grad.data[i] = static_cast<float>(-each * (sigmoid(rows - l) + (p.one_way ? 0 : sigmoid(cols - l))));
  }
  DotBackward q{};
  static_cast<DotProblem&>(q) = p;
  q.row_lse = row_lse.data;
  q.row_weight = row_weight.data;
  q.col_lse = p.one_way ? nullptr : col_lse.data;
  q.col_weight = p.one_way ? nullptr : col_weight.data;
  q.positive_grad = positive_grad.data;
  q.stash = p.stash;
  q.stash_dtype = p.stash_dtype;
  q.stash_offset = p.stash ? *p.stash_offset : 0;
  q.dx = p.dx;
  q.dy = p.dy;
  double dscale = 0;
  q.dscale = &dscale;
  dot_backward(q);
  *p.dscale = static_cast<float>(dscale);
}

}  // namespace CK_ISA
}  // namespace ck
