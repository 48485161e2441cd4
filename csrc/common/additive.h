// What every sweep over the pairs of an additive critic needs: its operands packed for the tiles, in blocks of columns that
// stay in cache, the tile of an activation, and the way from sums of phi' to gradients.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "common/additive_tiles.h"
#include "common/with_activation.h"

namespace ck {
namespace CK_ISA {
namespace {

constexpr int64_t BLOCK_FLOATS = 32 << 10;  // b's block, its transpose and a group's sum for gb (128 KiB each) share L2

template <class Phi>
Smooth<Phi> smooth(const Phi& phi) {
  return {phi};
}

// f(tile, below) with the tile of an activation; `below` is the slope of the ReLU family below 0.
template <class F>
void with_tile(int32_t activation, float slope, const F& f) {
  switch (static_cast<Activation>(activation)) {
    case Activation::relu: return f(Kinked{}, 0.0f);
    case Activation::leaky_relu: return f(Kinked{}, slope);
    default: return with_smooth(activation, slope, [&f](const auto& phi) { f(smooth(phi), 0.0f); });
  }
}

void fill(float* x, int64_t size, float value) {
  for (int64_t i = 0; i < size; i++) x[i] = value;
}

// A number of groups of rows, by shape alone: a power of two, so that it divides evenly among the usual numbers of threads.
int64_t count_groups(int64_t n, int64_t rows, int64_t most, int64_t tiles_per_group) {
  int64_t count = 1;
  while (count < most && count * 2 * tiles_per_group * rows <= n + rows - 1) count *= 2;
  return count;
}

// a (n, h), b (m, h), w (h,) row-major, finite.
template <class Tile>
class Operands {
 protected:
  static constexpr int ROWS = Tile::ROWS, COLS = Tile::COLS;
  static constexpr bool KINKED = Tile::KINKED;
  static constexpr int64_t SCORES = ROWS * COLS;

  Operands(const float* a, const float* b, const float* w, int64_t n, int64_t m, int64_t h, int threads, float below)
      : a(a),
        b(b),
        n(n),
        m(m),
        h(h),
        threads(threads),
        below(below),
        width(round_up(h, CHUNK)),
        block(larger(COLS, smaller(BLOCK_FLOATS / width / COLS * COLS, round_up(m, COLS)))),
        blocks((m + block - 1) / block),
        weights(w),
        w(width),
        centre(width),
        row_shift(n),
        scratch_size(3 * ROWS * width + width + SCORES + (KINKED ? 0 : 2 * SCORES * width)),
        panels(block * width),
        negative(KINKED ? block * width : 0),
        column_shift(block),
        scratch(threads * scratch_size) {
    for (int64_t k = 0; k < h; k++) this->w.data[k] = (1.0f - below) * w[k];
    if constexpr (KINKED) {
#pragma omp parallel for num_threads(threads)
      for (int64_t k0 = 0; k0 < h; k0 += CHUNK) {
        float left[CHUNK], right[CHUNK];
        nearest_to_zero(a, n, k0, left);
        nearest_to_zero(b, m, k0, right);
        for (int64_t k = 0; k < smaller(CHUNK, h - k0); k++)
          centre.data[k0 + k] = left[k] > -right[k] ? -left[k] : right[k];
      }
      if (below != 0.0f) {
#pragma omp parallel for num_threads(threads)
        for (int64_t i = 0; i < n; i++) {
          double sum = 0.0;
          for (int64_t k = 0; k < h; k++) sum += static_cast<double>(w[k]) * a[i * h + k];
          row_shift.data[i] = static_cast<float>(below * sum);
        }
      }
    }
  }

  // Of the calling thread.
  Scratch thread_scratch() const {
#ifdef _OPENMP
    float* next = scratch.data + omp_get_thread_num() * scratch_size;
#else
    float* next = scratch.data;
#endif
    Scratch t;
    t.a = next, next += ROWS * width;
    t.centred = next, next += ROWS * width;
    t.ga = next, next += ROWS * width;
    t.gw = next, next += width;
    t.s = next, next += SCORES;
    t.values = next, next += KINKED ? 0 : SCORES * width;
    t.slopes = next;
    return t;
  }

