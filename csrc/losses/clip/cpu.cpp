// clip_loss on the CPU: dot_lse forward, O(n) arithmetic and, where gradients are wanted, dot_lse backward from the
// exponentials, which are still in cache.
//
//     t_i = R_i - p_i, and C_i - p_i     loss = 1/kn sum softplus(t)     u = v = sigmoid(t) / kn     dp = -(u + v)
#include "losses/clip/clip_loss.h"

#include <math.h>

#include "common/buffer.h"
#include "dot/lse/dot_lse.h"

namespace ck {
namespace CK_ISA {

// Replaces sums by the gradients of their share of the loss, takes those from positive_grad, and returns the share.
static double softplus_terms(int64_t n, const float* sums, const float* positives, float share, float* gradients,
                             float* positive_grad) {
  double total = 0;
  for (int64_t i = 0; i < n; i++) {
    const float t = sums[i] - positives[i], e = ::expf(-::fabsf(t));
    total += (t > 0 ? t : 0) + static_cast<double>(::log1pf(e));
    gradients[i] = share * (t > 0 ? 1 / (1 + e) : e / (1 + e));  // as the loss: NaN where t is, 0 for -infinity
    positive_grad[i] -= gradients[i];
  }
  return total * share;
}

void clip_loss(const ClipLoss& p) {
  const int64_t n = p.n, blocks = (n + 31) / 32;
  const bool both = !p.one_way, gradients = p.dx || p.dy;
  Buffer<float> rows(n), cols(both ? n : 0), positives(n), row_grad(n), col_grad(both ? n : 0),
      stash(gradients ? blocks * n * 32 : 0);
  ZeroBuffer<float> positive_grad(n);
  float stash_shift = 0;
  DotForward f{};
  static_cast<DotProblem&>(f) = p;
  f.mask_positives = 1;
  f.row_lse = rows.data, f.col_lse = cols.data, f.positives = positives.data;
  f.stash = stash.data, f.stash_dtype = kFloat32, f.stash_shift = &stash_shift;
  dot_lse_forward(f);

  const float share = 1.0f / (both ? 2 * n : n);
  double loss = softplus_terms(n, rows.data, positives.data, share, row_grad.data, positive_grad.data);
  if (both) loss += softplus_terms(n, cols.data, positives.data, share, col_grad.data, positive_grad.data);
  *p.loss = static_cast<float>(loss);
  if (!gradients) return;

  DotBackward b{};
  static_cast<DotGradient&>(b) = p;
  b.positive_grad = positive_grad.data, b.mask_positives = 1;
  b.row_lse = rows.data, b.row_weight = row_grad.data, b.col_lse = cols.data, b.col_weight = col_grad.data;
  b.stash = stash.data, b.stash_dtype = kFloat32, b.stash_shift = stash_shift;
  dot_lse_backward(b);
}

}  // namespace CK_ISA
}  // namespace ck
