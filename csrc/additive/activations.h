// Activations and their slopes, phi(t) and phi'(t) together, on one vector of simd.h or on several side by side: each step
// of a chain of dependent operations then has as many independent ones beside it, which hides their latency.
//
// Errors against float64, measured by tests/primitives/test_activations.py on dense sweeps of [-60, 60] and of t near 0: value within
// 3e-7 max(1, |phi|), slope within 3.1e-7; elu, tanh, softplus and silu keep 5e-7 of phi itself wherever t is tiny, so a
// critic with small pre-activations loses nothing.  Where tanh, or on AVX-512 softplus, is flat, these are all that is said of
// their slopes: tanh's is 1 - phi^2, as PyTorch's.
#pragma once

#include "additive/polynomials.h"
#include "common/simd.h"

#define CK_INLINE_MEMBER inline __attribute__((always_inline))
#define CK_INLINE static CK_INLINE_MEMBER

namespace ck {
namespace CK_ISA {

// N vectors that go through the same operations side by side.
template <int N>
struct Vectors {
  vf v[N];
};

#define CK_EACH(expression)                        \
  Vectors<N> z;                                    \
  for (int n = 0; n < N; n++) z.v[n] = expression; \
  return z
#define CK_OPERATOR(op)                                          \
  template <int N>                                               \
  CK_INLINE Vectors<N> operator op(Vectors<N> x, Vectors<N> y) { \
    CK_EACH(x.v[n] op y.v[n]);                                   \
  }                                                              \
  template <int N>                                               \
  CK_INLINE Vectors<N> operator op(Vectors<N> x, vf y) {         \
    CK_EACH(x.v[n] op y);                                        \
  }                                                              \
  template <int N>                                               \
  CK_INLINE Vectors<N> operator op(Vectors<N> x, float y) {      \
    CK_EACH(x.v[n] op broadcast(y));                             \
  }                                                              \
  template <int N>                                               \
  CK_INLINE Vectors<N> operator op(float x, Vectors<N> y) {      \
    CK_EACH(broadcast(x) op y.v[n]);                             \
  }

CK_OPERATOR(+)
CK_OPERATOR(-)
CK_OPERATOR(*)
#undef CK_OPERATOR

// 1 / x to 2^-14 for normal x with a normal reciprocal, or better.
CK_INLINE vf rough_reciprocal(vf x) {
#if defined(__AVX512F__)
  return _mm512_maskz_rcp14_ps(0xffff, x);
#else
  return 1.0f / x;
#endif
}

// 1 / x to 1.5 ulp.
CK_INLINE vf vreciprocal(vf x) {
  const vf r = rough_reciprocal(x);
#if defined(__AVX512F__)
  return r + r * (1.0f - x * r);  // a 16-lane division takes 10 cycles, this 3
#else
  return r;
#endif
}

CK_INLINE vf vabs(vf x) { return reinterpret_cast<vf>(reinterpret_cast<vi>(x) & 0x7fffffff); }
// max(x, y), min(x, y) and x within [-y, y], an instruction each; NaN where x is NaN (a compiler makes a comparison and a
// blend of simd.h's forms here).
CK_INLINE vf at_least(vf x, vf y) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, y, x);
#elif defined(__AVX2__)
  return _mm256_max_ps(y, x);
#else
  return vmax(y, x);
#endif
}
CK_INLINE vf at_most(vf x, vf y) {
#if defined(__AVX512F__)
  return _mm512_maskz_min_ps(0xffff, y, x);
#elif defined(__AVX2__)
  return _mm256_min_ps(y, x);
#else
  return vmin(y, x);
#endif
}
CK_INLINE vf at_least(vf x, float y) { return at_least(x, broadcast(y)); }
CK_INLINE vf at_most(vf x, float y) { return at_most(x, broadcast(y)); }
CK_INLINE vf clamp(vf x, float y) {
#if defined(__AVX512F__)
  return _mm512_maskz_range_ps(0xffff, x, broadcast(y), 0b0010);  // y for NaN
#else
  return at_most(at_least(x, -y), y);
#endif
}
// min(|x|, y)
CK_INLINE vf magnitude(vf x, float y) {
#if defined(__AVX512F__)
  return _mm512_maskz_range_ps(0xffff, x, broadcast(y), 0b1010);  // y for NaN
#else
  return at_most(vabs(x), y);
#endif
}
CK_INLINE vf where_positive(vf t, vf x, vf y) { return select(t > 0.0f, x, y); }
CK_INLINE vf where_positive(vf t, float x, vf y) { return select(t > 0.0f, broadcast(x), y); }