  // COLS columns of b from `column` on, as the panel at place `at` of the block.
  void pack_panel(int64_t column, int64_t at) {
    const int64_t count = smaller(COLS, m - column);
    const float* first = b + column * h;
    float* panel = panels.data + at * width;
    if (count < COLS) memset(panel, 0, COLS * width * sizeof(float));
    pack_rows(first, count, h, COLS, panel, [](float x, int64_t) { return x; });
    for (int64_t j = 0; j < COLS; j++) column_shift.data[at + j] = j < count ? 0.0f : NOTHING;
    if constexpr (KINKED) {
      float* transposed = negative.data + at * width;
      for (int64_t j = 0; j < count; j++) {
        const float* bj = first + j * h;
        for (int64_t k = 0; k < h; k++) transposed[k * COLS + j] = centre.data[k] - bj[k];
        double sum = 0.0;
#pragma omp simd reduction(+ : sum)
        for (int64_t k = 0; k < h; k++) sum += weights[k] * (bj[k] - static_cast<double>(1.0f - below) * centre.data[k]);
        column_shift.data[at + j] = static_cast<float>(sum);
      }
    }
  }

  // The panel at place `at` of the block, with a group's sums for it where there are any.
  Panel panel(int64_t at, float* gb, float* mass) const {
    return {panels.data + at * width, negative.data + (KINKED ? at * width : 0), column_shift.data + at, gb, mass};
  }

  // `count` rows of a from `row` on.
  void pack_tile(int64_t row, int64_t count, const Scratch& t) const {
    const float* first = a + row * h;
    pack_rows(first, count, h, ROWS, t.a, [](float x, int64_t) { return KINKED ? -x : x; });
    if (KINKED) pack_rows(first, count, h, ROWS, t.centred, [this](float x, int64_t k) { return x + centre.data[k]; });
  }

  // t.s = S of the packed rows and a panel; NOTHING in the padding of columns.
  template <bool GRADIENTS>
  void scores(const Tile& tile, int64_t row, int64_t count, const Scratch& t, const Panel& panel) const {
    for (int i = 0; i < ROWS; i++)
      for (int j = 0; j < COLS; j++) t.s[i * COLS + j] = row_shift.data[row + (i < count ? i : 0)] + panel.shift[j];
    tile.template scores<GRADIENTS>(t, panel, w.data, h);
  }

  // Turns u, the sum of e phi'_+ over a row or a column (phi'_+ is [t > 0] in the ReLU family), into the gradient w U, with
  // U = unit sum of e phi', and adds (x - origin) U to gw.  mass: the sum of e.
  void finish_vector(const float* x, float* u, int64_t k0, double unit, float mass, double sign, double* gw) const {
    const float slope = static_cast<float>((1.0 - below) * unit), base = static_cast<float>(below * unit * mass);
    for (int64_t k = k0; k < smaller(k0 + CHUNK, h); k++) {
      const float sum = slope * u[k] + base;
      gw[k - k0] += (x[k] + sign * centre.data[k]) * sum;
      u[k] = weights[k] * sum;
    }
  }

  const float *const a, *const b;
  const int64_t n, m, h;
  const int threads;
  const float below;            // slope of the leaky ReLU below 0; 0 for everything else
  const int64_t width;          // h, padded
  const int64_t block, blocks;  // columns of a block, and their number

 private:
  // For each of CHUNK columns of x (rows, h), the number nearest 0 between the least and the greatest: an offset common to
  // the column, which no outlier can move.
  void nearest_to_zero(const float* x, int64_t rows, int64_t k0, float* nearest) const {
    float low[CHUNK], high[CHUNK];
    const int64_t count = smaller(CHUNK, h - k0);
    for (int64_t k = 0; k < count; k++) low[k] = high[k] = x[k0 + k];
    for (int64_t i = 1; i < rows; i++)
      for (int64_t k = 0; k < count; k++) {
        const float y = x[i * h + k0 + k];
        low[k] = y < low[k] ? y : low[k];
        high[k] = y > high[k] ? y : high[k];
      }
    for (int64_t k = 0; k < count; k++) nearest[k] = low[k] > 0.0f ? low[k] : high[k] < 0.0f ? high[k] : 0.0f;
  }

  const float* const weights;
  ZeroBuffer<float> w;          // (width,) times 1 - below
  ZeroBuffer<float> centre;     // (width,)
  ZeroBuffer<float> row_shift;  // (n,) the part of S that depends on i alone
  const int64_t scratch_size;
  ZeroBuffer<float> panels, negative, column_shift;  // the block at hand
  ZeroBuffer<float> scratch;
};

}  // namespace
}  // namespace CK_ISA
}  // namespace ck
