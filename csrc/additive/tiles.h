// One tile of pairs of an additive critic: its scores S_ij = sum_h w_h phi(a_ih + b_jh), and from weights e_ij of its pairs
// its share of the gradients.
//
// ReLU and leaky ReLU (slope s below 0) are phi(t) = s t + (1-s) max(t, 0), and max(a + b, 0) = max(a, -b) + b, so
//   S_ij = (1-s) [ sum_h w_h max(a_ih, -b_jh) + sum_h w_h b_jh ] + s [ sum_h w_h a_ih + sum_h w_h b_jh ]
// takes two instructions per vector of products (max, fma), and phi' = s + (1-s) [b_jh > -a_ih] three (compare to a mask, add
// e_ij under the mask to the row's sum and to the column's).  The scores run with columns in the lanes, and need no sum over
// lanes; the gradients run with h in the lanes, for the same reason, and compare integers of the same order, which take any
// port of a Zen where floats take the two that add.  phi = t phi' gives dw for nothing:
//   dw_h = sum_i a_ih U_ih + sum_j b_jh V_jh,    U_ih = sum_j e_ij phi'(t_ijh),  V_jh = sum_i e_ij phi'(t_ijh)
// max(a, -b) + b loses digits where a and b are large together (a unit dead behind a large bias), so a + centre_h and
// b - centre_h stand in their place, with centre_h = -max(a, -b) for an a and a b typical of unit h.
//
// The other activations compute phi once, keep one number (or phi and phi') of each pair of a small tile in the L1 cache until
// its e_ij are known, make phi' of it then, and sum dw as they go.  e^{a + b} is e^a e^b: elu, silu, softplus and tanh
// (additive/separable_exp.h) take one product where they would take an exponential, wherever a and b are moderate (less than 40, or
// 20 for tanh and softplus, from an offset of the unit's own).
#pragma once

#include <math.h>

#include "additive/activations.h"
#include "common/buffer.h"
#include "common/simd.h"

namespace ck {
namespace CK_ISA {
namespace {

// GROUP_TILES of a tile: a group of rows has at least as many, to keep the merging of the groups' sums near 2 % of the time.
constexpr int CHUNK = 64;  // products summed in one accumulator before joining S: keeps its rounding error low
constexpr float NOTHING = -INFINITY;  // the score of a pair outside P

int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }
int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }
int64_t larger(int64_t x, int64_t y) { return x > y ? x : y; }

// A panel of `rows` vectors of length h is stored by runs of RUN units, each a dense (rows, RUN) array: rows are a
// compile-time distance apart, in neighbouring cache lines.  This is the place of unit k of row 0.
template <int RUN>
inline int64_t place(int64_t rows, int64_t k) {
  return k / RUN * (RUN * rows) + k % RUN;
}

// x += the first `count` rows of the panel
template <int RUN>
void add_rows(const float* panel, int64_t count, int64_t h, int64_t rows, float* x) {
  for (int64_t i = 0; i < count; i++)
    for (int64_t k0 = 0; k0 < h; k0 += RUN) {
      const float* run = panel + k0 * rows + i * RUN;
      for (int64_t k = 0; k < smaller(RUN, h - k0); k++) x[i * h + k0 + k] += run[k];
    }
}

#if defined(__AVX512F__)
typedef __mmask16 mask;
inline bool any(mask m) { return m; }
inline mask greater(vf x, vf y) { return _mm512_cmp_ps_mask(x, y, _CMP_GT_OQ); }
inline mask greater(vi x, vi y) { return _mm512_cmpgt_epi32_mask(reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(y)); }
// max(*x, y): a vector of its own for *x would take an instruction's place in a Zen 4's pipes.
inline vf max_with(const float* x, vf y) {
  vf z;
  asm("vmaxps %1%{1to16%}, %2, %0" : "=v"(z) : "m"(*x), "v"(y));
  return z;
}
inline vf add_where(mask m, vf sum, vf x) {
  asm("vaddps %1, %0, %0%{%2%}" : "+v"(sum) : "v"(x), "Yk"(m));  // GCC copies the sum first, of the intrinsic
  return sum;
}
#else
typedef vi mask;
inline bool any(mask m) {
#if defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<vf>(m));
#else
  int32_t either = 0;
  for (int i = 0; i < VL; i++) either |= m[i];
  return either;
#endif
}
inline mask greater(vf x, vf y) { return x > y; }
inline mask greater(vi x, vi y) { return x > y; }
inline vf max_with(const float* x, vf y) { return vmax(broadcast(*x), y); }
inline vf add_where(mask m, vf sum, vf x) { return sum + reinterpret_cast<vf>(reinterpret_cast<vi>(x) & m); }
#endif

// Integers in the order of floats that are not NaN, -0 as 0; kept as a vf, which nothing may compute with.
inline vf ordered(vf x) {
  const vi bits = reinterpret_cast<vi>(x + 0.0f);
  return reinterpret_cast<vf>(bits ^ (bits >> 31 & 0x7fffffff));
}

// A number for several uses: left in memory, GCC would load it for each of them.
inline vf in_register(vf x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__AVX2__)
  asm("" : "+x"(x));
#endif
  return x;
}

