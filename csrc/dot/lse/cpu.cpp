// dot_lse on the CPU, on the tiles of dot/sweep.h.
//
//     forward    R_i = log sum_j exp l_ij          C_j = log sum_i exp l_ij
//     backward   G_ij = exp(l_ij - R_i) u_i + exp(l_ij - C_j) v_j
//
// One exponential serves rows and columns: exp(l - shift), shift = max(0, B - 60), where |l| <= B = scale max|x| max|y|.
// It cannot overflow; where it could underflow a whole row or column (R < shift - 55), and for B > 110, the online mode
// keeps a maximum for each row and column instead.  (B - 60 alone would cost l its last digits when B is small.)
#include "dot/lse/dot_lse.h"

#include "dot/sweep.h"

namespace ck {
namespace CK_ISA {

constexpr float kFixedBound = 110.0f, kHeadroom = 60.0f;
constexpr float kUnderflow = 55.0f;  // e^-55 of the shift still leaves 30 nats above the smallest float
constexpr int64_t kRowGroup = 64;    // rows whose parts are added up together

constexpr float kLog2e = 1.44269504f;

// ---------------------------------------------------------------- epilogues of the forward
struct Sums {
  float *row_max, *row_sum;  // of the tile, (rows,): written
  float *col_max, *col_sum;  // of the problem, at the tile's columns: added to; col_max is null where nobody wants it
};

// e = exp(scale s - shift) of WIDTH blocks, one `stride` after the other, and its sums; the maxima of scale s where MAX (scale
// is positive).  e is kept at `keep`, whose blocks are `keep_stride` apart, unless that is null.
template <bool MAX, int WIDTH>
static void exp_sums(float scale, float shift, const TileShape& t, const float* s, int64_t stride, float* keep,
                     int64_t keep_stride, const Sums& sums) {
  constexpr int W = kBlock / VL;
  const vf factor = broadcast(scale * kLog2e), shift_log2 = broadcast(shift * kLog2e);
  vf cols[WIDTH * W], tops[WIDTH * W];
  for (int v = 0; v < WIDTH * W; v++) cols[v] = vf{}, tops[v] = broadcast(neg_inf());
  for (int64_t r0 = 0; r0 < t.rows; r0 += VL) {
    const int64_t count = t.rows - r0 < VL ? t.rows - r0 : VL;
    vf row[VL];
    for (int64_t i = count; i < VL; i++) row[i] = vf{};
    for (int64_t i = 0; i < count; i++) {
      vf sum{}, top = broadcast(neg_inf());
      for (int v = 0; v < WIDTH * W; v++) {
        const int64_t at = (r0 + i) * kBlock + v % W * VL;
        const vf score = load(s + v / W * stride + at);
        if (MAX) top = vmax(top, score), tops[v] = vmax(tops[v], score);
        const vf e = vexp2(score * factor - shift_log2);
        if (keep) {
          float* out = keep + v / W * keep_stride + at;
          if (v * VL % kLine == 0) __builtin_prefetch(out + 16 * kBlock, 1);  // a stash is in memory
          store(out, e);
        }
        cols[v] += e;
        sum += e;
      }
      row[i] = sum;
      if (MAX) sums.row_max[r0 + i] = scale * reduce_max(top);
    }
    float out[VL];
    reduce_add_each(row, count == VL ? sums.row_sum + r0 : out);
    for (int64_t i = 0; count < VL && i < count; i++) sums.row_sum[r0 + i] = out[i];
  }
  for (int v = 0; v < WIDTH * W; v++) {
    float *sum = sums.col_sum + v * VL, *max = sums.col_max + v * VL;
    store(sum, load(sum) + cols[v]);
    if (MAX && sums.col_max) store(max, vmax(load(max), scale * tops[v]));
  }
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

// Sums relative to the maxima; no columns where col_max is null.
static void online_sums(float scale, const TileShape& t, const float* s, const Sums& sums) {
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
    vf row{};
    if (largest > neg_inf())
      for (int v = 0; v < W; v++) row += vexp(l[v] - largest);
    sums.row_max[r] = largest;
    sums.row_sum[r] = reduce_add(row);
  }
  if (!sums.col_max) return;
  vf cols[W];
  for (int v = 0; v < W; v++) {
    cols[v] = vf{};
    top[v] = top[v] > neg_inf() ? top[v] : vf{};  // an empty column: exp(-inf - 0) = 0
  }
  for (int64_t r = 0; r < t.rows; r++)
    for (int v = 0; v < W; v++) cols[v] += vexp(load(s + r * kBlock + v * VL) * scale - top[v]);
  float tops[kBlock], totals[kBlock];
  for (int v = 0; v < W; v++) store(tops + v * VL, top[v]), store(totals + v * VL, cols[v]);
  for (int c = 0; c < kBlock; c++) merge(sums.col_max + c, sums.col_sum + c, tops[c], totals[c]);
}

// The parts that one product of blocks has of rows [r0, r1), added to the rows': sums of one shift and, unless `top` is null,
// maxima.
static void add_parts(const float* sum, const float* top, int64_t r0, int64_t r1, double* row_sum, double* row_max) {
  for (int64_t r = r0; r < r1; r++) row_sum[r] += sum[r];
  for (int64_t r = r0; top && r < r1; r++) row_max[r] = top[r] > row_max[r] ? top[r] : row_max[r];
}

// The same for sums relative to their maxima.
static void merge_parts(const float* sum, const float* top, int64_t r0, int64_t r1, double* row_sum, double* row_max) {
  for (int64_t r = r0; r < r1; r++) {
    if (!(sum[r] > 0 || sum[r] != sum[r])) continue;
    const double m = top[r], next = m > row_max[r] ? m : row_max[r];
    row_sum[r] = row_sum[r] * (row_sum[r] > 0 ? ::exp(row_max[r] - next) : 0) + sum[r] * ::exp(m - next);
    row_max[r] = next;
  }
}

static void to_stash(const float* e, int64_t rows, bf16* out) {
#if defined(__AVX512BF16__)
  for (int64_t k = 0; k < rows * kBlock; k += VL)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + k), (__m256i)_mm512_cvtneps_pbh(load(e + k)));
#else
  for (int64_t k = 0; k < rows * kBlock; k += 8) store8(load8(e + k), out + k);
#endif
}

