// The dot family on the CPU: all-pairs scores in tiles of (panel rows) x 32 columns, an epilogue, and nothing of n x m.
//
//     l_ij = scale <x_i, y_j>
//     forward    R_i = log sum_j exp l_ij          C_j = log sum_i exp l_ij
//     backward   P_ij = exp(l_ij - R_i) u_i + exp(l_ij - C_j) v_j
//                dx_i = scale (sum_j P_ij y_j + p_i y_i+)     dy_j = scale (sum_i P_ij x_i + p_j- x_j-)
//
// Rows go in panels that stay in the L2 cache, columns in chunks.  Within a panel and a chunk
//     phase 1 (parallel over blocks of 32 columns)   S = X Y^T -> epilogue -> P, and dY^T += X^T P
//     phase 2 (parallel over tiles of the panel)     dX += P Y
// so every output element has one writer and one order of summation, whatever the number of threads.
//
// One exponential serves rows and columns: exp(l - off) with off = max(0, B - 60), where |l| <= B = scale max|x| max|y|.
// It cannot overflow; where it could underflow a whole row or column (R < off - 55), and for B > 110, the online mode
// keeps a maximum for each row and column instead.  (B - 60 alone would cost l its last digits when B is small.)
#pragma once

#include <math.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "buffer.h"
#include "pack.h"
#include "problem.h"

