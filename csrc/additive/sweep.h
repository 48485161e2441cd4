// What every sweep over the pairs of an additive critic needs: its operands packed for the tiles, in blocks of columns that
// stay in cache, the tile of an activation, and the way from sums of phi' to gradients.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "additive/tiles.h"
#include "common/dtype.h"
#include "additive/separable_exp.h"
#include "additive/with_activation.h"

namespace ck {
namespace CK_ISA {
namespace {

#if defined(__AVX512F__)
template <>
constexpr const Pieces* PIECES<Direct<Gelu>> = &gelu_pieces;
template <>
constexpr const Pieces* PIECES<Direct<GeluTanh>> = &gelu_tanh_pieces;
#endif

constexpr int64_t BLOCK_FLOATS = 32 << 10;  // b's block, its transpose and a group's sum for db (128 KiB each) share L2

void fill(float* x, int64_t size, float value) {
  for (int64_t i = 0; i < size; i++) x[i] = value;
}

template <typename T>
void widen(const T* x, int64_t count, float* y) {
  for (int64_t k = 0; k < count; k++) y[k] = to_float(x[k]);
}

template <typename T>
void narrow(const float* x, int64_t count, T* y) {
  for (int64_t k = 0; k < count; k++) from_float(x[k], y + k);
}

// Projections a or b, (rows, h) row-major in float32, bfloat16 or float16, read as float32 a piece of a row at a time.
struct Features {
  const void* data;
  int32_t dtype;

  // `count` numbers from `first` on: where they are, or in `buffer`.
  const float* read(int64_t first, int64_t count, float* buffer) const {
    if (dtype == kFloat32) return static_cast<const float*>(data) + first;
    if (dtype == kBFloat16)
      widen(static_cast<const bf16*>(data) + first, count, buffer);
    else
      widen(static_cast<const fp16*>(data) + first, count, buffer);
    return buffer;
  }
};

// Writes numbers [first, first + count) of an array of `dtype`.
void write(const float* x, int64_t first, int64_t count, int32_t dtype, void* data) {
  if (dtype == kFloat32)
    memcpy(static_cast<float*>(data) + first, x, count * sizeof(float));
  else if (dtype == kBFloat16)
    narrow(x, count, static_cast<bf16*>(data) + first);
  else
    narrow(x, count, static_cast<fp16*>(data) + first);
}

void write_nan(int64_t count, int32_t dtype, void* data) {
  const float nan = NAN;
  for (int64_t i = 0; i < count; i++) write(&nan, i, 1, dtype, data);
}

bool all_finite(Features x, int64_t size, int threads) {
  constexpr int64_t BLOCK = 4096;
  int64_t bad = 0;
#pragma omp parallel for reduction(+ : bad) num_threads(threads)
  for (int64_t first = 0; first < size; first += BLOCK) {
    float buffer[BLOCK], zero = 0.0f;
    const int64_t count = smaller(BLOCK, size - first);
    const float* y = x.read(first, count, buffer);
#pragma omp simd reduction(+ : zero)
    for (int64_t i = 0; i < count; i++) zero += y[i] * 0.0f;  // NaN where y[i] is not finite
    bad += zero != 0.0f;
  }
  return bad == 0;
}

bool all_finite(const float* x, int64_t size, int threads) { return all_finite(Features{x, kFloat32}, size, threads); }

// Where a unit's numbers lie, over the rows of a or b.
struct Range {
  float low[CHUNK], high[CHUNK];

  // Of units [k0, k0 + CHUNK) of x (rows, h).
  Range(Features x, int64_t rows, int64_t h, int64_t k0) {
    const int64_t count = smaller(CHUNK, h - k0);
    float buffer[CHUNK];
    const float* y = x.read(k0, count, buffer);
    for (int64_t k = 0; k < count; k++) low[k] = high[k] = y[k];
    for (int64_t i = 1; i < rows; i++) {
      y = x.read(i * h + k0, count, buffer);
      for (int64_t k = 0; k < count; k++) {
        low[k] = y[k] < low[k] ? y[k] : low[k];
        high[k] = y[k] > high[k] ? y[k] : high[k];
      }
    }
  }

