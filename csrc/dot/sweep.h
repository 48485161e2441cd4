// The dot family on the CPU: all-pairs scores in tiles of (panel rows) x 32 columns, an epilogue, and nothing of n x m.
//
//     S = X Y^T -> epilogue -> G        dx_i = scale (sum_j G_ij y_j + p_i y_i+)     dy_j = scale (sum_i G_ij x_i + p_j- x_j-)
//
// Rows go in panels that stay in the L2 cache, columns in chunks.  Within a panel and a chunk
//     phase 1 (parallel over blocks of 32 columns)   S = X Y^T -> epilogue -> G, and dY^T += X^T G
//     phase 2 (parallel over tiles of the panel)     dX += G Y
// so every output element has one writer and one order of summation, whatever the number of threads.
//
// Y is packed once, unless its numbers are narrower than the engine's (upcast) and more than a chunk: then they are packed for
// each panel, a chunk at a time, which takes 2 % of the time and a third off the memory (N = 8192, D = 512).
#pragma once

#include <math.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "common/buffer.h"
#include "dot/pack.h"
#include "dot/problem.h"

namespace ck {
namespace CK_ISA {

constexpr int64_t kChunkBlocks = 128;  // blocks of 32 columns in a chunk: a panel of G is 4 to 6 MiB

// Whether all of Y, in so many blocks of columns, is packed before the first panel.  T: the engine's operand type; S: the
// features' dtype.
template <typename T, typename S>
static inline bool packed_once(int64_t blocks) {
  return sizeof(T) <= sizeof(S) || blocks <= kChunkBlocks;
}

// The largest norm of a row; NaN or infinity where a row has one.
template <typename S>
static float largest_norm(const S* data, int64_t rows, int64_t cols, int threads) {
  double worst = 0;
  int bad = 0;
#pragma omp parallel for num_threads(threads) reduction(max : worst) reduction(| : bad)
  for (int64_t r = 0; r < rows; r++) {
    floats8 sums[4] = {};
    float tail = 0;
    int64_t c = 0;
    for (; c + 32 <= cols; c += 32)
      for (int i = 0; i < 4; i++) {
        const floats8 v = load8(data + r * cols + c + 8 * i);
        sums[i] += v * v;
      }
    for (; c < cols; c++) tail += to_float(data[r * cols + c]) * to_float(data[r * cols + c]);
    const floats8 all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int i = 0; i < 8; i++) tail += all[i];
    const double square = tail;
    if (!(square <= 3e38)) bad = 1;
    worst = square > worst ? square : worst;
  }
  return bad ? __builtin_nanf("") : static_cast<float>(::sqrt(worst));
}

static void fill_nan(float* out, int64_t count) {
  for (int64_t i = 0; out && i < count; i++) out[i] = __builtin_nanf("");
}

// No |l_ij| is larger; NaN or infinity where a feature is.
static inline float score_bound(const DotProblem& p) {
  float a, b;
  if (p.dtype == kBFloat16) {
    a = largest_norm(static_cast<const bf16*>(p.x), p.n, p.d, p.threads);
    b = largest_norm(static_cast<const bf16*>(p.y), p.m, p.d, p.threads);
  } else if (p.dtype == kFloat16) {
    a = largest_norm(static_cast<const fp16*>(p.x), p.n, p.d, p.threads);
    b = largest_norm(static_cast<const fp16*>(p.y), p.m, p.d, p.threads);
  } else {
    a = largest_norm(static_cast<const float*>(p.x), p.n, p.d, p.threads);
    b = largest_norm(static_cast<const float*>(p.y), p.m, p.d, p.threads);
  }
  return ::fabsf(p.scale) * a * b;
}

// ---------------------------------------------------------------- one tile: s (rows, 32), contiguous
struct TileShape {
  int64_t rows;       // valid rows of the tile; the rest are padding
  int64_t first_row;  // in the problem
  int64_t first_col;
  int64_t padded_rows;
};

// ---------------------------------------------------------------- what takes no part, on a tile of scores
// The groups of the tile's 32 columns; -1, which is no row's, in the padding.
static inline void column_ids(const DotProblem& p, const TileShape& t, int32_t* ids) {
  for (int64_t c = 0; c < kBlock; c++) ids[c] = t.first_col + c < p.m ? p.col_ids[t.first_col + c] : -1;
}

static void mask_groups(const DotProblem& p, const TileShape& t, float* s) {
  int32_t ids[kBlock];
  column_ids(p, t, ids);
  for (int64_t r = 0; r < t.rows; r++) {
    const int32_t id = p.row_ids[t.first_row + r];
    for (int c = 0; c < kBlock; c += VL) {
      float* at = s + r * kBlock + c;
      store(at, select(load(ids + c) == id, broadcast(neg_inf()), load(at)));
    }
  }
}

// Sets to -infinity: padding, the positives where `positives`, and the pairs of one group where `groups`.
// `found` receives the positives' logits unless it is null.
static void mask(const DotProblem& p, bool positives, bool groups, const TileShape& t, float* s, float* found) {
  for (int64_t r = t.rows; r < t.padded_rows; r++)
    for (int c = 0; c < kBlock; c++) s[r * kBlock + c] = neg_inf();
  for (int64_t c = p.m - t.first_col; c < kBlock; c++)
    for (int64_t r = 0; r < t.rows; r++) s[r * kBlock + c] = neg_inf();
  const int64_t first = t.first_col - p.first_positive - t.first_row;  // the row whose positive is in column 0
  for (int64_t c = 0; c < kBlock; c++) {
    const int64_t r = first + c;
    if (r < 0 || r >= t.rows) continue;
    if (found) found[t.first_row + r] = s[r * kBlock + c] * p.scale;
    if (positives) s[r * kBlock + c] = neg_inf();
  }
  if (groups && p.row_ids) mask_groups(p, t, s);
}

// Sets to -infinity the scores that are above their row's limit; NaN stays.
static void mask_above(const float* limits, float scale, const TileShape& t, float* s) {
  for (int64_t r = 0; r < t.rows; r++) {
    const vf limit = broadcast(limits[t.first_row + r]);
    for (int c = 0; c < kBlock; c += VL) {
      float* at = s + r * kBlock + c;
      const vf l = load(at);
      store(at, select(l * scale > limit, broadcast(neg_inf()), l));
    }
  }
}

// ---------------------------------------------------------------- gradients
// G as the A operand of dX = G Y (blocked) and the B operand of dY^T = X^T G: the tile itself for float.
static inline void emit(const float* g, int64_t rows, float* as_a, float* as_b) {
  if (as_a != g) std::memcpy(as_a, g, rows * kBlock * sizeof(float));
  (void)as_b;
}

#if defined(CK_ISA_neonbf16)
static void emit(const float* g, int64_t rows, bf16* as_a, bf16* as_b) {
  const auto narrow = [](const float* q) {
    return vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(vld1q_f32(q)), vld1q_f32(q + 4)));
  };
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t c = 0; c < kBlock; c += 8) {
      const uint16x8_t even = narrow(g + r * kBlock + c), odd = narrow(g + (r + 1) * kBlock + c);
      std::memcpy(as_a + r * kBlock + c, &even, sizeof even);
      std::memcpy(as_a + (r + 1) * kBlock + c, &odd, sizeof odd);
      const uint16x8x2_t pairs = vzipq_u16(even, odd);
      std::memcpy(as_b + r * kBlock + 2 * c, &pairs, sizeof pairs);
    }
}
#elif defined(CK_ISA_amx) || defined(CK_ISA_avx512bf16)
static void emit(const float* g, int64_t rows, bf16* as_a, bf16* as_b) {
  alignas(64) int16_t left[kBlock], right[kBlock];  // columns 0, 1, ... 15 and 16 ... 31 of two rows, in pairs
  for (int16_t c = 0; c < kBlock; c++) left[c] = c / 2 + c % 2 * kBlock, right[c] = left[c] + kBlock / 2;
  const __m512i first = _mm512_load_si512(left), second = _mm512_load_si512(right);
  for (int64_t r = 0; r < rows; r += 2) {
    const float* q = g + r * kBlock;
    const __m512i even = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(q + 16), _mm512_loadu_ps(q));
    const __m512i odd = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(q + 48), _mm512_loadu_ps(q + 32));
    _mm512_storeu_si512(as_a + r * kBlock, even);
    _mm512_storeu_si512(as_a + (r + 1) * kBlock, odd);
    _mm512_storeu_si512(as_b + r * kBlock, _mm512_permutex2var_epi16(even, first, odd));
    _mm512_storeu_si512(as_b + (r + 1) * kBlock, _mm512_permutex2var_epi16(even, second, odd));
  }
}
#endif