namespace ck {
namespace CK_ISA {

constexpr float kFixedBound = 110.0f, kHeadroom = 60.0f;
constexpr int64_t kChunkBlocks = 128;   // blocks of 32 columns in a chunk: a panel of P is 4 to 6 MiB
constexpr float kUnderflow = 55.0f;     // e^-55 of the offset still leaves 30 nats above the smallest float

// The largest norm of a row; NaN or infinity where a row has one.
template <typename S>
static float largest_norm(const S* data, int64_t rows, int64_t cols, int threads) {
  double worst = 0;
  int bad = 0;
#pragma omp parallel for num_threads(threads) reduction(max : worst) reduction(| : bad)
  for (int64_t r = 0; r < rows; r++) {
    vf sums{};
    float tail = 0;
    int64_t c = 0;
    for (; c + VL <= cols; c += VL) {
      vf v;
      for (int i = 0; i < VL; i++) v[i] = to_float(data[r * cols + c + i]);
      sums += v * v;
    }
    for (; c < cols; c++) tail += to_float(data[r * cols + c]) * to_float(data[r * cols + c]);
    const double square = reduce_add(sums) + tail;
    if (!(square <= 3e38)) bad = 1;
    worst = square > worst ? square : worst;
  }
  return bad ? __builtin_nanf("") : static_cast<float>(::sqrt(worst));
}

// ---------------------------------------------------------------- epilogues on one tile: s (rows, 32), contiguous
struct TileShape {
  int64_t rows;        // valid rows of the tile; the rest are padding
  int64_t first_row;   // in the problem
  int64_t first_col;
  int64_t padded_rows;
};

// Scales the scores, and sets padding and (masked) positives to -infinity; returns positives through `positives`.
static void prepare(const DotProblem& p, const TileShape& t, float* s, float* positives) {
  for (int64_t r = t.rows; r < t.padded_rows; r++)
    for (int c = 0; c < kBlock; c++) s[r * kBlock + c] = neg_inf();
  for (int64_t c = p.m - t.first_col; c < kBlock; c++)
    for (int64_t r = 0; r < t.rows; r++) s[r * kBlock + c] = neg_inf();
  const int64_t first = t.first_col - p.offset - t.first_row;  // the row whose positive is in column 0
  for (int64_t c = 0; c < kBlock; c++) {
    const int64_t r = first + c;
    if (r < 0 || r >= t.rows) continue;
    if (positives) positives[t.first_row + r] = s[r * kBlock + c] * p.scale;
    if (p.mask_positives) s[r * kBlock + c] = neg_inf();
  }
}

// e = exp(scale s - off), kept at `keep` (which may be s) unless that is null; adds to the 32 column sums, writes the
// row sums.
static void exp_sums(float scale, float off, const TileShape& t, const float* s, float* keep, float* row_sum,
                     float* col_sum) {
  constexpr int W = kBlock / VL;
  vf cols[W];
  for (int v = 0; v < W; v++) cols[v] = vf{};
  for (int64_t r = 0; r < t.rows; r++) {
    vf row{};
    for (int v = 0; v < W; v++) {
      const vf e = vexp(load(s + r * kBlock + v * VL) * scale - off);
      if (keep) store(keep + r * kBlock + v * VL, e);
      cols[v] += e;
      row += e;
    }
    row_sum[r] = reduce_add(row);
  }
  for (int v = 0; v < W; v++) store(col_sum + v * VL, load(col_sum + v * VL) + cols[v]);
}

// Adds log-sum-exp b = (max, sum) into a.
static inline void merge(float* max, float* sum, float other_max, float other_sum) {
  if (other_sum == 0) return;
  if (*sum == 0 || other_max > *max) {
    const float factor = *sum == 0 ? 0 : ::expf(*max - other_max);
    *sum = *sum * factor + other_sum;
    *max = other_max;
  } else {
    *sum += other_sum * ::expf(other_max - *max);
  }
}

// Row and column (max, sum) of one tile; col_* is null when columns are not asked for.
static void online_sums(float scale, const TileShape& t, const float* s, float* row_max, float* row_sum,
                        float* col_max, float* col_sum) {
  constexpr int W = kBlock / VL;
  vf top[W];
  for (int v = 0; v < W; v++) top[v] = broadcast(neg_inf());
  for (int64_t r = 0; r < t.rows; r++) {
    vf l[W], m = broadcast(neg_inf());
    for (int v = 0; v < W; v++) {
      l[v] = load(s + r * kBlock + v * VL) * scale;
      m = vmax(m, l[v]);
      top[v] = vmax(top[v], l[v]);
    }
    const float largest = reduce_max(m);
    vf sum{};
    if (largest > neg_inf())
      for (int v = 0; v < W; v++) sum += vexp(l[v] - largest);
    row_max[r] = largest;
    row_sum[r] = reduce_add(sum);
  }
  if (!col_max) return;
  vf sums[W];
  for (int v = 0; v < W; v++) {
    sums[v] = vf{};
    top[v] = top[v] > neg_inf() ? top[v] : vf{};  // an empty column: exp(-inf - 0) = 0
  }
  for (int64_t r = 0; r < t.rows; r++)
    for (int v = 0; v < W; v++) sums[v] += vexp(load(s + r * kBlock + v * VL) * scale - top[v]);
  float tops[kBlock], totals[kBlock];
  for (int v = 0; v < W; v++) store(tops + v * VL, top[v]), store(totals + v * VL, sums[v]);
  for (int c = 0; c < kBlock; c++) merge(col_max + c, col_sum + c, tops[c], totals[c]);
}

// Gradient weights of one backward: p = e (u_i + v_j) with one shared offset, or two exponentials.
struct Weights {
  bool fixed;
  float off;
  const float *u, *v;              // (n,), (padded m,): weights, times exp(off - lse) when fixed
  const float *row_lse, *col_lse;  // online only
};

// p in place of s (scores), or of e (stashed exponentials, where `e` is not null).
static void gradient_tile(const DotProblem& p, const Weights& w, const TileShape& t, float* s, const float* e) {
  constexpr int W = kBlock / VL;
  for (int64_t r = 0; r < t.rows; r++) {
    const int64_t i = t.first_row + r;
    for (int v = 0; v < W; v++) {
      float* at = s + r * kBlock + v * VL;
      const vf col = load(w.v + t.first_col + v * VL);
      if (w.fixed) {
        const vf x = e ? load(e + r * kBlock + v * VL) : vexp(load(at) * p.scale - w.off);
        store(at, x * (col + w.u[i]));
      } else {
        const vf l = load(at) * p.scale;
        vf x = vexp(l - w.row_lse[i]) * w.u[i];
        if (w.col_lse) x += vexp(l - load(w.col_lse + t.first_col + v * VL)) * col;
        store(at, x);
      }
    }
  }
  for (int64_t r = t.rows; r < t.padded_rows; r++)
    for (int c = 0; c < kBlock; c++) s[r * kBlock + c] = 0;
}

// P as the A operand of dX = P Y (blocked) and the B operand of dY^T = X^T P: the tile itself for float.
static inline void emit(const float* p, int64_t rows, float* as_a, float* as_b) {
  if (as_a != p) std::memcpy(as_a, p, rows * kBlock * sizeof(float));
  (void)as_b;
}

#if defined(CK_ISA_amx) || defined(CK_ISA_avx512bf16)
static void emit(const float* p, int64_t rows, bf16* as_a, bf16* as_b) {
  for (int64_t r = 0; r < rows; r += 2) {
    const float* q = p + r * kBlock;
    const __m512i even = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(q + 16), _mm512_loadu_ps(q));
    const __m512i odd = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(q + 48), _mm512_loadu_ps(q + 32));
    _mm512_storeu_si512(as_a + r * kBlock, even);
    _mm512_storeu_si512(as_a + (r + 1) * kBlock, odd);
    for (int half = 0; half < 2; half++) {
      const __m256i lo = half ? _mm512_extracti64x4_epi64(even, 1) : _mm512_castsi512_si256(even);
      const __m256i hi = half ? _mm512_extracti64x4_epi64(odd, 1) : _mm512_castsi512_si256(odd);
      const __m512i pair = _mm512_or_si512(_mm512_cvtepu16_epi32(lo), _mm512_slli_epi32(_mm512_cvtepu16_epi32(hi), 16));
      _mm512_storeu_si512(as_b + r * kBlock + half * 32, pair);
    }
  }
}
#endif