// What one panel of columns offers to the tiles on it.
struct Panel {
  const float* b;         // (B COLS, h) in runs: what Tile packs of b
  const float* negative;  // (h, COLS) centre - b; ReLU family only
  const float*
      shift;    // ReLU family: (COLS,) the part of S that depends on j alone; others: (SCORES,) 0.  NOTHING in padding
  float* db;    // (COLS, h) in runs: sum_i e_ij phi', of one group
  float* mass;  // (COLS,) sum_i e_ij, of one group; ReLU family only
};

// What one thread needs for a tile.
struct Scratch {
  float* row;   // (h,) of a or b in float32
  float* a;     // (A ROWS, h) in runs: what Tile packs of a; ReLU family: -a ordered, then a + centre
  float* da;    // (ROWS, h) in runs: sum_j e_ij phi'
  float* dw;    // (h,) sum_ij e_ij phi; smooth activations only
  float* s;     // (ROWS, COLS) scores, then e_ij
  float* mass;  // (ROWS, VL) sums of e_ij over the panels so far, to be added up; (VL,) of all of them if smooth
  float* kept;  // (KEPT COLS ROWS, h) in runs, of which phi and phi' are made; smooth activations only
};

// ReLU (below = 0) and leaky ReLU.  `rows` of a tile are there; the last ones of a small batch are not swept.
struct Kinked {
  static constexpr int ROWS = 24, COLS = 32;  // share what is loaded of each other
#if defined(__AVX512F__)
  static constexpr int GROUP_TILES = 4;
  static constexpr int PART = 12;  // rows of scores at a time, x 2 vectors of columns: 24 accumulators of 32 registers
  static constexpr int SOME = 6;   // rows of a gradient at a time, with 2 vectors of h: 12 of -a and 12 sums
#else
  static constexpr int GROUP_TILES = 2;
  static constexpr int PART = 4;  // x 2: 8 of 16
  static constexpr int SOME = 2;  // 4 and 4 of 16
#endif
  static constexpr int A = 2, B = 1, KEPT = 0, RUN = CHUNK;
  static constexpr bool KINKED = true, CENTRED = true;

  static void pack_a(vf x, vf centre, vf* packed) { packed[0] = ordered(-x), packed[1] = x + centre; }
  static void pack_b(vf x, vf, vf* packed) { packed[0] = ordered(x); }

  // s += (1-s) sum_h w_h max(a_ih + centre_h, centre_h - b_jh); w comes multiplied by (1-s)
  template <bool>
  void scores(int64_t rows, const Scratch& t, const Panel& panel, const float* w, int64_t h) const {
    for (int64_t k0 = 0; k0 < h; k0 += CHUNK)
      for (int first = 0; first < rows; first += PART)
        for (int column = 0; column < COLS; column += 2 * VL)
          score_rows(t.a + place<RUN>(A * ROWS, k0) + (ROWS + first) * RUN, panel.negative + k0 * COLS + column, w + k0,
                     smaller(CHUNK, h - k0), t.s + first * COLS + column);
  }