  float nearest_to_zero(int64_t k) const { return low[k] > 0.0f ? low[k] : high[k] < 0.0f ? high[k] : 0.0f; }
};

// An offset of a unit that no outlier can move: the number nearest 0 between the least and the greatest a, and likewise b;
// of the two, minus the greater a or -b.  a + centre and b - centre take the place of a and b where size costs digits.
float centre_of(const Range& a, const Range& b, int64_t k) {
  const float left = a.nearest_to_zero(k), right = b.nearest_to_zero(k);
  return left > -right ? -left : right;
}

// Whether |a + centre| and |b - centre| stay below `span` for every unit.
bool factors_fit(Features a, Features b, int64_t n, int64_t m, int64_t h, int threads, float span) {
  int64_t outside = 0;
#pragma omp parallel for reduction(+ : outside) num_threads(threads)
  for (int64_t k0 = 0; k0 < h; k0 += CHUNK) {
    const Range left(a, n, h, k0), right(b, m, h, k0);
    for (int64_t k = 0; k < smaller(CHUNK, h - k0); k++) {
      const float centre = centre_of(left, right, k);
      outside += !(left.low[k] + centre > -span && left.high[k] + centre < span);
      outside += !(right.low[k] - centre > -span && right.high[k] - centre < span);
    }
  }
  return outside == 0;
}

template <class Phi>
Smooth<Phi> smooth(const Phi& phi) {
  return {phi};
}

template <class F>
Direct<F> direct(const F& f) {
  return {f};
}

// f(tile, below) with the tile of problem p's activation; `below` is the slope of the ReLU family below 0.
template <class Problem, class F>
void with_tile(const Problem& p, const F& f) {
  const auto with_factors = [&](const auto& phi) {
    const bool fit = factors_fit({p.a, p.features_dtype}, {p.b, p.features_dtype}, p.n, p.m, p.h, p.threads, phi.SPAN);
    if (fit) f(smooth(phi), 0.0f);
    return fit;
  };
  bool done = false;
  switch (static_cast<Activation>(p.activation)) {
    case Activation::relu:
      return f(Kinked{}, 0.0f);
    case Activation::leaky_relu:
      return f(Kinked{}, p.slope);
    case Activation::silu:
      done = with_factors(FactoredSilu{});
      break;
    case Activation::elu:
      if constexpr (FUSED) {
        if (p.slope == 1.0f)
          done = with_factors(FactoredElu<true>{1.0f});
        else
          done = FactoredElu<false>::takes(p.slope) && with_factors(FactoredElu<false>{p.slope});
      }
      break;
    case Activation::softplus:
      done = with_factors(FactoredSoftplus{});
      break;
    case Activation::tanh:
      if constexpr (FUSED) done = with_factors(FactoredTanh{});
      break;
    default:
      break;
  }
  if (!done) with_smooth(p.activation, p.slope, [&f](const auto& phi) { f(smooth(direct(phi)), 0.0f); });
}

// A number of groups of rows, by shape alone: a power of two, so that it divides evenly among the usual numbers of threads.
int64_t count_groups(int64_t n, int64_t rows, int64_t most, int64_t tiles_per_group) {
  int64_t count = 1;
  while (count < most && count * 2 * tiles_per_group * rows <= n + rows - 1) count *= 2;
  return count;
}

// The sums for one column of a panel: row `j` of `rows` in runs.
template <int RUN>
void copy_row(const float* panel, int64_t j, int64_t rows, int64_t h, float* x) {
  int64_t k = 0;
  for (; k + RUN <= h; k += RUN) memcpy(x + k, panel + k * rows + j * RUN, RUN * sizeof(float));
  if (k < h) memcpy(x + k, panel + k * rows + j * RUN, (h - k) * sizeof(float));
}

// x[] = sum over the groups, in order, of factor[g] x[g size + .], for the numbers from `first` to `last`.
void merge_groups(float* x, int64_t groups, int64_t size, const float* factor, int64_t first, int64_t last) {
  for (int64_t k = first; k < last; k++) x[k] *= factor[0];
  for (int64_t g = 1; g < groups; g++) {
    const float* part = x + g * size;
    for (int64_t k = first; k < last; k++) x[k] += factor[g] * part[k];
  }
}

// a (n, h), b (m, h) row-major in a dtype of their own, w (h,), finite.
template <class Tile>
class Operands {
 protected:
  static constexpr int ROWS = Tile::ROWS, COLS = Tile::COLS, A = Tile::A, B = Tile::B, RUN = Tile::RUN;
  static constexpr bool KINKED = Tile::KINKED;
  static constexpr int64_t SCORES = (ROWS * COLS + VL - 1) / VL * VL, MASSES = KINKED ? ROWS * VL : VL;
  static constexpr int64_t SLICE = 2048;  // numbers of a group's sum that are merged at a time

