// additive_scores on the CPU, on the tiles of additive/tiles.h.
//
// Forward: one writer per tile of scores.  Backward: g takes the place of e_ij.  Rows are cut into groups by shape alone; a
// group has its rows of da and, per block of columns, its own sum for db; groups are merged in order.
#include "additive/scores/additive_scores.h"

#include "additive/sweep.h"

namespace ck {
namespace CK_ISA {
namespace {

constexpr int64_t MAX_GROUPS = 64;

template <class Tile>
class Forward : Operands<Tile> {
  using Base = Operands<Tile>;
  using Base::ROWS, Base::COLS, Base::block, Base::blocks;

 public:
  Forward(const AdditiveScores& p, const Tile& tile, float below) : Base(p, tile, below), p(p) {}

  void run() {
#pragma omp parallel num_threads(p.threads)
    {
      const Scratch t = this->thread_scratch();
      for (int64_t index = 0; index < blocks; index++) {
        const int64_t first = index * block, last = smaller(first + block, p.m);
#pragma omp for
        for (int64_t column = first; column < last; column += COLS) this->pack_panel(column, column - first, t);
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < p.n; row += ROWS) sweep_rows(row, first, last, t);
      }
    }
  }

 private:
  void sweep_rows(int64_t row, int64_t first, int64_t last, const Scratch& t) const {
    const int64_t count = smaller(ROWS, p.n - row);
    this->pack_tile(row, count, t);
    for (int64_t column = first; column < last; column += COLS) {
      this->template scores<false>(row, count, t, this->panel(column - first, nullptr, nullptr));
      for (int64_t i = 0; i < count; i++)
        memcpy(p.scores + (row + i) * p.m + column, t.s + i * COLS, smaller(COLS, p.m - column) * sizeof(float));
    }
  }

  const AdditiveScores& p;
};

template <class Tile>
class Backward : Operands<Tile> {
  using Base = Operands<Tile>;
  using Base::ROWS, Base::COLS, Base::KINKED, Base::SCORES, Base::RUN, Base::SLICE, Base::block, Base::blocks,
      Base::width;

 public:
  Backward(const AdditiveScores& p, const Tile& tile, float below)
      : Base(p, tile, below),
        p(p),
        for_a(p.da || p.dw || !KINKED),
        for_b(p.db || p.dw || !KINKED),
        groups(count_groups(p.n, ROWS, MAX_GROUPS, KINKED ? Tile::GROUP_TILES / 2 : 4)),
        row_mass(below != 0.0f ? p.n : 0),
        column_mass(below != 0.0f ? p.m : 0),
        own_da(for_a && !(p.da && p.features_dtype == kFloat32) ? p.n * p.h : 0),
        own_db(for_b && !(p.db && p.features_dtype == kFloat32) ? p.m * p.h : 0),
        da(own_da.data ? own_da.data : p.da),
        db(own_db.data ? own_db.data : p.db),
        group_db(for_b ? groups * block * width : 0),
        group_dw(KINKED ? 0 : groups * width) {}

  void run() {
    void (Backward::*sweep)(int64_t, int64_t, const Scratch&) = &Backward::sweep_group<true, true>;
    if constexpr (KINKED) {
      if (!for_b) sweep = &Backward::sweep_group<true, false>;
      if (!for_a) sweep = &Backward::sweep_group<false, true>;
    }
#pragma omp parallel num_threads(p.threads)
    {
      const Scratch t = this->thread_scratch();
      if (this->below != 0.0f) sum_grad();
      for (int64_t index = 0; index < blocks; index++) {
        const int64_t first = index * block, last = smaller(first + block, p.m);
#pragma omp for
        for (int64_t column = first; column < last; column += COLS) this->pack_panel(column, column - first, t);
#pragma omp for schedule(dynamic)
        for (int64_t g = 0; g < groups; g++) (this->*sweep)(g, first, t);
        if (for_b) merge(first, last);
      }
    }
    finish();
  }

 private:
  // Sums of g over rows and over columns, which the leaky ReLU's slope below 0 multiplies.
  void sum_grad() {
#pragma omp for nowait
    for (int64_t i = 0; i < p.n; i++) {
      double sum = 0.0;
      for (int64_t j = 0; j < p.m; j++) sum += p.grad[i * p.m + j];
      row_mass.data[i] = static_cast<float>(sum);
    }
#pragma omp for
    for (int64_t j0 = 0; j0 < p.m; j0 += CHUNK) {
      double sum[CHUNK] = {};
      const int64_t count = smaller(CHUNK, p.m - j0);
      for (int64_t i = 0; i < p.n; i++)
        for (int64_t j = 0; j < count; j++) sum[j] += p.grad[i * p.m + j0 + j];
      for (int64_t j = 0; j < count; j++) column_mass.data[j0 + j] = static_cast<float>(sum[j]);
    }
  }

