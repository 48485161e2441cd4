// Activations of a + b from factors of their own: e^{a + b} = e^{a + c} e^{b - c} takes a product of two numbers that are
// computed once per row and unit, not an exponential per pair.  c is an offset of the unit, so that large biases that cancel
// cost nothing; `SPAN` bounds |a + c| and |b - c|, where products stay normal numbers (factors_fit of additive/sweep.h).
// Factors are made in double precision.  Where e^t - 1 needs its digits near t = 0 they are kept as a high and a low part:
// the fused high product less 1 is rounded once, and two products of a low part repair it.  Without a fused multiply-add
// (FUSED) that does not work, and elu and tanh are taken as they are.
//
// A form of an activation packs A numbers of each a and B of each b, and has two functions of them:
//   value(a, b, kept)   phi(a + b), and KEPT numbers that
//   again(a, b, kept)   makes phi and phi' of once more: fewer numbers kept per pair cost less than what they save
// COLUMNS of a tile on AVX-512: 2 or 4, as measured.
#pragma once

#include "additive/activations.h"

namespace ck {
namespace CK_ISA {
namespace {

// An activation as it is.
template <class F>
struct Direct {
  static constexpr int A = 1, B = 1, KEPT = 2, COLUMNS = 2;
  static constexpr bool CENTRED = false;
  F f;

  void pack_a(vf x, vf, vf* packed) const { packed[0] = x; }
  void pack_b(vf x, vf, vf* packed) const { packed[0] = x; }
  template <int N>
  CK_INLINE_MEMBER Vectors<N> value(const Vectors<N>* a, const vf* b, Vectors<N>* kept) const {
    const auto x = f(a[0] + b[0]);
    kept[0] = x.value, kept[1] = x.slope;
    return x.value;
  }
  CK_INLINE_MEMBER ValueAndSlope again(const vf*, const vf*, const vf* kept) const { return {kept[0], kept[1]}; }
};

#if defined(__FMA__) || defined(__AVX512F__) || defined(__ARM_FEATURE_FMA)
constexpr bool FUSED = true;
#else
constexpr bool FUSED = false;
#endif

struct Parts {
  vf high, low;
};

// scale e^{factor (x + centre)} to 40 bits, for exponents within 87: ln 2 reduction and the Taylor series in double precision.
inline Parts exponential_parts(vf x, vf centre, double factor, double scale = 1.0) {
  float in[VL], offset[VL], high[VL], low[VL];
  store(in, x), store(offset, centre);
#pragma omp simd
  for (int n = 0; n < VL; n++) {
    const double y = factor * (static_cast<double>(in[n]) + offset[n]);
    const double magic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to the nearest integer
    const double shifted = y * 1.4426950408889634 + magic;
    const double r = y - (shifted - magic) * 0.6931471805599453;
    double p = 1.0 / 3628800;
    p = p * r + 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    uint64_t bits;
    memcpy(&bits, &shifted, sizeof(bits));
    bits = (bits << 52) + (uint64_t{1023} << 52);  // 2^k
    double power;
    memcpy(&power, &bits, sizeof(power));
    const double value = p * power * scale;
    high[n] = static_cast<float>(value);
    low[n] = static_cast<float>(value - high[n]);
  }
  return {load(high), load(low)};
}

// a b - c of numbers in two parts each.
template <int N>
CK_INLINE Vectors<N> product_minus(Vectors<N> a_high, Vectors<N> a_low, vf b_high, vf b_low, float c) {
  return a_high * b_low + (a_low * b_high + (a_high * b_high - c));
}

struct FactoredSilu {
  static constexpr int A = 2, B = 2, KEPT = 1, COLUMNS = 2;
  static constexpr bool CENTRED = true;
  static constexpr float SPAN = 40.0f;

  void pack_a(vf x, vf centre, vf* packed) const { packed[0] = x, packed[1] = exponential_parts(x, centre, -1.0).high; }
  void pack_b(vf x, vf centre, vf* packed) const { pack_a(x, centre, packed); }
  template <int N>
  CK_INLINE_MEMBER Vectors<N> value(const Vectors<N>* a, const vf* b, Vectors<N>* kept) const {
    kept[0] = vreciprocal(a[1] * b[1] + 1.0f);  // sigma
    return (a[0] + b[0]) * kept[0];
  }
  CK_INLINE_MEMBER ValueAndSlope again(const vf* a, const vf* b, const vf* kept) const {
    const vf value = (a[0] + b[0]) * kept[0];
    return {value, value * (a[1] * b[1] * kept[0]) + kept[0]};
  }
};

// phi of t <= 0 is kept at or below 0, so that its sign tells on which side t is.  With alpha = 1 (UNIT) phi is
// max(t, min(e^t - 1, 0)), and phi' is min(e^t, 1).
template <bool UNIT>
struct FactoredElu {
  static constexpr int A = 3, B = 3, KEPT = 1, COLUMNS = 2;
  static constexpr bool CENTRED = true;
  static constexpr float SPAN = 40.0f;
  float alpha;

  // Its factors are normal numbers, and alpha is positive.
  static bool takes(float alpha) { return alpha >= 1e-6f && alpha <= 1e6f; }