// The epilogue of a product of WIDTH blocks with one shift: sums, and the stash where there is one.
template <int WIDTH>
static void fixed_sums(const DotForward& p, float shift, const TileShape& t, float* s, int64_t stride,
                       const Sums& sums) {
  const bool narrow = p.stash_dtype == kBFloat16;
  const int64_t block = p.n * kBlock, at = t.first_col / kBlock * block + t.first_row * kBlock;
  float* keep = !p.stash ? nullptr : narrow ? s : static_cast<float*>(p.stash) + at;
  if (sums.row_max)
    exp_sums<true, WIDTH>(p.scale, shift, t, s, stride, keep, narrow ? stride : block, sums);
  else
    exp_sums<false, WIDTH>(p.scale, shift, t, s, stride, keep, narrow ? stride : block, sums);
  for (int c = 0; p.stash && narrow && c < WIDTH; c++)
    to_stash(s + c * stride, t.rows, static_cast<bf16*>(p.stash) + at + c * block);
}

// A sum lies so far below the shift that its exponentials lost digits, or all of them: one that is empty does not.
static bool underflowed(const DotForward& p, float shift) {
  const int64_t groups = p.row_ids ? p.n + p.m : 0;
  ZeroBuffer<int64_t> in_rows(groups), in_cols(groups);  // members of each group
  for (int64_t i = 0; groups && i < p.n; i++) in_rows.data[p.row_ids[i]]++;
  for (int64_t j = 0; groups && j < p.m; j++) in_cols.data[p.col_ids[j]]++;
  for (int64_t i = 0; i < p.n; i++) {
    const bool same = groups && p.row_ids[i] == p.col_ids[p.first_positive + i];
    const int64_t left_out = (groups ? in_cols.data[p.row_ids[i]] : 0) + (p.mask_positives && !same);
    if (p.row_lse[i] < shift - kUnderflow && left_out < p.m) return true;
  }
  for (int64_t j = 0; p.col_lse && j < p.m; j++) {
    const int64_t i = j - p.first_positive;
    const bool positive = i >= 0 && i < p.n, same = positive && groups && p.row_ids[i] == p.col_ids[j];
    const int64_t left_out = (groups ? in_rows.data[p.col_ids[j]] : 0) + (p.mask_positives && positive && !same);
    if (p.col_lse[j] < shift - kUnderflow && left_out < p.n) return true;
  }
  return false;
}