  template <bool FOR_A, bool FOR_B>
  void gradients(int64_t rows, const Scratch& t, const Panel& panel, int64_t h) const {
    for (int64_t k = 0; k < h; k += 2 * VL) {
      const float* b = panel.b + place<RUN>(COLS, k);
      float* db = panel.db + place<RUN>(COLS, k);
      for (int first = 0; first < rows; first += SOME)
        gradient_rows<FOR_A, FOR_B>(t.a + place<RUN>(A * ROWS, k) + first * RUN, b, t.s + first * COLS,
                                    t.da + place<RUN>(ROWS, k) + first * RUN, db);
    }
  }

 private:
  // PART rows, two vectors of columns, `count` units.
  static void score_rows(const float* a, const float* negative, const float* w, int64_t count, float* s) {
    vf sum[PART][2] = {};
#pragma GCC unroll 2
    for (int64_t k = 0; k < count; k++) {
      const vf left = load(negative + k * COLS), right = load(negative + k * COLS + VL), weight = broadcast(w[k]);
#pragma GCC unroll 16
      for (int i = 0; i < PART; i++) {
        sum[i][0] += weight * max_with(a + i * RUN + k, left);
        sum[i][1] += weight * max_with(a + i * RUN + k, right);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < PART; i++, s += COLS) {
      store(s, load(s) + sum[i][0]);
      store(s + VL, load(s + VL) + sum[i][1]);
    }
  }

  // SOME rows, all columns, two vectors of h: each e_ij that is loaded serves four sums.
  template <bool FOR_A, bool FOR_B>
  static void gradient_rows(const float* a, const float* b, const float* e, float* da, float* db) {
    vi minus_a[SOME][2];
    vf row_sum[SOME][2];
#pragma GCC unroll 16
    for (int i = 0; i < SOME; i++)
      for (int v = 0; v < 2; v++) {
        minus_a[i][v] = reinterpret_cast<vi>(load(a + i * RUN + v * VL));
        row_sum[i][v] = load(da + i * RUN + v * VL);
      }
#pragma GCC unroll 2
    for (int j = 0; j < COLS; j++) {
      vi bj[2];
      vf column_sum[2];
      for (int v = 0; v < 2; v++) {
        bj[v] = reinterpret_cast<vi>(in_register(load(b + j * RUN + v * VL)));
        column_sum[v] = FOR_B ? load(db + j * RUN + v * VL) : vf{};
      }
#pragma GCC unroll 16
      for (int i = 0; i < SOME; i++) {
        const vf weight = broadcast(e[i * COLS + j]);
        for (int v = 0; v < 2; v++) {
          const mask active = greater(bj[v], minus_a[i][v]);  // t > 0, exactly
          if (FOR_A) row_sum[i][v] = add_where(active, row_sum[i][v], weight);
          if (FOR_B) column_sum[v] = add_where(active, column_sum[v], weight);
        }
      }
      for (int v = 0; FOR_B && v < 2; v++) store(db + j * RUN + v * VL, column_sum[v]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < SOME; i++)
      for (int v = 0; FOR_A && v < 2; v++) store(da + i * RUN + v * VL, row_sum[i][v]);
  }
};

// The sum of the lanes, in an order of the instruction set's own.
#if defined(__AVX2__)
inline float sum_lanes(__m256 x) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}
#else
inline float sum_lanes(vf x) { return reduce_add(x); }
#endif
#if defined(__AVX512F__)
inline float sum_lanes(__m512 x) {
  return sum_lanes(_mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, x, 0), _mm512_maskz_extractf32x8_ps(0xff, x, 1)));
}
#endif

// x[i] = y[i] + the sum of the lanes of v[i]; `count` is VL on AVX-512.
inline void add_lanes_each(const vf* v, [[maybe_unused]] int count, const float* y, float* x) {
#if defined(__AVX512F__)
  reduce_add_each(v, x);
  store(x, load(x) + load(y));
#else
  for (int i = 0; i < count; i++) x[i] = y[i] + sum_lanes(v[i]);
#endif
}