  template <class Problem>
  Operands(const Problem& p, const Tile& tile, float below)
      : a{p.a, p.features_dtype},
        b{p.b, p.features_dtype},
        n(p.n),
        m(p.m),
        h(p.h),
        threads(p.threads),
        below(below),
        width(round_up(h, CHUNK)),
        block(larger(COLS, smaller(BLOCK_FLOATS / width / COLS * COLS, round_up(m, COLS)))),
        blocks((m + block - 1) / block),
        tile(tile),
        weights(p.w),
        w(width),
        centre(width),
        row_shift(below != 0.0f ? n : 0),
        scratch_size((A + 1) * ROWS * width + 2 * width + SCORES + MASSES + Tile::KEPT * ROWS * COLS * width),
        panels(block * width * B),
        negative(KINKED ? block * width : 0),
        column_shift(KINKED ? block : block / COLS * SCORES),
        scratch(threads * scratch_size) {
    for (int64_t k = 0; k < h; k++) w.data[k] = (1.0f - below) * weights[k];
    if constexpr (Tile::CENTRED) {
#pragma omp parallel for num_threads(threads)
      for (int64_t k0 = 0; k0 < h; k0 += CHUNK) {
        const Range left(a, n, h, k0), right(b, m, h, k0);
        for (int64_t k = 0; k < smaller(CHUNK, h - k0); k++) centre.data[k0 + k] = centre_of(left, right, k);
      }
    }
    if (below != 0.0f) {
#pragma omp parallel num_threads(threads)
      {
        float* buffer = thread_scratch().row;
#pragma omp for
        for (int64_t i = 0; i < n; i++) {
          const float* x = a.read(i * h, h, buffer);
          double sum = 0.0;
          for (int64_t k = 0; k < h; k++) sum += static_cast<double>(weights[k]) * x[k];
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
    t.row = next, next += width;
    t.a = next, next += A * ROWS * width;
    t.da = next, next += ROWS * width;
    t.dw = next, next += width;
    t.s = next, next += SCORES;
    t.mass = next, next += MASSES;
    t.kept = next;
    return t;
  }

  // COLS columns of b from `column` on, as the panel at place `at` of the block.
  void pack_panel(int64_t column, int64_t at, const Scratch& t) {
    const int64_t count = smaller(COLS, m - column);
    float* panel = panels.data + at * width * B;
    if (count < COLS) memset(panel, 0, COLS * width * B * sizeof(float));
    float* shift = column_shift.data + place_of_shift(at);
    for (int64_t x = 0; x < (KINKED ? COLS : SCORES); x++)
      shift[x] = x % COLS < count && x < ROWS * COLS ? 0.0f : NOTHING;
    for (int64_t j = 0; j < count; j++) {
      const float* bj = padded_row(b, column + j, t.row);
      pack<B>(bj, -1.0f, COLS, panel + j * RUN, [this](vf x, vf c, vf* out) { tile.pack_b(x, c, out); });
      if constexpr (KINKED) {
        float* transposed = negative.data + at * width;
        for (int64_t k = 0; k < h; k++) transposed[k * COLS + j] = centre.data[k] - bj[k];
        double sum = 0.0;
#pragma omp simd reduction(+ : sum)
        for (int64_t k = 0; k < h; k++)
          sum += weights[k] * (bj[k] - static_cast<double>(1.0f - below) * centre.data[k]);
        shift[j] = static_cast<float>(sum);
      }
    }
  }

  // The panel at place `at` of the block, with a group's sums for it where there are any.
  Panel panel(int64_t at, float* db, float* mass) const {
    return {panels.data + at * width * B, negative.data + (KINKED ? at * width : 0),
            column_shift.data + place_of_shift(at), db, mass};
  }

  // `count` rows of a from `row` on.
  void pack_tile(int64_t row, int64_t count, const Scratch& t) const {
    for (int64_t i = 0; i < count; i++)
      pack<A>(padded_row(a, row + i, t.row), 1.0f, ROWS, t.a + i * RUN,
              [this](vf x, vf c, vf* out) { tile.pack_a(x, c, out); });
  }

  // t.s = S of the packed rows and a panel; NOTHING in the padding of columns.
  template <bool GRADIENTS>
  void scores(int64_t row, int64_t count, const Scratch& t, const Panel& panel) const {
    for (int i = 0; KINKED && i < ROWS; i++) {
      const float shift = below != 0.0f ? row_shift.data[row + (i < count ? i : 0)] : 0.0f;
      for (int j = 0; j < COLS; j++) t.s[i * COLS + j] = shift + panel.shift[j];
    }
    tile.template scores<GRADIENTS>(count, t, panel, w.data, h);
  }

  // Turns u, the sum of e phi'_+ over a row or a column (phi'_+ is [t > 0] in the ReLU family), into the gradient w U, with
  // U = unit sum of e phi', and adds (x - origin) U to dw.  mass: the sum of e.
  void finish_vector(const Features& features, int64_t row, float* u, int64_t k0, double unit, float mass, double sign,
                     double* dw) const {
    const float slope = static_cast<float>((1.0 - below) * unit), base = static_cast<float>(below * unit * mass);
    const int64_t count = smaller(CHUNK, h - k0);
    float buffer[CHUNK];
    const float* x = KINKED ? features.read(row * h + k0, count, buffer) : nullptr;
    u += row * h + k0;
    for (int64_t k = 0; k < count; k++) {
      const float sum = slope * u[k] + base;
      if (KINKED) dw[k] += (x[k] + sign * centre.data[k0 + k]) * sum;
      u[k] = weights[k0 + k] * sum;
    }
  }

  const Features a, b;
  const int64_t n, m, h;
  const int threads;
  const float below;            // slope of the leaky ReLU below 0; 0 for everything else
  const int64_t width;          // h, padded
  const int64_t block, blocks;  // columns of a block, and their number
  const Tile& tile;

 private:
  static int64_t place_of_shift(int64_t at) { return KINKED ? at : at / COLS * SCORES; }

  // Row i of x, and zeros up to the padded width: where it is, or in `buffer`.
  const float* padded_row(const Features& x, int64_t i, float* buffer) const {
    const float* row = x.read(i * h, h, buffer);
    if (h == width) return row;
    if (row != buffer) memcpy(buffer, row, h * sizeof(float));
    memset(buffer + h, 0, (width - h) * sizeof(float));
    return buffer;
  }

  // What f makes of a row and its units' centres, as COUNT rows in runs, `rows` apart.
  template <int COUNT, class F>
  void pack(const float* x, float sign, int64_t rows, float* packed, const F& f) const {
    for (int64_t k = 0; k < width; k += VL) {
      vf out[COUNT];
      f(load(x + k), sign * load(centre.data + k), out);
      for (int q = 0; q < COUNT; q++) store(packed + place<RUN>(COUNT * rows, k) + q * rows * RUN, out[q]);
    }
  }

  const float* const weights;
  ZeroBuffer<float> w;          // (width,) times 1 - below
  ZeroBuffer<float> centre;     // (width,)
  ZeroBuffer<float> row_shift;  // (n,) the part of S that depends on i alone; leaky ReLU only
  const int64_t scratch_size;
  ZeroBuffer<float> panels, negative, column_shift;  // the block at hand
  ZeroBuffer<float> scratch;
};

}  // namespace
}  // namespace CK_ISA
}  // namespace ck
