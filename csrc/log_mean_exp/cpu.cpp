// log_mean_exp on the CPU: fixed pieces of 16384 scores, each with its own maximum, merged in order in double.
#include "log_mean_exp/log_mean_exp.h"

#include <math.h>

#include "common/buffer.h"
#include "common/simd.h"

namespace ck {
namespace CK_ISA {

constexpr int64_t kPiece = 1 << 14;

template <typename S>
static vf load_scores(const LogMeanExp& p, int64_t i, int64_t end) {  // -infinity where nothing takes part
  const S* s = static_cast<const S*>(p.scores);
  vf v = broadcast(neg_inf());
  const int64_t n = end - i < VL ? end - i : VL;
  for (int64_t k = 0; k < n; k++)
    if (!p.mask || p.mask[i + k]) v[k] = to_float(s[i + k]);
  return v;
}

template <typename S>
static void forward(const LogMeanExp& p) {
  const int64_t pieces = (p.count + kPiece - 1) / kPiece;
  Buffer<float> tops(pieces);
  Buffer<double> sums(pieces);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t piece = 0; piece < pieces; piece++) {
    const int64_t begin = piece * kPiece, end = begin + kPiece < p.count ? begin + kPiece : p.count;
    vf top = broadcast(neg_inf()), bad{};
    for (int64_t i = begin; i < end; i += VL) {
      const vf v = load_scores<S>(p, i, end);
      top = vmax(v, top);
      bad += v != v ? v : vf{};
    }
    const float largest = reduce_max(top), nan = reduce_add(bad);
    vf sum{};
    if (largest > neg_inf() && largest < -neg_inf())
      for (int64_t i = begin; i < end; i += VL) sum += vexp(load_scores<S>(p, i, end) - largest);
    tops.data[piece] = nan != nan ? nan : largest;
    sums.data[piece] = largest == -neg_inf() ? 1 : reduce_add(sum);
  }
  double top = neg_inf(), total = 0, pairs = 0;
  bool bad = false;
  for (int64_t k = 0; k < pieces; k++) {
    bad |= tops.data[k] != tops.data[k];
    top = tops.data[k] > top ? tops.data[k] : top;
  }
  for (int64_t k = 0; k < pieces; k++)
    if (sums.data[k] > 0) total += sums.data[k] * (tops.data[k] == top ? 1 : ::exp(tops.data[k] - top));
  for (int64_t i = 0; p.mask && i < p.count; i++) pairs += p.mask[i] != 0;
  *p.el = bad ? __builtin_nanf("") : static_cast<float>(top + ::log(total) - ::log(p.mask ? pairs : p.count));
}

template <typename S>
static void backward(const LogMeanExp& p) {
  double pairs = p.count;
  if (p.mask) {
    pairs = 0;
    for (int64_t i = 0; i < p.count; i++) pairs += p.mask[i] != 0;
  }
  const float each = static_cast<float>(*p.grad / pairs), el = *p.el;
  S* out = static_cast<S*>(p.dscores);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t i = 0; i < (p.count + VL - 1) / VL; i++) {
    const vf g = vexp(load_scores<S>(p, i * VL, p.count) - el) * each;
    for (int k = 0; k < VL && i * VL + k < p.count; k++) from_float(g[k], out + i * VL + k);
  }
}

void log_mean_exp_forward(const LogMeanExp& p) {
  if (p.dtype == kBFloat16) return forward<bf16>(p);
  if (p.dtype == kFloat16) return forward<fp16>(p);
  forward<float>(p);
}

void log_mean_exp_backward(const LogMeanExp& p) {
  if (p.dtype == kBFloat16) return backward<bf16>(p);
  if (p.dtype == kFloat16) return backward<fp16>(p);
  backward<float>(p);
}

}  // namespace CK_ISA
}  // namespace ck