static void to_stash(const float* e, int64_t rows, bf16* out) {
  for (int64_t k = 0; k < rows * kBlock; k++) from_float(e[k], out + k);
}

static void from_stash(const bf16* e, int64_t rows, float* out) {
  for (int64_t k = 0; k < rows * kBlock; k++) out[k] = to_float(e[k]);
}

// ---------------------------------------------------------------- forward
// T: the engine's operand type; S: the features' dtype.  Returns false where the fixed offset underflowed.
template <typename T, typename S>
static bool forward_sweep(const DotForward& p, bool fixed, float off) {
  const int64_t dp = pad32(p.d), mp = pad32(p.m), panel = Engine<T>::kPanelRows, blocks = mp / kBlock;
  const int64_t rows_cap = pad32(p.n) < panel ? pad32(p.n) : panel;
  constexpr int64_t W = Engine<T>::kWidth;
  const int64_t chunk = blocks < kChunkBlocks ? blocks : kChunkBlocks;
  Buffer<T> yt(mp * dp), xa(rows_cap * dp);
  Buffer<float> col_sum(mp), col_max(fixed ? 0 : mp), part_sum(chunk * rows_cap),
      part_max(fixed ? 0 : chunk * rows_cap);
  Buffer<double> row_sum(rows_cap), row_max(rows_cap);
  const Rows<S> y{static_cast<const S*>(p.y), p.m, p.d, 0, mp};
  bool underflow = false;

  if (p.stash) prefer_huge_pages(p.stash, p.n * mp * (p.stash_dtype == kBFloat16 ? sizeof(bf16) : sizeof(float)));

#pragma omp parallel num_threads(p.threads)
  {
    Buffer<float> tile(W * rows_cap * kBlock);
    Engine<T>::enter();
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
      pack_b_transposed(y, b, b + 1, yt.data, dp);
      for (int c = 0; c < kBlock; c++) {
        col_sum.data[b * kBlock + c] = 0;
        if (!fixed) col_max.data[b * kBlock + c] = neg_inf();
      }
    }
    for (int64_t i0 = 0; i0 < p.n; i0 += panel) {
      const int64_t valid = p.n - i0 < panel ? p.n - i0 : panel, rows = pad32(valid);
      const Rows<S> x{static_cast<const S*>(p.x), p.n, p.d, i0, rows};
#pragma omp for schedule(static)
      for (int64_t b = 0; b < dp / kBlock; b++) pack_blocked<T>(x, b, b + 1, xa.data, rows);
      for (int64_t b0 = 0; b0 < blocks; b0 += chunk) {
        const int64_t b1 = b0 + chunk < blocks ? b0 + chunk : blocks;
#pragma omp for schedule(dynamic, 1)
        for (int64_t b = b0; b < b1; b += W) {
          const int64_t width = b1 - b < W ? b1 - b : W;
          Engine<T>::multiply({xa.data, rows * kBlock}, rows, {yt.data + b * dp * kBlock, dp * kBlock}, width, dp,
                              {tile.data, rows * kBlock}, false);
          for (int64_t c = b; c < b + width; c++) {
            const TileShape t{valid, i0, c * kBlock, rows};
            float *s = tile.data + (c - b) * rows * kBlock, *rs = part_sum.data + (c - b0) * rows,
                  *cs = col_sum.data + c * kBlock;
            prepare(p, t, s, p.positives);
            if (fixed) {
              const int64_t at = (c * p.n + i0) * kBlock;
              const bool narrow = p.stash_dtype == kBFloat16;
              exp_sums(p.scale, off, t, s, !p.stash ? nullptr : narrow ? s : static_cast<float*>(p.stash) + at, rs, cs);
              if (p.stash && narrow) to_stash(s, valid, static_cast<bf16*>(p.stash) + at);
            } else {
              online_sums(p.scale, t, s, part_max.data + (c - b0) * rows, rs,
                          p.col_lse ? col_max.data + c * kBlock : nullptr, cs);
            }
          }
        }
#pragma omp for schedule(static)
        for (int64_t r = 0; r < valid; r++) {
          double sum = b0 ? row_sum.data[r] : 0, top = b0 ? row_max.data[r] : neg_inf();
          for (int64_t b = 0; b < b1 - b0; b++) {
            const double s = part_sum.data[b * rows + r];
            if (fixed) {
              sum += s;
            } else if (s > 0 || s != s) {
              const double m = part_max.data[b * rows + r], next = m > top ? m : top;
              sum = sum * (sum > 0 ? ::exp(top - next) : 0) + s * ::exp(m - next);
              top = next;
            }
          }
          row_sum.data[r] = sum;
          row_max.data[r] = top;
          if (b1 == blocks) p.row_lse[i0 + r] = static_cast<float>(::log(sum) + (fixed ? off : top));
        }
      }
    }
    Engine<T>::leave();
  }
  if (p.col_lse)
    for (int64_t j = 0; j < p.m; j++) p.col_lse[j] = ::logf(col_sum.data[j]) + (fixed ? off : col_max.data[j]);
  // A row of one masked column, or a column of one masked row, is empty and rightly -infinity.
  for (int64_t i = 0; fixed && (p.m > 1 || !p.mask_positives) && i < p.n; i++)
    underflow |= p.row_lse[i] < off - kUnderflow;
  for (int64_t j = 0; fixed && p.col_lse && (p.n > 1 || !p.mask_positives) && j < p.m; j++)
    underflow |= p.col_lse[j] < off - kUnderflow;
  return !underflow;
}