static inline void transpose_in_place(float* block) {
#if defined(__AVX512F__)
  float kept[16 * 16];  // transpose16 reads all before it writes, so a quarter may take its own place
  transpose16(block, kBlock, block, kBlock);
  transpose16(block + 16 * kBlock + 16, kBlock, block + 16 * kBlock + 16, kBlock);
  transpose16(block + 16, kBlock, kept, 16);
  transpose16(block + 16 * kBlock, kBlock, block + 16, kBlock);
  for (int r = 0; r < 16; r++) std::memcpy(block + (16 + r) * kBlock, kept + r * 16, 16 * sizeof(float));
#else
  float copy[kBlock][kBlock + 1];
  for (int r = 0; r < kBlock; r++) std::memcpy(copy[r], block + r * kBlock, kBlock * sizeof(float));
  for (int c = 0; c < kBlock; c++)
    for (int r = 0; r < kBlock; r++) block[c * kBlock + r] = copy[r][c];
#endif
}

static inline doubles8 to_doubles(floats8 v) {
#if defined(__AVX512F__)
  return (doubles8)_mm512_maskz_cvtps_pd(0xff, (__m256)v);  // GCC 12 converts halves and puts them together
#else
  return __builtin_convertvector(v, doubles8);
#endif
}

// One row of a gradient: out = scale (sums + weight positive); `positive` may be null.  Returns <out / scale, along>, summed
// in eight lanes of float64, where ALONG.
template <bool ALONG, typename S>
static inline double finish_row(const DotProblem& p, const float* sums, int64_t block, float weight, const S* positive,
                                const S* along, S* out) {
  doubles8 lanes{};
  for (int64_t c0 = 0; c0 < p.d; c0 += kBlock, sums += block) {
    const int64_t cols = p.d - c0 < kBlock ? p.d - c0 : kBlock, whole = cols / 8 * 8;
    for (int64_t c = 0; c < whole; c += 8) {
      floats8 g = load8(sums + c);
      if (positive) g += weight * load8(positive + c0 + c);
      store8(p.scale * g, out + c0 + c);
      if constexpr (ALONG) lanes += to_doubles(g) * to_doubles(load8(along + c0 + c));
    }
    for (int64_t c = whole; c < cols; c++) {
      const float g = sums[c] + (positive ? weight * to_float(positive[c0 + c]) : 0);
      from_float(p.scale * g, out + c0 + c);
      if constexpr (ALONG) lanes[c % 8] += static_cast<double>(g) * to_float(along[c0 + c]);
    }
  }
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

// All pairs once; dx, dy and dscale where they are wanted.  T: the engine's operand type; S: the features' dtype.
//     epilogue.needs_scores                  false where the epilogue has what it needs, and S is not computed
//     epilogue.tile(shape, s, row_sums)      scores -> G in place, padding included; row_sums (rows,) where kRowSums
//     epilogue.add_row(i, sum)               kRowSums: another chunk's part of row i's sum
//     epilogue.soon(first_col, first_row)    what its tile there reads from memory, in blocks; null where nothing
template <typename T, typename S, typename Epilogue>
static void gradient_sweep(const DotGradient& p, const Epilogue& epilogue) {
  const int64_t dp = pad32(p.d), mp = pad32(p.m), panel = Engine<T>::kPanelRows, blocks = mp / kBlock;
  const int64_t rows_cap = pad32(p.n) < panel ? pad32(p.n) : panel, dblocks = dp / kBlock;
  constexpr int64_t W = Engine<T>::kWidth;
  const int64_t chunk = blocks < kChunkBlocks ? blocks : kChunkBlocks;
  constexpr bool two_forms = sizeof(T) != sizeof(float);  // bf16: G is kept blocked and paired
  const bool scores = epilogue.needs_scores, once = packed_once<T, S>(blocks);
  const int64_t yb_rows = once ? mp : chunk * kBlock;  // all of Y, or the chunk at hand
  // Y^T lives in dy, which is written last, where it has its size: less new memory, which the system would clear
  const bool in_dy = scores && p.dy && sizeof(T) == sizeof(S) && p.m == mp && p.d == dp;
  Buffer<T> whole_yt(scores && once && !in_dy ? mp * dp : 0), yb(p.dx ? yb_rows * dp : 0),
      xa(scores ? rows_cap * dp : 0), xt(p.dy ? rows_cap * dp : 0), ga(p.dx ? chunk * rows_cap * kBlock : 0);
  Buffer<float> dyt(p.dy ? mp * dp : 0), dxp(p.dx ? rows_cap * dp : 0);
  Buffer<float> part_sum(Epilogue::kRowSums ? chunk * rows_cap : 0);
  const int64_t lines = p.dx ? p.n : p.dy ? p.m : 0;
  Buffer<double> dscale_lines(lines);
  T* const yt = in_dy ? static_cast<T*>(p.dy) : whole_yt.data;
  const S *xs = static_cast<const S*>(p.x), *ys = static_cast<const S*>(p.y);
  const Rows<S> y{ys, p.m, p.d, 0, mp};

#pragma omp parallel num_threads(p.threads)
  {
    Buffer<float> tile(two_forms ? W * rows_cap * kBlock : 0);
    Buffer<T> paired(two_forms ? W * rows_cap * kBlock : 0), own(p.dx ? 0 : W * rows_cap * kBlock),
        own_yt(scores && !once ? W * dp * kBlock : 0);
    Engine<T>::enter();
#pragma omp for schedule(static) nowait
    for (int64_t b = 0; b < (once ? blocks : 0); b++) {
      if (scores) pack_b_transposed(y, b, b + 1, yt, dp);
      if (p.dx) pack_b(y, b * kBlock, (b + 1) * kBlock, dblocks, yb.data, mp);
    }
    for (int64_t i0 = 0; i0 < p.n; i0 += panel) {
      const int64_t valid = p.n - i0 < panel ? p.n - i0 : panel, rows = pad32(valid);
      const Rows<S> x{xs, p.n, p.d, i0, rows};
#pragma omp for schedule(static)
      for (int64_t b = 0; b < rows / kBlock; b++) {
        if (scores) pack_blocked<T>(x, b * kBlock, (b + 1) * kBlock, dblocks, xa.data, rows);
        if (p.dy) pack_transposed<T>(x, b, b + 1, xt.data, dp);
      }
      for (int64_t b0 = 0; b0 < blocks; b0 += chunk) {
        const int64_t b1 = b0 + chunk < blocks ? b0 + chunk : blocks;
#pragma omp for schedule(dynamic, 1)
        for (int64_t b = b0; b < b1; b += W) {
          const int64_t width = b1 - b < W ? b1 - b : W;
          T *as_a = p.dx ? ga.data + (b - b0) * rows * kBlock : own.data, *as_b = two_forms ? paired.data : as_a;
          float* s = two_forms ? tile.data : reinterpret_cast<float*>(as_a);
          const T* bt = once ? yt + b * dp * kBlock : own_yt.data;
          if (!once && scores) pack_b_transposed(y.from(b * kBlock), 0, width, own_yt.data, dp);
          if (!once && p.dx)
            pack_b(y.from(b0 * kBlock), (b - b0) * kBlock, (b - b0 + width) * kBlock, dblocks, yb.data, yb_rows);
          if (scores)
            Engine<T>::multiply({xa.data, rows * kBlock}, rows, {bt, dp * kBlock}, width, dp, {s, rows * kBlock},
                                false);
          for (int64_t c = 0; c < width; c++) {
            const TileShape t{valid, i0, (b + c) * kBlock, rows};
            const int64_t at = c * rows * kBlock;
            epilogue.tile(t, s + at, Epilogue::kRowSums ? part_sum.data + (b + c - b0) * rows : nullptr);
            if (p.dx || p.dy) emit(s + at, rows, as_a + at, as_b + at);
          }
          if (p.dy)
            Engine<T>::multiply({xt.data, dp * kBlock}, dp, {as_b, rows * kBlock}, width, rows,
                                {dyt.data + b * dp * kBlock, dp * kBlock}, i0 > 0,
                                epilogue.soon((b + W * p.threads) * kBlock, i0));
        }
        if constexpr (Epilogue::kRowSums) {
#pragma omp for schedule(static)
          for (int64_t r = 0; r < valid; r++) {
            double sum = 0;
            for (int64_t b = 0; b < b1 - b0; b++) sum += part_sum.data[b * rows + r];
            epilogue.add_row(i0 + r, sum);
          }
        }
        if (!p.dx) continue;
        constexpr int64_t kTileRows = 192;
        const int64_t row_tiles = (rows + kTileRows - 1) / kTileRows, tasks = (dblocks + W - 1) / W;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < row_tiles * tasks; task++) {
          const int64_t r = task / tasks * kTileRows, db = task % tasks * W;
          const int64_t height = rows - r < kTileRows ? rows - r : kTileRows;
          Engine<T>::multiply({ga.data + r * kBlock, rows * kBlock}, height,
                              {yb.data + (db * yb_rows + (once ? b0 : 0) * kBlock) * kBlock, yb_rows * kBlock},
                              dblocks - db < W ? dblocks - db : W, (b1 - b0) * kBlock,
                              {dxp.data + (db * rows + r) * kBlock, rows * kBlock}, b0 > 0);
        }
      }
      if (!p.dx) continue;
#pragma omp for schedule(static) nowait  // the next panel's packing writes elsewhere
      for (int64_t r = 0; r < valid; r++) {
        const int64_t i = i0 + r;
        const bool positive = p.positive_grad;
        dscale_lines.data[i] = finish_row<true>(
            p, dxp.data + r * kBlock, rows * kBlock, positive ? p.positive_grad[i] : 0,
            positive ? ys + (p.first_positive + i) * p.d : nullptr, xs + i * p.d, static_cast<S*>(p.dx) + i * p.d);
      }
    }
    Engine<T>::leave();
    if (p.dy) {
#pragma omp single
      if (!in_dy) {  // dy is about to be touched for the first time: the peak stays where it is
        whole_yt.release();
        yb.release();
      }
#pragma omp for schedule(static)
      for (int64_t b = 0; b < blocks; b++) {
        float* block = dyt.data + b * dp * kBlock;
        for (int64_t c = 0; c < dblocks; c++) transpose_in_place(block + c * kBlock * kBlock);
        for (int64_t j = b * kBlock; j < p.m && j < (b + 1) * kBlock; j++) {
          const int64_t i = j - p.first_positive;
          const bool positive = p.positive_grad && i >= 0 && i < p.n;
          const auto finish =
              p.dx ? finish_row<false, S> : finish_row<true, S>;  // dscale comes from dx if that is made
          const double along =
              finish(p, block + j % kBlock * kBlock, kBlock * kBlock, positive ? p.positive_grad[i] : 0,
                     positive ? xs + i * p.d : nullptr, ys + j * p.d, static_cast<S*>(p.dy) + j * p.d);
          if (!p.dx) dscale_lines.data[j] = along;
        }
      }
    }
  }
  double total = 0;
  for (int64_t i = 0; i < lines; i++) total += dscale_lines.data[i];
  if (lines) *p.dscale = static_cast<float>(total);
}

#if defined(CK_ISA_amx) || defined(CK_ISA_avx512bf16) || defined(CK_ISA_neonbf16)
using Bf16Operand = bf16;
#else
using Bf16Operand = float;  // no bf16 products here: upcast
#endif

template <typename Epilogue>
static void gradient_pass(const DotGradient& p, const Epilogue& epilogue) {
  if (p.dtype == kBFloat16)
    gradient_sweep<Bf16Operand, bf16>(p, epilogue);
  else if (p.dtype == kFloat16)
    gradient_sweep<float, fp16>(p, epilogue);
  else
    gradient_sweep<float, float>(p, epilogue);
}

}  // namespace CK_ISA
}  // namespace ck