  // One group of rows against one block of columns.
  template <bool FOR_A, bool FOR_B>
  void sweep_group(int64_t g, int64_t first_column, const Scratch& t) {
    const int64_t tiles = (p.n + ROWS - 1) / ROWS;
    const int64_t first = g * tiles / groups * ROWS, last = smaller((g + 1) * tiles / groups * ROWS, p.n);
    float* sum = group_db.data + (FOR_B ? g * block * width : 0);
    if (FOR_A && first_column == 0) memset(da + first * p.h, 0, (last - first) * p.h * sizeof(float));
    if (FOR_B) memset(sum, 0, block * width * sizeof(float));
    for (int64_t row = first; row < last; row += ROWS) {
      const int64_t count = smaller(ROWS, last - row);
      this->pack_tile(row, count, t);
      if (FOR_A) memset(t.da, 0, ROWS * width * sizeof(float));
      if (!KINKED) memset(t.dw, 0, width * sizeof(float));
      for (int64_t at = 0; at < block && first_column + at < p.m; at += COLS) {
        const Panel panel = this->panel(at, sum + (FOR_B ? at * width : 0), nullptr);
        if (!KINKED) this->template scores<true>(row, count, t, panel);  // for phi and phi'
        load_grad(row, count, first_column + at, t.s);
        this->tile.template gradients<FOR_A, FOR_B>(count, t, panel, p.h);
      }
      if (FOR_A) add_rows<RUN>(t.da, count, p.h, ROWS, da + row * p.h);
      if (!KINKED)
        for (int64_t k = 0; k < p.h; k++) group_dw.data[g * width + k] += t.dw[k];
    }
  }

  // g of a tile, 0 in its padding.
  void load_grad(int64_t row, int64_t count, int64_t column, float* tile_grad) const {
    const int64_t columns = smaller(COLS, p.m - column);
    if (count < ROWS || columns < COLS) memset(tile_grad, 0, SCORES * sizeof(float));
    for (int64_t i = 0; i < count; i++)
      memcpy(tile_grad + i * COLS, p.grad + (row + i) * p.m + column, columns * sizeof(float));
  }

  // db of one block of columns: its groups, in order.
  void merge(int64_t first, int64_t last) {
    float factor[MAX_GROUPS];
    fill(factor, groups, 1.0f);
#pragma omp for
    for (int64_t at = 0; at < block * width; at += SLICE)
      merge_groups(group_db.data, groups, block * width, factor, at, smaller(at + SLICE, block * width));
#pragma omp for nowait  // the next block may be packed meanwhile, and packing ends with a barrier
    for (int64_t column = first; column < last; column++) {
      const int64_t at = (column - first) / COLS * COLS, j = (column - first) % COLS;
      copy_row<RUN>(group_db.data + at * width, j, COLS, p.h, db + column * p.h);
    }
  }

  void finish() {
    const bool leaky = this->below != 0.0f;
#pragma omp parallel for num_threads(p.threads)
    for (int64_t k0 = 0; k0 < p.h; k0 += CHUNK) {
      double dw[CHUNK] = {};
      const int64_t count = smaller(CHUNK, p.h - k0);
      for (int64_t i = 0; for_a && i < p.n; i++) {
        this->finish_vector(this->a, i, da, k0, 1.0, leaky ? row_mass.data[i] : 0.0f, 1.0, dw);
        if (p.da && own_da.data) write(da + i * p.h + k0, i * p.h + k0, count, p.features_dtype, p.da);
      }
      for (int64_t j = 0; for_b && j < p.m; j++) {
        this->finish_vector(this->b, j, db, k0, 1.0, leaky ? column_mass.data[j] : 0.0f, -1.0, dw);
        if (p.db && own_db.data) write(db + j * p.h + k0, j * p.h + k0, count, p.features_dtype, p.db);
      }
      for (int64_t k = k0; p.dw && k < smaller(k0 + CHUNK, p.h); k++) {
        double sum = KINKED ? dw[k - k0] : 0.0;
        for (int64_t g = 0; !KINKED && g < groups; g++) sum += group_dw.data[g * width + k];
        p.dw[k] = static_cast<float>(sum);
      }
    }
  }

  const AdditiveScores& p;
  const bool for_a, for_b;  // sums over columns, over rows
  const int64_t groups;
  ZeroBuffer<float> row_mass, column_mass;  // (n,) (m,) sums of g; leaky ReLU only
  Buffer<float> own_da, own_db;             // in place of gradients that only dw needs, or that are not float32
  float *const da, *const db;               // without w, until finish()
  ZeroBuffer<float> group_db;
  ZeroBuffer<double> group_dw;  // smooth activations only
};

template <class Tile>
void forward(const AdditiveScores& p, const Tile& tile, float below) {
  Forward<Tile>(p, tile, below).run();
}

template <class Tile>
void backward(const AdditiveScores& p, const Tile& tile, float below) {
  Backward<Tile>(p, tile, below).run();
}

bool operands_finite(const AdditiveScores& p) {
  return all_finite(Features{p.a, p.features_dtype}, p.n * p.h, p.threads) &&
         all_finite(Features{p.b, p.features_dtype}, p.m * p.h, p.threads) && all_finite(p.w, p.h, 1) &&
         all_finite(&p.slope, 1, 1);
}

}  // namespace

void additive_scores_forward(const AdditiveScores& p) {
  if (!operands_finite(p)) return fill(p.scores, p.n * p.m, NAN);
  with_tile(p, [&p](const auto& tile, float below) { forward(p, tile, below); });
}

void additive_scores_backward(const AdditiveScores& p) {
  if (!p.da && !p.db && !p.dw) return;
  if (!operands_finite(p) || !all_finite(p.grad, p.n * p.m, p.threads)) {
    if (p.da) write_nan(p.n * p.h, p.features_dtype, p.da);
    if (p.db) write_nan(p.m * p.h, p.features_dtype, p.db);
    if (p.dw) fill(p.dw, p.h, NAN);
    return;
  }
  with_tile(p, [&p](const auto& tile, float below) { backward(p, tile, below); });
}

}  // namespace CK_ISA
}  // namespace ck