// ---------------------------------------------------------------- backward
static inline void transpose_in_place(float* block) {
  float copy[kBlock][kBlock + 1];
  for (int r = 0; r < kBlock; r++) std::memcpy(copy[r], block + r * kBlock, kBlock * sizeof(float));
  for (int c = 0; c < kBlock; c++)
    for (int r = 0; r < kBlock; r++) block[c * kBlock + r] = copy[r][c];
}

// One row of a gradient: out = scale (sums + weight positive); `positive` may be null.  Returns <out / scale, along>.
template <typename S>
static inline double finish_row(const DotProblem& p, const float* sums, int64_t block, float weight, const S* positive,
                                const S* along, S* out) {
  constexpr int kLanes = 8;
  double lanes[kLanes] = {};
  for (int64_t c0 = 0; c0 < p.d; c0 += kBlock, sums += block) {
    const int cols = p.d - c0 < kBlock ? p.d - c0 : kBlock;
    float g[kBlock] = {};
    for (int c = 0; c < cols; c++) g[c] = sums[c] + (positive ? weight * to_float(positive[c0 + c]) : 0);
    for (int c = 0; c < cols; c++) from_float(p.scale * g[c], out + c0 + c);
    if (cols == kBlock)
      for (int c = 0; c < kBlock; c += kLanes)
        for (int l = 0; l < kLanes; l++) lanes[l] += static_cast<double>(g[c + l]) * to_float(along[c0 + c + l]);
    else
      for (int c = 0; c < cols; c++) lanes[c % kLanes] += static_cast<double>(g[c]) * to_float(along[c0 + c]);
  }
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

template <typename T, typename S>
static void backward_sweep(const DotBackward& p, const Weights& w) {
  const int64_t dp = pad32(p.d), mp = pad32(p.m), panel = Engine<T>::kPanelRows, blocks = mp / kBlock;
  const int64_t rows_cap = pad32(p.n) < panel ? pad32(p.n) : panel, dblocks = dp / kBlock;
  constexpr int64_t W = Engine<T>::kWidth;
  const int64_t chunk = blocks < kChunkBlocks ? blocks : kChunkBlocks;
  constexpr bool two_forms = sizeof(T) != sizeof(float);  // bf16: P is kept blocked and paired
  Buffer<T> yt(p.stash ? 0 : mp * dp), yb(p.dx ? mp * dp : 0), xa(p.stash ? 0 : rows_cap * dp),
      xt(p.dy ? rows_cap * dp : 0), pa(chunk * rows_cap * kBlock);
  Buffer<float> dyt(p.dy ? mp * dp : 0), dxp(p.dx ? rows_cap * dp : 0);
  const int64_t lines = p.dx ? p.n : p.m;
  Buffer<double> dscale_lines(lines);
  const Rows<S> y{static_cast<const S*>(p.y), p.m, p.d, 0, mp};
  const S *xs = static_cast<const S*>(p.x), *ys = static_cast<const S*>(p.y);

#pragma omp parallel num_threads(p.threads)
  {
    Buffer<float> tile(W * rows_cap * kBlock), stashed(p.stash && p.stash_dtype == kBFloat16 ? rows_cap * kBlock : 0);
    Buffer<T> paired(two_forms ? rows_cap * kBlock : 0);
    Engine<T>::enter();
    if (!p.stash) {
#pragma omp for schedule(static)
      for (int64_t b = 0; b < blocks; b++) pack_b_transposed(y, b, b + 1, yt.data, dp);
    }
    if (p.dx) {
#pragma omp for schedule(static)
      for (int64_t b = 0; b < dblocks; b++) pack_b(y, b, b + 1, yb.data, mp);
    }
    for (int64_t i0 = 0; i0 < p.n; i0 += panel) {
      const int64_t valid = p.n - i0 < panel ? p.n - i0 : panel, rows = pad32(valid);
      const Rows<S> x{xs, p.n, p.d, i0, rows};
      if (!p.stash) {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < dblocks; b++) pack_blocked<T>(x, b, b + 1, xa.data, rows);
      }
      if (p.dy) {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < rows / kBlock; b++) pack_transposed<T>(x, b, b + 1, xt.data, dp);
      }
      for (int64_t b0 = 0; b0 < blocks; b0 += chunk) {
        const int64_t b1 = b0 + chunk < blocks ? b0 + chunk : blocks;
#pragma omp for schedule(dynamic, 1)
        for (int64_t b = b0; b < b1; b += W) {
          const int64_t width = b1 - b < W ? b1 - b : W;
          T *as_a = pa.data + (b - b0) * rows * kBlock, *as_b = two_forms ? paired.data : as_a;
          float* s = two_forms ? tile.data : reinterpret_cast<float*>(as_a);
          if (!p.stash)
            Engine<T>::multiply({xa.data, rows * kBlock}, rows, {yt.data + b * dp * kBlock, dp * kBlock}, width, dp,
                                {s, rows * kBlock}, false);
          for (int64_t c = 0; c < width; c++) {
            const TileShape t{valid, i0, (b + c) * kBlock, rows};
            const int64_t at = c * rows * kBlock, stash_at = ((b + c) * p.n + i0) * kBlock;
            const float* e = nullptr;
            if (p.stash && p.stash_dtype == kBFloat16) {
              from_stash(static_cast<const bf16*>(p.stash) + stash_at, valid, stashed.data);
              e = stashed.data;
            } else if (p.stash) {
              e = static_cast<const float*>(p.stash) + stash_at;
            } else {
              prepare(p, t, s + at, nullptr);
            }
            gradient_tile(p, w, t, s + at, e);
            emit(s + at, rows, as_a + at, as_b + at);
          }
          if (p.dy)
            Engine<T>::multiply({xt.data, dp * kBlock}, dp, {as_b, rows * kBlock}, width, rows,
                                {dyt.data + b * dp * kBlock, dp * kBlock}, i0 > 0);
        }
        if (!p.dx) continue;
        constexpr int64_t kTileRows = 192;
        const int64_t row_tiles = (rows + kTileRows - 1) / kTileRows, tasks = (dblocks + W - 1) / W;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < row_tiles * tasks; task++) {
          const int64_t r = task / tasks * kTileRows, db = task % tasks * W;
          const int64_t height = rows - r < kTileRows ? rows - r : kTileRows;
          Engine<T>::multiply({pa.data + r * kBlock, rows * kBlock}, height,
                              {yb.data + (db * mp + b0 * kBlock) * kBlock, mp * kBlock},
                              dblocks - db < W ? dblocks - db : W, (b1 - b0) * kBlock,
                              {dxp.data + (db * rows + r) * kBlock, rows * kBlock}, b0 > 0);
        }
      }
      if (!p.dx) continue;
#pragma omp for schedule(static)
      for (int64_t r = 0; r < valid; r++) {
        const int64_t i = i0 + r;
        dscale_lines.data[i] = finish_row(p, dxp.data + r * kBlock, rows * kBlock, p.positive_grad[i],
                                          ys + (p.offset + i) * p.d, xs + i * p.d, static_cast<S*>(p.dx) + i * p.d);
      }
    }
    Engine<T>::leave();
    if (p.dy) {
#pragma omp single
      {  // dy is about to be touched for the first time: the peak stays where it is
        yt.release();
        yb.release();
      }
#pragma omp for schedule(static)
      for (int64_t b = 0; b < blocks; b++) {
        float* block = dyt.data + b * dp * kBlock;
        for (int64_t c = 0; c < dblocks; c++) transpose_in_place(block + c * kBlock * kBlock);
        for (int64_t j = b * kBlock; j < p.m && j < (b + 1) * kBlock; j++) {
          const int64_t i = j - p.offset;
          const bool positive = i >= 0 && i < p.n;
          const double along =
              finish_row(p, block + j % kBlock * kBlock, kBlock * kBlock, positive ? p.positive_grad[i] : 0,
                         positive ? xs + i * p.d : nullptr, ys + j * p.d, static_cast<S*>(p.dy) + j * p.d);
          if (!p.dx) dscale_lines.data[j] = along;
        }
      }
    }
  }
  double total = 0;
  for (int64_t i = 0; i < lines; i++) total += dscale_lines.data[i];
  *p.dscale = total;
}

