// One tile of pairs of an additive critic: its scores S_ij = sum_h w_h phi(a_ih + b_jh), and from weights e_ij of its pairs
// its share of the gradients.
//
// ReLU and leaky ReLU (slope s below 0) are phi(t) = s t + (1-s) max(t, 0), and max(a + b, 0) = max(a, -b) + b, so
//   S_ij = (1-s) [ sum_h w_h max(a_ih, -b_jh) + sum_h w_h b_jh ] + s [ sum_h w_h a_ih + sum_h w_h b_jh ]
// takes two instructions per vector of products (max, fma), and phi' = s + (1-s) [b_jh > -a_ih] three (compare to a mask, add
// e_ij under the mask to the row's sum and to the column's).  The scores run with columns in the lanes, and need no sum over
// lanes; the gradients run with h in the lanes, for the same reason.  phi = t phi' gives gw for nothing:
//   gw_h = sum_i a_ih U_ih + sum_j b_jh V_jh,    U_ih = sum_j e_ij phi'(t_ijh),  V_jh = sum_i e_ij phi'(t_ijh)
// max(a, -b) + b loses digits where a and b are large together (a unit dead behind a large bias), so a + centre_h and
// b - centre_h stand in their place, with centre_h = -max(a, -b) for an a and a b typical of unit h.
//
// The other activations compute phi and phi' together, once, keep those of one small tile in cache until its e_ij are known,
// and sum gw as they go.
#pragma once

#include <math.h>

#include "common/activations.h"
#include "common/buffer.h"
#include "common/simd.h"

namespace ck {
namespace CK_ISA {
namespace {

constexpr int CHUNK = 64;            // products summed in one accumulator before joining S: keeps its rounding error low
constexpr float NOTHING = -INFINITY;  // the score of a pair outside P

int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }
int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }
int64_t larger(int64_t x, int64_t y) { return x > y ? x : y; }

// A panel of `rows` vectors of length h is stored by chunks of CHUNK columns, each a dense (rows, CHUNK) array: rows are a
// compile-time distance apart, in neighbouring cache lines.  This is the place of element k of row 0.
inline int64_t chunked(int64_t rows, int64_t k) { return k / CHUNK * (CHUNK * rows) + k % CHUNK; }

// panel = f(x, column), from and to `count` of its rows; padding is left as it is.
template <class F>
void pack_rows(const float* x, int64_t count, int64_t h, int64_t rows, float* panel, const F& f) {
  for (int64_t i = 0; i < count; i++)
    for (int64_t k0 = 0; k0 < h; k0 += CHUNK) {
      float* chunk = panel + chunked(rows, k0) + i * CHUNK;
      for (int64_t k = k0; k < smaller(k0 + CHUNK, h); k++) chunk[k - k0] = f(x[i * h + k], k);
    }
}

// x += the first `count` rows of the panel
void add_rows(const float* panel, int64_t count, int64_t h, int64_t rows, float* x) {
  for (int64_t i = 0; i < count; i++)
    for (int64_t k0 = 0; k0 < h; k0 += CHUNK) {
      const float* chunk = panel + chunked(rows, k0) + i * CHUNK;
      for (int64_t k = k0; k < smaller(k0 + CHUNK, h); k++) x[i * h + k] += chunk[k - k0];
    }
}

bool all_finite(const float* x, int64_t size, int threads) {
  int64_t bad = 0;
#pragma omp parallel for reduction(+ : bad) num_threads(threads)
  for (int64_t block = 0; block < size; block += 4096) {
    float zero = 0.0f;
#pragma omp simd reduction(+ : zero)
    for (int64_t i = block; i < smaller(block + 4096, size); i++) zero += x[i] * 0.0f;  // NaN where x[i] is not finite
    bad += zero != 0.0f;
  }
  return bad == 0;
}

#if defined(__AVX512F__)
typedef __mmask16 mask;
inline mask greater(vf x, vf y) { return _mm512_cmp_ps_mask(x, y, _CMP_GT_OQ); }
inline vf add_where(mask m, vf sum, vf x) { return _mm512_mask_add_ps(sum, m, sum, x); }
#else
typedef vi mask;
inline mask greater(vf x, vf y) { return x > y; }
inline vf add_where(mask m, vf sum, vf x) { return sum + reinterpret_cast<vf>(reinterpret_cast<vi>(x) & m); }
#endif

// What one panel of columns offers to the tiles on it.
struct Panel {
  const float* b;         // (COLS, h) chunked
  const float* negative;  // (h, COLS) centre - b; ReLU family only
  const float* shift;     // (COLS,) the part of S that depends on j alone; NOTHING in the padding
  float* gb;              // (COLS, h) chunked: sum_i e_ij phi', of one group
  float* mass;            // (COLS,) sum_i e_ij, of one group
};

// What one thread needs for a tile.
struct Scratch {
  float* a;         // (ROWS, h) chunked; ReLU family: -a
  float* centred;   // (ROWS, h) chunked: a + centre; ReLU family only
  float* ga;        // (ROWS, h) chunked: sum_j e_ij phi'
  float* gw;        // (h,) sum_ij e_ij phi; smooth activations only
  float* s;         // (ROWS, COLS) scores, then e_ij
  float* values;    // (h / VL, ROWS, COLS, VL) phi; smooth activations only
  float* slopes;    // likewise, phi'
};

// ReLU (below = 0) and leaky ReLU.
struct Kinked {
#if defined(__AVX512F__)
  static constexpr int ROWS = 12;  // x 2 vectors of columns: 24 accumulators of 32 registers
#else
  static constexpr int ROWS = 4;  // x 2: 8 of 16
#endif
  static constexpr int COLS = 2 * VL;
  static constexpr bool KINKED = true;