// What the functions below need of one vector, for several side by side.
#define CK_LIFT(f)                       \
  template <int N>                       \
  CK_INLINE Vectors<N> f(Vectors<N> x) { \
    CK_EACH(f(x.v[n]));                  \
  }
#define CK_LIFT_TWO(f, Second, y)                  \
  template <int N>                                 \
  CK_INLINE Vectors<N> f(Vectors<N> x, Second s) { \
    CK_EACH(f(x.v[n], y));                         \
  }

#if defined(__AVX512F__)
CK_INLINE vf from_floor(vf y) { return _mm512_maskz_reduce_ps(0xffff, y, 1); }         // y - floor(y)
CK_INLINE vf times_power(vf p, vf y) { return _mm512_maskz_scalef_ps(0xffff, p, y); }  // p 2^floor(y)
CK_LIFT(from_floor)
CK_LIFT_TWO(times_power, Vectors<N>, s.v[n])
// Of x > 0: floor(log2(x)), x over that power of two, and in which 32nd of its octave it is (in the low bits, for lookup).
CK_INLINE vf exponent(vf x) { return _mm512_maskz_getexp_ps(0xffff, x); }
CK_INLINE vf mantissa(vf x) { return _mm512_maskz_getmant_ps(0xffff, x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero); }
CK_INLINE vf octave_part(vf x) { return reinterpret_cast<vf>(reinterpret_cast<vi>(x) >> 18); }
CK_LIFT(exponent)
CK_LIFT(mantissa)
CK_LIFT(octave_part)
#endif
// 2^k from k + 1.5 * 2^23
CK_INLINE vf power_bits(vf x) { return reinterpret_cast<vf>((reinterpret_cast<vi>(x) << 23) + 0x3f800000); }
CK_LIFT(power_bits)
CK_LIFT(vabs)
CK_LIFT(vreciprocal)
CK_LIFT(rough_reciprocal)
CK_LIFT_TWO(at_least, Vectors<N>, s.v[n])
CK_LIFT_TWO(at_least, float, s)
CK_LIFT_TWO(at_most, Vectors<N>, s.v[n])
CK_LIFT_TWO(at_most, float, s)
CK_LIFT_TWO(clamp, float, s)
CK_LIFT_TWO(magnitude, float, s)
template <int N>
CK_INLINE Vectors<N> where_positive(Vectors<N> t, Vectors<N> x, Vectors<N> y) {
  CK_EACH(where_positive(t.v[n], x.v[n], y.v[n]));
}
template <int N>
CK_INLINE Vectors<N> where_positive(Vectors<N> t, float x, Vectors<N> y) {
  CK_EACH(where_positive(t.v[n], x, y.v[n]));
}
#undef CK_LIFT_TWO
#undef CK_LIFT
#undef CK_EACH

template <class V>
struct Exponential {
  V value, minus_one;
};

// e^x and e^x - 1 for x <= 87, relative errors below 2e-7; 0 and -1 below -87.7.  The polynomial of simd.h's vexp without the
// guards no caller here needs, and once more without the 1 that would round r away.
template <class V>
CK_INLINE Exponential<V> exponential(V x) {
  x = at_least(x, -88.0f);                                   // k = -127 there, whose power below is 0
  const V shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const V k = shifted - 12582912.0f;
  V r = k * -0.693359375f + x;
  r = k * 2.12194440e-4f + r;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r;
  const V power = power_bits(shifted);  // 2^k
  return {p * power + power, p * power + (power - 1.0f)};
}