// ---------------------------------------------------------------- entry points
static inline float score_bound(const DotProblem& p) {
  float a, b;
  if (p.dtype == kBFloat16) {
    a = largest_norm(static_cast<const bf16*>(p.x), p.n, p.d, p.threads);
    b = largest_norm(static_cast<const bf16*>(p.y), p.m, p.d, p.threads);
  } else if (p.dtype == kFloat16) {
    a = largest_norm(static_cast<const _Float16*>(p.x), p.n, p.d, p.threads);
    b = largest_norm(static_cast<const _Float16*>(p.y), p.m, p.d, p.threads);
  } else {
    a = largest_norm(static_cast<const float*>(p.x), p.n, p.d, p.threads);
    b = largest_norm(static_cast<const float*>(p.y), p.m, p.d, p.threads);
  }
  return ::fabsf(p.scale) * a * b;
}

#if defined(CK_ISA_amx) || defined(CK_ISA_avx512bf16)
using Bf16Operand = bf16;
#else
using Bf16Operand = float;  // no bf16 products here: upcast
#endif

static bool forward_any(const DotForward& p, bool fixed, float off) {
  if (p.dtype == kBFloat16) return forward_sweep<Bf16Operand, bf16>(p, fixed, off);
  if (p.dtype == kFloat16) return forward_sweep<float, _Float16>(p, fixed, off);
  return forward_sweep<float, float>(p, fixed, off);
}