// T: the engine's operand type; S: the features' dtype.  Returns false where the fixed shift underflowed.
template <typename T, typename S>
static bool forward_sweep(const DotForward& p, bool fixed, float shift) {
  const int64_t dp = pad32(p.d), mp = pad32(p.m), panel = Engine<T>::kPanelRows, blocks = mp / kBlock;
  const int64_t rows_cap = pad32(p.n) < panel ? pad32(p.n) : panel;
  constexpr int64_t W = Engine<T>::kWidth;
  const int64_t chunk = blocks < kChunkBlocks ? blocks : kChunkBlocks;
  const bool row_tops = !fixed || p.row_max, col_tops = p.col_lse && (!fixed || p.col_max);
  const bool once = packed_once<T, S>(blocks);
  Buffer<T> yt(once ? mp * dp : 0), xa(rows_cap * dp);
  Buffer<float> col_sum(mp), col_max(col_tops ? mp : 0), part_sum(chunk * rows_cap),
      part_max(row_tops ? chunk * rows_cap : 0);
  Buffer<double> row_sum(rows_cap), row_max(rows_cap);
  const Rows<S> y{static_cast<const S*>(p.y), p.m, p.d, 0, mp};

#pragma omp parallel num_threads(p.threads)
  {
    Buffer<float> tile(W * rows_cap * kBlock);
    Buffer<T> own_yt(once ? 0 : W * dp * kBlock);
    Engine<T>::enter();
#pragma omp for schedule(static) nowait
    for (int64_t b = 0; b < blocks; b++) {
      if (once) pack_b_transposed(y, b, b + 1, yt.data, dp);
      for (int c = 0; c < kBlock; c++) {
        col_sum.data[b * kBlock + c] = 0;
        if (col_tops) col_max.data[b * kBlock + c] = neg_inf();
      }
    }
    for (int64_t i0 = 0; i0 < p.n; i0 += panel) {
      const int64_t valid = p.n - i0 < panel ? p.n - i0 : panel, rows = pad32(valid);
      const Rows<S> x{static_cast<const S*>(p.x), p.n, p.d, i0, rows};
#pragma omp for schedule(static)
      for (int64_t r = 0; r < rows; r += kBlock) pack_blocked<T>(x, r, r + kBlock, dp / kBlock, xa.data, rows);
      for (int64_t b0 = 0; b0 < blocks; b0 += chunk) {
        const int64_t b1 = b0 + chunk < blocks ? b0 + chunk : blocks;
#pragma omp for schedule(dynamic, 1)
        for (int64_t b = b0; b < b1; b += W) {
          const int64_t width = b1 - b < W ? b1 - b : W;
          const T* bt = once ? yt.data + b * dp * kBlock : own_yt.data;
          if (!once) pack_b_transposed(y.from(b * kBlock), 0, width, own_yt.data, dp);
          Engine<T>::multiply({xa.data, rows * kBlock}, rows, {bt, dp * kBlock}, width, dp, {tile.data, rows * kBlock},
                              false);
          const int64_t stride = rows * kBlock;
          for (int64_t c = 0; c < width; c++) {
            const TileShape part{valid, i0, (b + c) * kBlock, rows};
            mask(p, p.mask_positives, true, part, tile.data + c * stride, p.positives);
            if (p.row_limits) mask_above(p.row_limits, p.scale, part, tile.data + c * stride);
          }
          const auto sums = [&](int64_t c) {
            return Sums{row_tops ? part_max.data + (c - b0) * rows : nullptr, part_sum.data + (c - b0) * rows,
                        col_tops ? col_max.data + c * kBlock : nullptr, col_sum.data + c * kBlock};
          };
          const TileShape t{valid, i0, b * kBlock, rows};
          if (fixed && width == W)
            fixed_sums<W>(p, shift, t, tile.data, stride, sums(b));
          else if (fixed)
            fixed_sums<1>(p, shift, t, tile.data, stride, sums(b));
          else
            for (int64_t c = 0; c < width; c++) online_sums(p.scale, t, tile.data + c * stride, sums(b + c));
        }
#pragma omp for schedule(static)
        for (int64_t r0 = 0; r0 < valid; r0 += kRowGroup) {
          const int64_t r1 = r0 + kRowGroup < valid ? r0 + kRowGroup : valid;
          for (int64_t r = r0; b0 == 0 && r < r1; r++) row_sum.data[r] = 0, row_max.data[r] = neg_inf();
          for (int64_t b = 0; b < b1 - b0; b += fixed ? W : 1) {
            const float *sum = part_sum.data + b * rows, *top = row_tops ? part_max.data + b * rows : nullptr;
            if (fixed)
              add_parts(sum, top, r0, r1, row_sum.data, row_max.data);
            else
              merge_parts(sum, top, r0, r1, row_sum.data, row_max.data);
          }
          if (b1 < blocks) continue;
          for (int64_t r = r0; r < r1; r++) {
            p.row_lse[i0 + r] = static_cast<float>(::log(row_sum.data[r]) + (fixed ? shift : row_max.data[r]));
            if (p.row_max) p.row_max[i0 + r] = static_cast<float>(row_max.data[r]);
          }
        }
      }
    }
    Engine<T>::leave();
  }
  for (int64_t j = 0; p.col_lse && j < p.m; j++) {
    p.col_lse[j] = ::logf(col_sum.data[j]) + (fixed ? shift : col_max.data[j]);
    if (p.col_max) p.col_max[j] = col_max.data[j];
  }
  return !fixed || !underflowed(p, shift);
}