  void pack_a(vf x, vf centre, vf* packed) const { pack(x, centre, alpha, packed); }
  void pack_b(vf x, vf centre, vf* packed) const { pack(x, centre, 1.0, packed); }
  template <int N>
  CK_INLINE_MEMBER Vectors<N> value(const Vectors<N>* a, const vf* b, Vectors<N>* kept) const {
    const Vectors<N> t = a[0] + b[0];
    const Vectors<N> below = at_most(product_minus(a[1], a[2], b[1], b[2], UNIT ? 1.0f : alpha), 0.0f);
    return kept[0] = UNIT ? at_least(t, below) : where_positive(t, t, below);
  }
  CK_INLINE_MEMBER ValueAndSlope again(const vf* a, const vf* b, const vf* kept) const {
    const vf power = a[1] * b[1];  // alpha e^t
    return {kept[0], UNIT ? at_most(power, 1.0f) : where_positive(kept[0], 1.0f, power)};
  }

 private:
  static void pack(vf x, vf centre, double scale, vf* packed) {
    const Parts parts = exponential_parts(x, centre, 1.0, scale);
    packed[0] = x, packed[1] = parts.high, packed[2] = parts.low;
  }
};

#if defined(__AVX512F__)
// w = 1 + e^t: phi = log w, phi' = 1 - 1 / w.  log w is that of the exponent, of a 32nd of an octave by a lookup
// (additive/polynomials.h), and z - z^2 / 2 + z^3 / 3 of what remains: |z| <= 1 / 64, so the series is off by 1.5e-8.
struct FactoredSoftplus {
  static constexpr int A = 1, B = 1, KEPT = 2, COLUMNS = 2;
  static constexpr bool CENTRED = true;
  static constexpr float SPAN = 20.0f;

  void pack_a(vf x, vf centre, vf* packed) const { packed[0] = exponential_parts(x, centre, 1.0).high; }
  void pack_b(vf x, vf centre, vf* packed) const { pack_a(x, centre, packed); }
  template <int N>
  CK_INLINE_MEMBER Vectors<N> value(const Vectors<N>* a, const vf* b, Vectors<N>* kept) const {
    const Vectors<N> w = a[0] * b[0] + 1.0f;
    const Vectors<N> index = octave_part(w), z = mantissa(w) * lookup(logarithms.reciprocal, index) - 1.0f;
    const Vectors<N> rough = exponent(w) * 0.693147181f + lookup(logarithms.value, index);
    for (int n = 0; n < N;
         n += 2) {  // 1 / x = y / (x y), 1 / y = x / (x y): a reciprocal costs more than three products
      const vf r = vreciprocal(w.v[n] * w.v[n + 1]);
      kept[1].v[n] = 1.0f - w.v[n + 1] * r, kept[1].v[n + 1] = 1.0f - w.v[n] * r;
    }
    return kept[0] = ((z * 0.333333333f - 0.5f) * z + 1.0f) * z + rough;
  }
  CK_INLINE_MEMBER ValueAndSlope again(const vf*, const vf*, const vf* kept) const { return {kept[0], kept[1]}; }
};
#else
struct FactoredSoftplus {
  static constexpr int A = 3, B = 3, KEPT = 1, COLUMNS = 2;
  static constexpr bool CENTRED = true;
  static constexpr float SPAN = 40.0f;

  void pack_a(vf x, vf centre, vf* packed) const {
    packed[0] = x;
    packed[1] = exponential_parts(x, centre, 1.0).high, packed[2] = exponential_parts(x, centre, -1.0).high;
  }
  void pack_b(vf x, vf centre, vf* packed) const { pack_a(x, centre, packed); }
  template <int N>
  CK_INLINE_MEMBER Vectors<N> value(const Vectors<N>* a, const vf* b, Vectors<N>* kept) const {
    const Vectors<N> u = at_most(a[1] * b[1], a[2] * b[2]);  // e^{-|t|}
    return kept[0] = at_least(a[0] + b[0], 0.0f) + log_one_plus(u);
  }
  CK_INLINE_MEMBER ValueAndSlope again(const vf* a, const vf* b, const vf* kept) const {
    return {kept[0], vreciprocal(a[2] * b[2] + 1.0f)};
  }
};
#endif

// u = e^{2t}: phi = (u - 1) / (u + 1), a rough quotient corrected by what it leaves, to 1.5 ulp; phi' = 1 - phi^2.
struct FactoredTanh {
  static constexpr int A = 2, B = 2, KEPT = 1, COLUMNS = 4;
  static constexpr bool CENTRED = true;
  static constexpr float SPAN = 20.0f;

  void pack_a(vf x, vf centre, vf* packed) const {
    const Parts parts = exponential_parts(x, centre, 2.0);
    packed[0] = parts.high, packed[1] = parts.low;
  }
  void pack_b(vf x, vf centre, vf* packed) const { pack_a(x, centre, packed); }
  template <int N>
  CK_INLINE_MEMBER Vectors<N> value(const Vectors<N>* a, const vf* b, Vectors<N>* kept) const {
    const Vectors<N> less = product_minus(a[0], a[1], b[0], b[1], 1.0f), more = less + 2.0f;
    const Vectors<N> r = rough_reciprocal(more), rough = less * r;
    return kept[0] = (less - rough * more) * r + rough;
  }
  CK_INLINE_MEMBER ValueAndSlope again(const vf*, const vf*, const vf* kept) const {
    return {kept[0], 1.0f - kept[0] * kept[0]};
  }
};

}  // namespace
}  // namespace CK_ISA
}  // namespace ck