  // s += (1-s) sum_h w_h max(a_ih + centre_h, centre_h - b_jh); w comes multiplied by (1-s)
  template <bool GRADIENTS>
  void scores(const Scratch& t, const Panel& panel, const float* w, int64_t h) const {
    for (int64_t k0 = 0; k0 < h; k0 += CHUNK) {
      const float* a = t.centred + chunked(ROWS, k0);
      vf sum[ROWS][2] = {};
      for (int64_t k = 0; k < smaller(CHUNK, h - k0); k++) {
        const vf left = load(panel.negative + (k0 + k) * COLS), right = load(panel.negative + (k0 + k) * COLS + VL);
        const vf weight = broadcast(w[k0 + k]);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) {
          const vf ai = broadcast(a[i * CHUNK + k]);
          sum[i][0] += weight * vmax(ai, left);
          sum[i][1] += weight * vmax(ai, right);
        }
      }
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) {
        float* s = t.s + i * COLS;
        store(s, load(s) + sum[i][0]);
        store(s + VL, load(s + VL) + sum[i][1]);
      }
    }
  }

  template <bool FOR_A, bool FOR_B>
  void gradients(const Scratch& t, const Panel& panel, int64_t h) const {
    for (int64_t k = 0; k < h; k += VL) {
      const float* a = t.a + chunked(ROWS, k);
      const float* b = panel.b + chunked(COLS, k);
      float* ga = t.ga + chunked(ROWS, k);
      float* gb = panel.gb + chunked(COLS, k);
      vf minus_a[ROWS], row_sum[ROWS];
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) minus_a[i] = load(a + i * CHUNK), row_sum[i] = load(ga + i * CHUNK);
      for (int j = 0; j < COLS; j++) {
        const vf bj = load(b + j * CHUNK);
        vf column_sum = FOR_B ? load(gb + j * CHUNK) : vf{};
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) {
          const mask active = greater(bj, minus_a[i]);  // t > 0, exactly
          const vf e = broadcast(t.s[i * COLS + j]);
          if (FOR_A) row_sum[i] = add_where(active, row_sum[i], e);
          if (FOR_B) column_sum = add_where(active, column_sum, e);
        }
        if (FOR_B) store(gb + j * CHUNK, column_sum);
      }
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) store(ga + i * CHUNK, row_sum[i]);
    }
  }
};

// phi and phi' from one function of a vector of t.
template <class Phi>
struct Smooth {
  static constexpr int ROWS = 4, COLS = 16;  // phi and phi' of a tile take 8 h ROWS COLS bytes: 128 KiB at h = 256
  static constexpr bool KINKED = false;
  Phi phi;

  template <bool GRADIENTS>
  void scores(const Scratch& t, const Panel& panel, const float* w, int64_t h) const {
    vf sum[ROWS * COLS] = {};
    for (int64_t k = 0; k < h; k += VL) {
      const float* a = t.a + chunked(ROWS, k);
      const float* b = panel.b + chunked(COLS, k);
      const vf weight = load(w + k);  // 0 in the padding
      for (int i = 0; i < ROWS; i++) {
        const vf ai = load(a + i * CHUNK);
        for (int j = 0; j < COLS; j++) {
          const ValueAndSlope f = phi(ai + load(b + j * CHUNK));
          sum[i * COLS + j] += weight * f.value;
          if (GRADIENTS) {
            const int64_t place = k * ROWS * COLS + (i * COLS + j) * VL;
            store(t.values + place, f.value);
            store(t.slopes + place, f.slope);
          }
        }
      }
    }
    for (int p = 0; p < ROWS * COLS; p++) t.s[p] += reduce_add(sum[p]);
  }

  // All three sums: next to phi, leaving one out would save nothing worth a template.
  template <bool, bool>
  void gradients(const Scratch& t, const Panel& panel, int64_t h) const {
    for (int64_t k = 0; k < h; k += VL) {
      const float* values = t.values + k * ROWS * COLS;
      const float* slopes = t.slopes + k * ROWS * COLS;
      float* ga = t.ga + chunked(ROWS, k);
      float* gb = panel.gb + chunked(COLS, k);
      vf row_sum[ROWS], weight_sum = load(t.gw + k);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) row_sum[i] = load(ga + i * CHUNK);
      for (int j = 0; j < COLS; j++) {
        vf column_sum = load(gb + j * CHUNK);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) {
          const vf e = broadcast(t.s[i * COLS + j]);
          const vf slope = load(slopes + (i * COLS + j) * VL);
          row_sum[i] += e * slope;
          column_sum += e * slope;
          weight_sum += e * load(values + (i * COLS + j) * VL);
        }
        store(gb + j * CHUNK, column_sum);
      }
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) store(ga + i * CHUNK, row_sum[i]);
      store(t.gw + k, weight_sum);
    }
  }
};

}  // namespace
}  // namespace CK_ISA
}  // namespace ck