#if defined(__AVX512F__)
// The pieces of an activation that is computed by them; no other has any.
template <class Phi>
constexpr const Pieces* PIECES = nullptr;

// f(Constant<0>()), ..., f(Constant<COUNT - 1>()).
template <int I>
struct Constant {
  static constexpr int value = I;
};
template <int COUNT, class F, int I = 0>
CK_INLINE void each(const F& f) {
  if constexpr (I < COUNT) {
    f(Constant<I>());
    each<COUNT, F, I + 1>(f);
  }
}
#define CK_INLINE_LAMBDA __attribute__((always_inline))
#endif

// phi and phi' of a + b in a form of additive/separable_exp.h.
template <class Phi>
struct Smooth {
  static constexpr int GROUP_TILES = 24;
  static constexpr int ROWS = 4,
                       COLS = VL == 16 ? Phi::COLUMNS : 4;  // what a tile keeps and packs competes for the L1 cache
  static constexpr int TOGETHER = VL == 16 ? 4 : 2;         // rows that go through phi side by side, as registers allow
  static constexpr int BESIDE =
      VL == 16 ? COLS : 1;  // columns of one walk along h: their loops would start and end apart
  static constexpr int A = Phi::A, B = Phi::B, KEPT = Phi::KEPT, RUN = VL;
  static constexpr bool KINKED = false, CENTRED = Phi::CENTRED;
  Phi phi;

  void pack_a(vf x, vf centre, vf* packed) const { phi.pack_a(x, centre, packed); }
  void pack_b(vf x, vf centre, vf* packed) const { phi.pack_b(x, centre, packed); }

  template <bool GRADIENTS>
  void scores(int64_t, const Scratch& t, const Panel& panel, const float* w, int64_t h) const {
#if defined(__AVX512F__)
    if constexpr (PIECES<Phi> != nullptr) return scores_in_turn<GRADIENTS>(t, panel, w, h);
#endif
    vf sums[SCORES] = {};
    for (int from = 0; from < COLS; from += BESIDE)
      for (int first = 0; first < ROWS; first += TOGETHER) {
        const float *a = t.a + first * VL, *b = panel.b + from * VL;
        float* keep = t.kept + (from * ROWS + first) * VL;
        Vectors<TOGETHER> sum[BESIDE] = {};
        for (int64_t k = 0; k < h; k += VL) {
          const vf weight = load(w + k);  // 0 in the padding
#pragma GCC unroll 16
          for (int j = 0; j < BESIDE; j++) {
            Vectors<TOGETHER> left[A], kept[KEPT];
            vf right[B];
            for (int q = 0; q < A; q++)
              for (int i = 0; i < TOGETHER; i++) left[q].v[i] = load(a + (q * ROWS + i) * VL);
            for (int q = 0; q < B; q++) right[q] = load(b + (q * COLS + j) * VL);
            sum[j] = phi.value(left, right, kept) * weight + sum[j];
            for (int q = 0; GRADIENTS && q < KEPT; q++)
              for (int i = 0; i < TOGETHER; i++) store(keep + (q * PAIRS + j * ROWS + i) * VL, kept[q].v[i]);
          }
          a += A * ROWS * VL, b += B * COLS * VL, keep += KEPT * PAIRS * VL;
        }
        for (int j = 0; j < BESIDE; j++)
          for (int i = 0; i < TOGETHER; i++) sums[(first + i) * COLS + from + j] = sum[j].v[i];
      }
    add_lanes_each(sums, SCORES, panel.shift, t.s);
  }

