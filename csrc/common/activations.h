// Activations and their slopes, phi(t) and phi'(t) together, on the vectors of simd.h.
//
// Measured against float64: value and slope within 3e-7, the value relative to max(1, |phi|); elu, tanh, softplus and silu
// keep 4e-7 of phi itself where it is tiny, so a critic with small pre-activations loses nothing.
#pragma once

#include "common/simd.h"

namespace ck {
namespace CK_ISA {

// 1 / x to 1.5 ulp for normal x with a normal reciprocal.
static inline vf vreciprocal(vf x) {
#if defined(__AVX512F__)
  const vf r = _mm512_maskz_rcp14_ps(0xffff, x);  // a 16-lane division holds its port for 16 cycles, this and a Newton step for 4
  return r + r * (1.0f - x * r);
#else
  return 1.0f / x;
#endif
}

static inline vf vabs(vf x) { return reinterpret_cast<vf>(reinterpret_cast<vi>(x) & 0x7fffffff); }

struct Exponential {
  vf value, minus_one;
};

// e^x and e^x - 1 for x <= 87, relative errors below 2e-7; 0 and -1 below -87.7.  The polynomial of simd.h's vexp without the
// guards no caller here needs (5 to 15% of an activation's time), and once more without the 1 that would round r away.
static inline Exponential exponential(vf x) {
  const vf magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  x = vmax(x, broadcast(-88.0f));  // k = -127 there, whose power below is 0
  const vf shifted = x * 1.44269504088896341f + magic;
  const vf k = shifted - magic;
  vf r = x - k * 0.693359375f;
  r = r + k * 2.12194440e-4f;
  vf p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r;
  const vf power = reinterpret_cast<vf>((reinterpret_cast<vi>(shifted) << 23) + 0x3f800000);  // 2^k
  return {p * power + power, p * power + (power - 1.0f)};
}

struct ValueAndSlope {
  vf value, slope;
};

// phi = t Phi(t), phi' = Phi(t) + t N(t).  The tail Phi(-|t|) = e^{-t^2/2} Q(k), k = 1 / (1 + 0.295 |t|): one exponential
// serves the tail and the density.  Q is a minimax fit: Phi is off by at most 7e-9, before rounding.
static inline ValueAndSlope gelu(vf t) {
  const vf bell = exponential(-0.5f * t * t).value;
  const vf k = vreciprocal(1.0f + 0.295f * vabs(t));
  vf q = broadcast(0.0370176277f);
  q = q * k - 0.171475517f;
  q = q * k + 0.245919325f;
  q = q * k - 0.0879610357f;
  q = q * k + 0.146015642f;
  q = q * k + 0.0933838832f;
  q = q * k + 0.119510624f;
  q = q * k + 0.117589458f;
  const vf tail = bell * (q * k);
  const vf cdf = select(t > 0.0f, 1.0f - tail, tail);
  return {t * cdf, cdf + t * (bell * 0.398942280f)};
}

// phi = t sigma(z), phi' = sigma + t sigma (1 - sigma) z'.  With u = e^{-|z|}, sigma is 1 / (1 + u) or u / (1 + u).
static inline ValueAndSlope gated(vf t, vf z, vf dz) {
  const vf u = exponential(-vabs(z)).value;
  const vf r = vreciprocal(1.0f + u);
  const vf rest = u * r;
  const vf sigma = select(z > 0.0f, r, rest);
  return {t * sigma, sigma + t * (rest * r) * dz};
}

static inline ValueAndSlope silu(vf t) { return gated(t, t, broadcast(1.0f)); }

// 0.5 t (1 + tanh(u)) = t sigma(2 u), u = sqrt(2/pi) (t + 0.044715 t^3).
static inline ValueAndSlope gelu_tanh(vf t) {
  const vf x = vmax(vmin(t, broadcast(10.25f)), broadcast(-10.25f));  // u is 0 there, and t^3 cannot overflow
  const vf square = x * x;
  return gated(t, x * (1.595769122f + 0.0713548163f * square), 1.595769122f + 0.214064449f * square);
}

static inline ValueAndSlope elu(vf t, float alpha) {
  const Exponential e = exponential(vmin(t, vf{}));
  const vi positive = t > 0.0f;
  return {select(positive, t, alpha * e.minus_one), select(positive, broadcast(1.0f), alpha * e.value)};
}

// phi = max(t, 0) + log(1 + u), u = e^{-|t|}.  log(1 + u) = 2 atanh(z), z = u / (2 + u) <= 1/3, its series refitted (5e-9).
static inline ValueAndSlope softplus(vf t) {
  const vf u = exponential(-vabs(t)).value;
  const vf r = vreciprocal((1.0f + u) * (2.0f + u));  // one reciprocal for both quotients
  const vf z = u * (1.0f + u) * r;
  const vf square = z * z;
  vf p = broadcast(0.280247430f);
  p = p * square + 0.279990883f;
  p = p * square + 0.400217020f;
  p = p * square + 0.666664131f;
  const vf log1p = z * (2.0f + square * p);
  return {vmax(t, vf{}) + log1p, select(t > 0.0f, broadcast(1.0f), u) * (2.0f + u) * r};
}

// |phi| = (1 - u) / (1 + u), phi' = 4 u / (1 + u)^2, u = e^{-2 |t|}: no digits cancel in 1 - phi^2.
static inline ValueAndSlope tanh(vf t) {
  const Exponential u = exponential(-2.0f * vabs(t));
  const vf r = vreciprocal(1.0f + u.value);
  const vf minus_magnitude = u.minus_one * r;
  return {select(t > 0.0f, -minus_magnitude, minus_magnitude), 4.0f * u.value * (r * r)};
}

}  // namespace CK_ISA
}  // namespace ck
