// siglip_loss on the CPU: the positives, O(n d), then dot_softplus with their gradients.
//
//     l_i = scale <x_i, y_i> + bias     loss = share [ sum softplus(-l_i) + sum_{i != j} softplus(l_ij) ]
#include "losses/siglip/siglip_loss.h"

#include <math.h>

#include "common/buffer.h"
#include "common/simd.h"
#include "dot/softplus/dot_softplus.h"

namespace ck {
namespace CK_ISA {

template <typename S>
static void dot_rows(const SiglipLoss& p, float* dots) {
  const S *x = static_cast<const S*>(p.x), *y = static_cast<const S*>(p.y);
#pragma omp parallel for num_threads(p.threads)
  for (int64_t i = 0; i < p.n; i++) {
    floats8 sums[4] = {};
    double dot = 0;
    int64_t c = 0;
    for (; c + 32 <= p.d; c += 32)
      for (int v = 0; v < 4; v++) sums[v] += load8(x + i * p.d + c + 8 * v) * load8(y + i * p.d + c + 8 * v);
    for (; c < p.d; c++) dot += static_cast<double>(to_float(x[i * p.d + c])) * to_float(y[i * p.d + c]);
    const floats8 all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int v = 0; v < 8; v++) dot += all[v];
    dots[i] = static_cast<float>(dot);
  }
}

void siglip_loss(const SiglipLoss& p) {
  const bool gradients = p.dx || p.dy;
  Buffer<float> logits(p.n), sums(p.n), weights(gradients ? p.n : 0), positive_grad(gradients ? p.n : 0);
  if (p.dtype == kBFloat16)
    dot_rows<bf16>(p, logits.data);
  else if (p.dtype == kFloat16)
    dot_rows<fp16>(p, logits.data);
  else
    dot_rows<float>(p, logits.data);
  double loss = 0, dbias = 0;
  for (int64_t i = 0; i < p.n; i++) {
    const float l = p.scale * logits.data[i] + p.bias, e = ::expf(-::fabsf(l));
    loss += (l < 0 ? -l : 0) + static_cast<double>(::log1pf(e));
    if (!gradients) continue;
    weights.data[i] = p.share;
    positive_grad.data[i] = -p.share * (l < 0 ? 1 / (1 + e) : e / (1 + e));
    dbias += positive_grad.data[i];
  }
  float sum_dbias = 0;
  DotSoftplus s{};
  static_cast<DotGradient&>(s) = p;
  s.positive_grad = positive_grad.data, s.bias = p.bias;
  s.row_weight = weights.data, s.row_sum = sums.data, s.dbias = &sum_dbias;
  dot_softplus(s);
  for (int64_t i = 0; i < p.n; i++) loss += sums.data[i];
  *p.loss = static_cast<float>(p.share * loss);
  if (gradients) *p.dbias = static_cast<float>(dbias + sum_dbias);
}

}  // namespace CK_ISA
}  // namespace ck