// factor 2^y for y <= 126, relative error below 2e-7 (minimax 9e-8, and rounding); 0 far below -126.  On AVX-512 the remainder
// and the power take an instruction each, for y - floor(y); elsewhere y is rounded to the nearest integer.
template <class V>
CK_INLINE V power_of_two(V y, float factor = 1.0f) {
#if defined(__AVX512F__)
  const V r = from_floor(y);
  V p = r * (0.00186713005f * factor) + 0.00901703071f * factor;
  p = p * r + 0.0557999127f * factor;
  p = p * r + 0.240164444f * factor;
  p = p * r + 0.693151295f * factor;
  return times_power(p * r + factor, y);
#else
  y = at_least(y, -127.0f);  // whose power below is 0
  const V shifted = y + 12582912.0f, r = y - (shifted - 12582912.0f);
  V p = r * (0.00132647273f * factor) + 0.00967151299f * factor;
  p = p * r + 0.0555073358f * factor;
  p = p * r + 0.240222424f * factor;
  p = p * r + 0.693147004f * factor;
  return (p * r + factor) * power_bits(shifted);
#endif
}

template <class V>
struct Activated {
  V value, slope;
};
using ValueAndSlope = Activated<vf>;

constexpr float LOG2E = 1.44269504088896341f;

#if defined(__AVX512F__)
// numbers[index modulo 32]; the index is the low bits of a float
CK_INLINE vf lookup(const float* numbers, vf index) {
  return _mm512_maskz_permutex2var_ps(0xffff, load(numbers), reinterpret_cast<__m512i>(index), load(numbers + VL));
}
template <int N>
CK_INLINE Vectors<N> lookup(const float* numbers, Vectors<N> index) {
  Vectors<N> z;
  for (int n = 0; n < N; n++) z.v[n] = lookup(numbers, index.v[n]);
  return z;
}

// t Phi(t) and its slope, Phi in pieces, by STEPS of few instructions that need what the step before them made.
// IN_TURN: instructions stay in the order in which steps are run; GCC would put those that are independent in another.
template <class V, bool IN_TURN>
struct Piecewise {
  static constexpr int STEPS = 10;
  V slope, value;

  CK_INLINE_MEMBER void start(V x) { t = made(x); }

  template <int STEP, bool SLOPE = true>
  CK_INLINE_MEMBER void run(const Pieces& phi) {
    if constexpr (STEP == 0) {
      r = made(clamp(t, phi.bound));
    } else if constexpr (STEP == 1) {
      index = made(r * phi.per_unit + 12582912.0f);  // rounds to the nearest integer, and has it in its low bits
    } else if constexpr (STEP == 2) {
      next = made(index - 12582912.0f);
      slope = made(lookup(phi.c[5], index));
    } else if constexpr (STEP == 3) {
      r = made(r - next * phi.step);
      value = made(lookup(phi.c[4], index));
    } else if constexpr (STEP == 4) {
      value = made(slope * r + value);
      next = made(lookup(phi.c[3], index));
    } else if constexpr (STEP < 9) {
      if (SLOPE) slope = made(slope * r + value);
      value = made(value * r + next);
      if constexpr (STEP < 8) next = made(lookup(phi.c[7 - STEP], index));
    } else {
      if (SLOPE) slope = made(t * slope + value);
      value = made(t * value);
    }
  }

  // All steps from STEP on.
  template <int STEP = 0>
  CK_INLINE_MEMBER Activated<V> finish(const Pieces& phi) {
    run<STEP>(phi);
    if constexpr (STEP + 1 < STEPS) return finish<STEP + 1>(phi);
    return {value, slope};
  }

 private:
  V t, index, r, next;

  static CK_INLINE_MEMBER V made(V x) {
    if constexpr (IN_TURN) asm volatile("" : "+v"(x));
    return x;
  }
};

template <class V>
CK_INLINE Activated<V> piecewise(V t, const Pieces& phi) {
  Piecewise<V, false> chain;
  chain.start(t);
  return chain.finish(phi);
}

template <class V>
CK_INLINE Activated<V> gelu(V t) {
  return piecewise(t, gelu_pieces);
}
template <class V>
CK_INLINE Activated<V> gelu_tanh(V t) {
  return piecewise(t, gelu_tanh_pieces);
}
#else
// phi = t Phi(t), phi' = Phi(t) + t N(t).  The tail Phi(-|t|) = N(t) Q(k), k = 1 / (1 + 0.295 |t|): one exponential serves
// both.  Q is a minimax fit: Phi is off by at most 7e-9, before rounding.
template <class V>
CK_INLINE Activated<V> gelu(V t) {
  const V z = magnitude(t, 16.0f);  // the bell is 0 there
  const V density = power_of_two(z * z * (-0.5f * LOG2E), 0.398942280f);
  const V k = vreciprocal(z * 0.295f + 1.0f);
  V q = k * 0.0927894323f - 0.429825379f;
  q = q * k + 0.616428333f;
  q = q * k - 0.220485619f;
  q = q * k + 0.366006937f;
  q = q * k + 0.234078682f;
  q = q * k + 0.299568709f;
  q = q * k + 0.29475306f;
  const V tail = density * (q * k);
  const V cdf = where_positive(t, 1.0f - tail, tail);
  return {t * cdf, t * density + cdf};
}