static bool forward_any(const DotForward& p, bool fixed, float shift) {
  if (p.dtype == kBFloat16) return forward_sweep<Bf16Operand, bf16>(p, fixed, shift);
  if (p.dtype == kFloat16) return forward_sweep<float, fp16>(p, fixed, shift);
  return forward_sweep<float, float>(p, fixed, shift);
}

static inline float shared_shift(float bound) { return bound > kHeadroom ? bound - kHeadroom : 0; }

void dot_lse_forward(const DotForward& p) {
  const float bound = score_bound(p), shift = shared_shift(bound);
  *p.stash_shift = __builtin_nanf("");
  if (!(bound < 1e37f)) {  // NaN or infinity somewhere, or scores past float32
    fill_nan(p.row_lse, p.n), fill_nan(p.positives, p.n), fill_nan(p.row_max, p.n);
    fill_nan(p.col_lse, p.m), fill_nan(p.col_max, p.m);
    return;
  }
  if (bound <= kFixedBound && forward_any(p, true, shift)) {
    *p.stash_shift = shift;
    return;
  }
  DotForward online = p;
  online.stash = nullptr;
  forward_any(online, false, 0);
}

// ---------------------------------------------------------------- backward
// Gradient weights of one backward: G = e (u_i + v_j) with one shift for all pairs, or two exponentials.
struct Weights {
  bool fixed;
  float shift;
  const float *u, *v;              // (n,), (padded m,): weights, times exp(shift - lse) when fixed
  const float *row_lse, *col_lse;  // online only
};

