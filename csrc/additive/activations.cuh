// Activations and their slopes, phi(t) and phi'(t) together: csrc/additive/activations.h for one number, with the special
// function unit for exponentials and reciprocals except where e^x - 1 must keep its digits.
#pragma once

#include "common/cuda/device.cuh"

namespace ck {
namespace cuda {

struct ValueAndSlope {
  float value, slope;
};

struct Exponential {
  float value, minus_one;
};

// e^x and e^x - 1 for x <= 0, relative errors below 2e-7; 0 and -1 below -87.7.
__device__ inline Exponential exponential(float x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  x = fmaxf(x, -88.0f);             // k = -127 there, whose power below is 0
  const float shifted = fmaf(x, 1.44269504088896341f, magic);
  const float k = shifted - magic;
  float r = fmaf(k, -0.693359375f, x);
  r = fmaf(k, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = fmaf(p, r, 1.3981999507e-3f);
  p = fmaf(p, r, 8.3334519073e-3f);
  p = fmaf(p, r, 4.1665795894e-2f);
  p = fmaf(p, r, 1.6666665459e-1f);
  p = fmaf(p, r, 5.0000001201e-1f);
  p = fmaf(p, r * r, r);
  const float power = __uint_as_float((__float_as_uint(shifted) << 23) + 0x3f800000u);  // 2^k
  return {fmaf(p, power, power), fmaf(p, power, power - 1.0f)};
}

// phi = t sigma(z), phi' = sigma + t sigma (1 - sigma) z'.  With u = e^{-|z|}, sigma is 1 / (1 + u) or u / (1 + u).
__device__ inline ValueAndSlope gated(float t, float z, float dz) {
  const float u = exp_fast(-fabsf(z));
  const float r = reciprocal(1.0f + u);
  const float rest = u * r;
  const float sigma = z > 0.0f ? r : rest;
  return {t * sigma, fmaf(t * (rest * r), dz, sigma)};
}

// Each has `at(t, slope)`; the names are those of enum Activation.
struct Relu {
  __device__ static ValueAndSlope at(float t, float) { return {fmaxf(t, 0.0f), t > 0.0f ? 1.0f : 0.0f}; }
};

struct LeakyRelu {
  __device__ static ValueAndSlope at(float t, float slope) {
    return {t > 0.0f ? t : slope * t, t > 0.0f ? 1.0f : slope};
  }
};

struct Gelu {  // the tail Phi(-|t|) = e^{-t^2/2} Q(k), k = 1 / (1 + 0.295 |t|): activations.h
  __device__ static ValueAndSlope at(float t, float) {
    const float bell = exp2_fast(t * t * -0.721347520f);
    const float k = reciprocal(fmaf(0.295f, fabsf(t), 1.0f));
    float q = 0.0370176277f;
    q = fmaf(q, k, -0.171475517f);
    q = fmaf(q, k, 0.245919325f);
    q = fmaf(q, k, -0.0879610357f);
    q = fmaf(q, k, 0.146015642f);
    q = fmaf(q, k, 0.0933838832f);
    q = fmaf(q, k, 0.119510624f);
    q = fmaf(q, k, 0.117589458f);
    const float tail = bell * (q * k);
    const float cdf = t > 0.0f ? 1.0f - tail : tail;
    return {t * cdf, fmaf(t, bell * 0.398942280f, cdf)};
  }
};

struct GeluTanh {  // 0.5 t (1 + tanh(u)) = t sigma(2 u), u = sqrt(2/pi) (t + 0.044715 t^3)
  __device__ static ValueAndSlope at(float t, float) {
    const float x = fmaxf(fminf(t, 10.25f), -10.25f);  // the tail is 0 there, and t^3 cannot overflow
    const float square = x * x;
    return gated(t, x * fmaf(0.0713548163f, square, 1.595769122f), fmaf(0.214064449f, square, 1.595769122f));
  }
};

struct Silu {
  __device__ static ValueAndSlope at(float t, float) { return gated(t, t, 1.0f); }
};

struct Elu {
  __device__ static ValueAndSlope at(float t, float alpha) {
    const Exponential e = exponential(fminf(t, 0.0f));
    return {t > 0.0f ? t : alpha * e.minus_one, t > 0.0f ? 1.0f : alpha * e.value};
  }
};

struct Softplus {  // max(t, 0) + log(1 + u), u = e^{-|t|}; log(1 + u) = 2 atanh(z), z = u / (2 + u)
  __device__ static ValueAndSlope at(float t, float) {
    const float u = exp_fast(-fabsf(t));
    const float r = reciprocal((1.0f + u) * (2.0f + u));
    const float z = u * (1.0f + u) * r;
    const float square = z * z;
    float p = 0.280247430f;
    p = fmaf(p, square, 0.279990883f);
    p = fmaf(p, square, 0.400217020f);
    p = fmaf(p, square, 0.666664131f);
    const float log1p = z * fmaf(square, p, 2.0f);
    return {fmaxf(t, 0.0f) + log1p, (t > 0.0f ? 1.0f : u) * (2.0f + u) * r};
  }
};

struct Tanh {  // |phi| = (1 - u) / (1 + u), phi' = 4 u / (1 + u)^2, u = e^{-2 |t|}
  __device__ static ValueAndSlope at(float t, float) {
    const Exponential u = exponential(-2.0f * fabsf(t));
    const float r = reciprocal(1.0f + u.value);
    const float minus_magnitude = u.minus_one * r;
    return {t > 0.0f ? -minus_magnitude : minus_magnitude, 4.0f * u.value * (r * r)};
  }
};

}  // namespace cuda
}  // namespace ck