  // All three sums: next to phi, leaving one out would save nothing worth a template.  From the last units back to the first:
  // what the scores kept last is still in the L1 cache, where wide critics do not fit.
  template <bool, bool>
  void gradients(int64_t, const Scratch& t, const Panel& panel, int64_t h) const {
    vf e[PAIRS];
#pragma GCC unroll 16
    for (int p = 0; p < PAIRS; p++) e[p] = broadcast(t.s[p]);
    const int64_t runs = (h + VL - 1) / VL;
    const float *a = t.a + runs * A * ROWS * VL, *b = panel.b + runs * B * COLS * VL,
                *keep = t.kept + runs * KEPT * PAIRS * VL;
    float *da = t.da + runs * ROWS * VL, *db = panel.db + runs * COLS * VL, *dw = t.dw + runs * VL;
    for (int64_t run = 0; run < runs; run++) {
      a -= A * ROWS * VL, b -= B * COLS * VL, keep -= KEPT * PAIRS * VL, da -= ROWS * VL, db -= COLS * VL, dw -= VL;
      vf row_sum[ROWS], weight_sum[ROWS] = {load(dw)};
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) row_sum[i] = load(da + i * VL);
#pragma GCC unroll 16
      for (int j = 0; j < COLS; j++) {
        vf column_sum = load(db + j * VL), right[B];
        for (int q = 0; q < B; q++) right[q] = load(b + (q * COLS + j) * VL);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) {
          vf left[A], kept[KEPT];
          for (int q = 0; q < A; q++) left[q] = load(a + (q * ROWS + i) * VL);
          for (int q = 0; q < KEPT; q++) kept[q] = load(keep + (q * PAIRS + j * ROWS + i) * VL);
          const ValueAndSlope f = phi.again(left, right, kept);
          const vf slope = in_register(f.slope);
          row_sum[i] += e[i * COLS + j] * slope;
          column_sum += e[i * COLS + j] * slope;
          weight_sum[i] += e[i * COLS + j] * f.value;
        }
        store(db + j * VL, column_sum);
      }
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) store(da + i * VL, row_sum[i]);
      store(dw, (weight_sum[0] + weight_sum[1]) + (weight_sum[2] + weight_sum[3]));
    }
  }

 private:
#if defined(__AVX512F__)
  // The same for a form in pieces.  Its chains of dependent steps are long: pairs take them two by two, each two BEHIND steps
  // after those before them, so that lookups, which one port takes, come between the products of other pairs.
  template <bool GRADIENTS>
  void scores_in_turn(const Scratch& t, const Panel& panel, const float* w, int64_t h) const {
    using Chain = Piecewise<vf, true>;
    constexpr int BEHIND = 4, LAST = Chain::STEPS + 1;  // the first step is t, the last takes phi
    const float *a = t.a, *b = panel.b;
    float* keep = t.kept;
    vf sum[PAIRS] = {}, sums[SCORES] = {};
    for (int64_t k = 0; k < h; k += VL) {
      const vf weight = load(w + k);  // 0 in the padding
      Chain pair[PAIRS];
      each<LAST + 1 + BEHIND*(PAIRS / 2 - 1)>([&](auto turn) CK_INLINE_LAMBDA {
        each<PAIRS>([&](auto index) CK_INLINE_LAMBDA {
          constexpr int p = decltype(index)::value, step = decltype(turn)::value - BEHIND * (p / 2);
          if constexpr (step == 0) pair[p].start(load(a + p % ROWS * VL) + load(b + p / ROWS * VL));
          if constexpr (step > 0 && step < LAST) pair[p].template run<step - 1, GRADIENTS>(*PIECES<Phi>);
          if constexpr (step == LAST) {
            if (GRADIENTS) store(keep + p * VL, pair[p].value), store(keep + (PAIRS + p) * VL, pair[p].slope);
            sum[p] += pair[p].value * weight;
          }
        });
      });
      a += A * ROWS * VL, b += B * COLS * VL, keep += KEPT * PAIRS * VL;
    }
    for (int p = 0; p < PAIRS; p++) sums[p % ROWS * COLS + p / ROWS] = sum[p];
    add_lanes_each(sums, SCORES, panel.shift, t.s);
  }
#endif

  static constexpr int PAIRS = ROWS * COLS, SCORES = (PAIRS + VL - 1) / VL * VL;
};

}  // namespace
}  // namespace CK_ISA
}  // namespace ck