// G in place of the scores s; from the stashed exponentials e where that is not null.
template <typename E>
static void gradient_tile(const DotProblem& p, const Weights& w, const TileShape& t, float* s, const E* e) {
  constexpr int W = kBlock / VL;
  const vf factor = broadcast(p.scale * kLog2e), shift_log2 = broadcast(w.shift * kLog2e);
  vf cols[W];
  for (int v = 0; v < W; v++) cols[v] = load(w.v + t.first_col + v * VL);
  constexpr int64_t kAhead = 32;  // rows: exponentials come from memory and G's place from the last cache
  for (int64_t r = 0; r < t.rows; r++) {
    const int64_t i = t.first_row + r;
    for (int line = 0; e && line < kBlock; line += kLine) {
      __builtin_prefetch(e + (r + kAhead) * kBlock + line);
      __builtin_prefetch(s + (r + kAhead) * kBlock + line, 1);
    }
    for (int v = 0; v < W; v++) {
      float* at = s + r * kBlock + v * VL;
      if (w.fixed) {
        const vf x = e ? load(e + r * kBlock + v * VL) : vexp2(load(at) * factor - shift_log2);
        store(at, x * (cols[v] + w.u[i]));
      } else {
        const vf l = load(at) * p.scale;
        vf x = vexp(l - w.row_lse[i]) * w.u[i];
        if (w.col_lse) x += vexp(l - load(w.col_lse + t.first_col + v * VL)) * cols[v];
        store(at, x);
      }
    }
  }
  for (int64_t r = t.rows; r < t.padded_rows; r++)
    for (int c = 0; c < kBlock; c++) s[r * kBlock + c] = 0;
}

struct Gradient {
  static constexpr bool kRowSums = false;
  const DotBackward& p;
  const Weights& w;
  bool needs_scores;

  void tile(const TileShape& t, float* s, float*) const {
    const int64_t at = (t.first_col / kBlock * p.n + t.first_row) * kBlock;
    if (needs_scores) {
      mask(p, p.mask_positives, true, t, s, nullptr);
      if (p.row_limits) mask_above(p.row_limits, p.scale, t, s);
      gradient_tile<float>(p, w, t, s, nullptr);
    } else if (p.stash_dtype == kBFloat16) {
      gradient_tile(p, w, t, s, static_cast<const bf16*>(p.stash) + at);
    } else {
      gradient_tile(p, w, t, s, static_cast<const float*>(p.stash) + at);
    }
  }
  void add_row(int64_t, double) const {}
  Blocks<const float> soon(int64_t first_col, int64_t first_row) const {
    if (needs_scores || p.stash_dtype == kBFloat16 || first_col >= p.m) return {};
    return {static_cast<const float*>(p.stash) + (first_col / kBlock * p.n + first_row) * kBlock, p.n * kBlock};
  }
};

// An empty sum has the logarithm -infinity and no gradient: weight 0 beside any finite number.
static void clean(int64_t count, const float* lse, const float* weight, float* lse_out, float* weight_out) {
  for (int64_t i = 0; i < count; i++) {
    const bool empty = lse[i] == neg_inf();
    lse_out[i] = empty ? 0 : lse[i];
    weight_out[i] = empty ? 0 : weight[i];
  }
}

void dot_lse_backward(const DotBackward& p) {
  const int64_t mp = pad32(p.m), given = p.col_lse ? p.m : 0;
  Buffer<float> rows(p.n), u(p.n);
  ZeroBuffer<float> cols(mp), v(mp);
  clean(p.n, p.row_lse, p.row_weight, rows.data, u.data);
  clean(given, p.col_lse, p.col_weight, cols.data, v.data);
  // the forward's choice again, unless a row or column lies too far below the shift
  const float shift = p.stash_shift;
  bool fixed = shift == shift;
  for (int64_t i = 0; i < p.n; i++) fixed &= !(rows.data[i] < shift - kUnderflow);
  for (int64_t j = 0; j < given; j++) fixed &= !(cols.data[j] < shift - kUnderflow) || v.data[j] == 0;
  for (int64_t i = 0; fixed && i < p.n; i++) u.data[i] *= ::expf(shift - rows.data[i]);
  for (int64_t j = 0; j < given; j++) {
    if (v.data[j] == 0)
      cols.data[j] = 0;
    else if (fixed)
      v.data[j] *= ::expf(shift - cols.data[j]);
  }
  const Weights w{fixed, shift, u.data, v.data, rows.data, p.col_lse ? cols.data : nullptr};
  gradient_pass(p, Gradient{p, w, !(p.stash && fixed)});
}

}  // namespace CK_ISA
}  // namespace ck