static inline float shared_offset(float bound) { return bound > kHeadroom ? bound - kHeadroom : 0; }

static void dot_forward(const DotForward& p) {
  const float bound = score_bound(p), off = shared_offset(bound);
  *p.stash_offset = __builtin_nanf("");
  if (!(bound < 1e37f)) {  // NaN or infinity somewhere, or scores past float32
    for (int64_t i = 0; i < p.n; i++) p.row_lse[i] = p.positives[i] = __builtin_nanf("");
    for (int64_t j = 0; p.col_lse && j < p.m; j++) p.col_lse[j] = __builtin_nanf("");
    return;
  }
  if (bound <= kFixedBound && forward_any(p, true, off)) {
    if (p.stash) *p.stash_offset = off;
    return;
  }
  DotForward online = p;
  online.stash = nullptr;
  forward_any(online, false, 0);
}

static void dot_backward(const DotBackward& q) {
  DotBackward p = q;
  const int64_t mp = pad32(p.m);
  Buffer<float> u(p.n), v(mp), cols(mp);
  // the forward's choice again: fixed where no row or column lies too far below the offset
  const bool stashed = p.stash && p.stash_offset == p.stash_offset;
  const float bound = stashed ? 0 : score_bound(p), off = stashed ? p.stash_offset : shared_offset(bound);
  bool fixed = bound <= kFixedBound;
  for (int64_t i = 0; i < p.n; i++) fixed &= !(p.row_lse[i] < off - kUnderflow);
  for (int64_t j = 0; p.col_lse && j < p.m; j++)
    fixed &= !(p.col_lse[j] < off - kUnderflow) || p.col_weight[j] == 0;
  for (int64_t i = 0; i < p.n; i++) u.data[i] = fixed ? ::expf(off - p.row_lse[i]) * p.row_weight[i] : p.row_weight[i];
  for (int64_t j = 0; j < mp; j++) {
    const bool used = p.col_lse && j < p.m && p.col_weight[j] != 0;
    v.data[j] = used ? p.col_weight[j] * (fixed ? ::expf(off - p.col_lse[j]) : 1.0f) : 0.0f;
    cols.data[j] = used ? p.col_lse[j] : 0.0f;
  }
  if (!fixed) p.stash = nullptr;
  const Weights w{fixed, off, u.data, v.data, p.row_lse, p.col_lse ? cols.data : nullptr};
  if (!stashed) p.stash = nullptr;
  if (p.dtype == kBFloat16)
    backward_sweep<Bf16Operand, bf16>(p, w);
  else if (p.dtype == kFloat16)
    backward_sweep<float, _Float16>(p, w);
  else
    backward_sweep<float, float>(p, w);
}

}  // namespace CK_ISA
}  // namespace ck