// phi = t sigma(z), phi' = sigma + t sigma (1 - sigma) z', from y = -z log2(e).
template <class V>
CK_INLINE Activated<V> gated(V t, V y, V dz) {
  const V u = power_of_two(y);
  const V r = vreciprocal(u + 1.0f);  // sigma
  const V value = t * r;
  return {value, value * (u * r) * dz + r};
}

// 0.5 t (1 + tanh(u)) = t sigma(2 u), u = sqrt(2/pi) (t + 0.044715 t^3).
template <class V>
CK_INLINE Activated<V> gelu_tanh(V t) {
  const V x = clamp(t, 10.0f);  // 1 - sigma(2 u) < 1e-38 there, and t^3 cannot overflow
  const V square = x * x;
  return gated(t, x * (square * (-0.0713548163f * LOG2E) - 1.595769122f * LOG2E), square * 0.214064449f + 1.595769122f);
}
#endif

template <class V>
CK_INLINE Activated<V> silu(V t) {
  const V x = at_least(t, -87.0f);  // 1 + u and its reciprocal stay finite; phi is below 1e-35 there
  const V u = power_of_two(x * -LOG2E);
  const V r = vreciprocal(u + 1.0f);
  const V value = x * r;
  return {value, value * (u * r) + r};
}

template <class V>
CK_INLINE Activated<V> elu(V t, float alpha) {
  const Exponential<V> e = exponential(at_most(t, 0.0f));
  return {where_positive(t, t, alpha * e.minus_one), where_positive(t, 1.0f, alpha * e.value)};
}

// log(1 + u) for 0 <= u <= 1, relative error below 3e-7 (minimax 2e-7).
template <class V>
CK_INLINE V log_one_plus(V u) {
  V p = u * -8.539206348359585e-3f + 4.408962279558182e-2f;
  p = p * u - 1.0768169909715652e-1f;
  p = p * u + 1.7745240032672882e-1f;
  p = p * u - 2.4495463073253632e-1f;
  p = p * u + 3.3275479078292847e-1f;
  p = p * u - 4.999740421772003e-1f;
  p = p * u + 9.999998211860657e-1f;
  return u * p;
}

// phi = max(t, 0) + log(1 + u), u = e^{-|t|}.  log(1 + u) = 2 atanh(z), z = u / (2 + u) <= 1/3, its series refitted (5e-9).
template <class V>
CK_INLINE Activated<V> softplus(V t) {
  const V u = exponential(0.0f - vabs(t)).value;
  const V r = vreciprocal((u + 1.0f) * (u + 2.0f));  // one reciprocal for both quotients
  const V z = u * (u + 1.0f) * r;
  const V square = z * z;
  V p = square * 0.280247430f + 0.279990883f;
  p = p * square + 0.400217020f;
  p = p * square + 0.666664131f;
  const V log1p = z * (square * p + 2.0f);
  return {at_least(t, 0.0f) + log1p, where_positive(t, 1.0f, u) * ((u + 2.0f) * r)};
}

// |phi| = (1 - u) / (1 + u), phi' = 4 u / (1 + u)^2, u = e^{-2 |t|}: no digits cancel in 1 - phi^2.
template <class V>
CK_INLINE Activated<V> tanh(V t) {
  const Exponential<V> u = exponential(-2.0f * vabs(t));
  const V r = vreciprocal(u.value + 1.0f);
  const V minus_magnitude = u.minus_one * r;
  return {where_positive(t, 0.0f - minus_magnitude, minus_magnitude), u.value * 4.0f * (r * r)};
}

}  // namespace CK_ISA
}  // namespace ck
