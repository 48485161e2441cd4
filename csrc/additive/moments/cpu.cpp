// All-pairs additive critic: moments and gradients in one sweep, with no n x m array.
//
//   S_ij = sum_h w_h phi(a_ih + b_jh)      J = mean_i S_{i,first_positive+i}      L = log(1/|P| sum_P e^{S_ij})
//   da_ih = w_h sum_j P_ij phi'(t_ijh)     db_jh = w_h sum_i P_ij phi'(t_ijh)     dw_h = sum_ij P_ij phi(t_ijh)
//   t_ijh = a_ih + b_jh,  P_ij = e^{S_ij} / sum_P e^S on the pairs of P, 0 elsewhere
//
// One sweep.  L is one number for the whole array, so a tile of pairs computes its S, turns it into e_ij = e^{S_ij - shift}
// and adds e_ij phi' to unnormalised gradients at once; dividing by sum e comes at the end.  `shift` is the largest S of the
// first tile, and moves (rescaling what was summed) only if a tile exceeds it by HEADROOM.
//
// Order.  Rows are cut into groups and columns into blocks by shape alone.  A group has its own shift, its rows of da and, per
// block, its own sum for db; groups are merged in order.  So one writer per number, and the same bits for any thread count.

#include "additive/moments/additive_moments.h"

#include "additive/moments/positives.h"
#include "additive/sweep.h"

namespace ck {
namespace CK_ISA {
namespace {

constexpr int64_t MAX_GROUPS = 64;  // also the most threads that can help
constexpr float HEADROOM = 40.0f;   // e^40 times the number of pairs stays far inside float

void scale(float* x, int64_t size, float factor) {
  for (int64_t i = 0; i < size; i++) x[i] *= factor;
}

struct Group {
  int64_t first, last;  // its rows
  double mass;          // sum of e_ij over its rows and the columns so far
  double positives;     // sum of S over its positives
  float shift;          // e_ij = e^{S_ij - shift}
  float* db;            // (block, h) in panels: sum_i e_ij phi' over its rows
  float* column_mass;   // (block,) sum_i e_ij over its rows; ReLU family only
  double* dw;           // (h,) smooth activations only
};

// e^{from - to}; `from` is NOTHING where nothing was summed.
double ratio(float from, float to) { return from == NOTHING ? 0.0 : exp(static_cast<double>(from) - to); }

template <class Tile>
class Sweep : Operands<Tile> {
  using Base = Operands<Tile>;
  using Base::ROWS, Base::COLS, Base::KINKED, Base::SCORES, Base::MASSES, Base::RUN, Base::SLICE, Base::block,
      Base::blocks, Base::width;

 public:
  Sweep(const AdditiveMoments& p, const Tile& tile, float below)
      : Base(p, tile, below),
        p(p),
        for_a(p.need_a || p.need_w || (!KINKED && p.need_b)),
        for_b(p.need_b || p.need_w || (!KINKED && p.need_a)),
        groups(count_groups(p.n, ROWS, MAX_GROUPS, Tile::GROUP_TILES)),
        row_mass(KINKED ? p.n : 0),
        column_mass(KINKED ? p.m : 0),
        own_da(for_a && !(p.need_a && p.features_dtype == kFloat32) ? p.n * p.h : 0),
        own_db(for_b && !(p.need_b && p.features_dtype == kFloat32) ? p.m * p.h : 0),
        da(own_da.data ? own_da.data : p.da),
        db(own_db.data ? own_db.data : p.db),
        group_db(for_b ? groups * block * width : 0),
        group_column_mass(KINKED ? groups * block : 0),
        group_dw(KINKED ? 0 : groups * width),
        block_shift(blocks),
        group(groups) {
    const int64_t tiles = (p.n + ROWS - 1) / ROWS;
    for (int64_t g = 0; g < groups; g++) {
      const int64_t first = g * tiles / groups * ROWS, last = smaller((g + 1) * tiles / groups * ROWS, p.n);
      group.data[g] = {first,
                       last,
                       0.0,
                       0.0,
                       NOTHING,
                       group_db.data + (for_b ? g * block * width : 0),
                       group_column_mass.data + (KINKED ? g * block : 0),
                       group_dw.data + (KINKED ? 0 : g * width)};
    }
  }

  void run() {
    void (Sweep::*sweep)(Group&, int64_t, const Scratch&) = &Sweep::sweep_group<false, false>;
    if (for_a && for_b) sweep = &Sweep::sweep_group<true, true>;
    if constexpr (KINKED) {
      if (for_a && !for_b) sweep = &Sweep::sweep_group<true, false>;
      if (!for_a && for_b) sweep = &Sweep::sweep_group<false, true>;
    }
#pragma omp parallel num_threads(p.threads)
    {
      const Scratch t = this->thread_scratch();
      for (int64_t index = 0; index < blocks; index++) {
        const int64_t first = index * block, last = smaller(first + block, p.m);
#pragma omp for
        for (int64_t column = first; column < last; column += COLS) this->pack_panel(column, column - first, t);
#pragma omp for schedule(dynamic)
        for (int64_t g = 0; g < groups; g++) (this->*sweep)(group.data[g], first, t);
        if (for_b) merge(index, first, last);
      }
    }
    finish();
  }

 private:
  // One group of rows against one block of columns.
  template <bool FOR_A, bool FOR_B>
  void sweep_group(Group& g, int64_t first_column, const Scratch& t) {
    constexpr bool GRADIENTS = FOR_A || FOR_B;
    if (FOR_A && first_column == 0) memset(da + g.first * p.h, 0, (g.last - g.first) * p.h * sizeof(float));
    if (FOR_B) memset(g.db, 0, block * width * sizeof(float));
    if (KINKED) memset(g.column_mass, 0, block * sizeof(float));
    for (int64_t row = g.first; row < g.last; row += ROWS) {
      const int64_t count = smaller(ROWS, g.last - row);
      this->pack_tile(row, count, t);
      if (FOR_A) memset(t.da, 0, ROWS * width * sizeof(float));
      if (GRADIENTS && !KINKED) memset(t.dw, 0, width * sizeof(float));
      memset(t.mass, 0, MASSES * sizeof(float));
      for (int64_t at = 0; at < block && first_column + at < p.m; at += COLS) {
        const Panel panel = this->panel(at, g.db + (FOR_B ? at * width : 0), g.column_mass + (KINKED ? at : 0));
        this->template scores<GRADIENTS>(row, count, t, panel);
        exponentials(g, row, count, first_column + at, t, panel);
        if (GRADIENTS) this->tile.template gradients<FOR_A, FOR_B>(count, t, panel, p.h);
      }
      add_masses(g, row, count, t);
      if (FOR_A) add_rows<RUN>(t.da, count, p.h, ROWS, da + row * p.h);
      if (GRADIENTS && !KINKED)
        for (int64_t k = 0; k < p.h; k++) g.dw[k] += t.dw[k];
    }
  }

  // Takes J's part from a tile of scores, and replaces them by e_ij.
  void exponentials(Group& g, int64_t row, int64_t count, int64_t column, const Scratch& t, const Panel& panel) {
    for (int64_t i = 0; i < count; i++) {
      const int64_t j = p.first_positive + row + i - column;
      if (j < 0 || j >= COLS) continue;
      g.positives += t.s[i * COLS + j];
      if (!p.include_diagonal) t.s[i * COLS + j] = NOTHING;
    }
    for (int64_t x = count * COLS; x < ROWS * COLS; x++) t.s[x] = NOTHING;  // lanes past a tile are that already
    vf top = load(t.s);
    for (int64_t x = VL; x < SCORES; x += VL) top = vmax(load(t.s + x), top);
    if (any(greater(top, broadcast(g.shift + HEADROOM)))) move_shift(g, reduce_max(top), t);
    const vf shift = broadcast(g.shift == NOTHING ? 0.0f : g.shift);
    if constexpr (!KINKED) {
      vf sum = load(t.mass);
      for (int64_t x = 0; x < SCORES; x += VL) {
        const vf e = vexp(load(t.s + x) - shift);
        store(t.s + x, e);
        sum += e;
      }
      store(t.mass, sum);
    } else {
      vf column_sum[COLS / VL];
      for (int v = 0; v < COLS / VL; v++) column_sum[v] = load(panel.mass + v * VL);
      for (int64_t i = 0; i < ROWS; i++) {
        vf row_sum = load(t.mass + i * VL);
        for (int v = 0; v < COLS / VL; v++) {
          const vf e = vexp(load(t.s + i * COLS + v * VL) - shift);
          store(t.s + i * COLS + v * VL, e);
          column_sum[v] += e;
          row_sum += e;
        }
        store(t.mass + i * VL, row_sum);
      }
      for (int v = 0; v < COLS / VL; v++) store(panel.mass + v * VL, column_sum[v]);
    }
  }

  // The sums of e_ij of a tile's rows over a block of columns.
  void add_masses(Group& g, int64_t row, int64_t count, const Scratch& t) {
    if (!KINKED) g.mass += sum_lanes(load(t.mass));
    for (int64_t i = 0; KINKED && i < count; i++) {
      const float mass = sum_lanes(load(t.mass + i * VL));
      row_mass.data[row + i] += mass;
      g.mass += mass;
    }
  }

  // Everything the group has summed so far, in units of the new e^shift.
  void move_shift(Group& g, float shift, const Scratch& t) {
    const float factor = static_cast<float>(ratio(g.shift, shift));
    g.shift = shift;
    g.mass *= factor;
    scale(t.mass, MASSES, factor);
    if (KINKED) {
      scale(row_mass.data + g.first, g.last - g.first, factor);
      scale(g.column_mass, block, factor);
    }
    if (for_a) {
      scale(da + g.first * p.h, (g.last - g.first) * p.h, factor);
      scale(t.da, ROWS * width, factor);
    }
    if (for_b) scale(g.db, block * width, factor);
    if (!KINKED) {
      scale(t.dw, width, factor);
      for (int64_t k = 0; k < p.h; k++) g.dw[k] *= factor;
    }
  }

  float highest_shift() const {
    float highest = NOTHING;
    for (int64_t g = 0; g < groups; g++) highest = group.data[g].shift > highest ? group.data[g].shift : highest;
    return highest;
  }

  // db of one block of columns: its groups, in order, in units of the highest of their e^shift.
  void merge(int64_t index, int64_t first, int64_t last) {
    const float shift = highest_shift();
    float factor[MAX_GROUPS];
    for (int64_t g = 0; g < groups; g++) factor[g] = static_cast<float>(ratio(group.data[g].shift, shift));
#pragma omp single nowait
    block_shift.data[index] = shift;
#pragma omp for
    for (int64_t at = 0; at < block * width; at += SLICE)
      merge_groups(group_db.data, groups, block * width, factor, at, smaller(at + SLICE, block * width));
#pragma omp for nowait  // the next block may be packed meanwhile, and packing ends with a barrier
    for (int64_t column = first; column < last; column++) {
      const int64_t at = (column - first) / COLS * COLS, j = (column - first) % COLS;
      float mass = 0.0f;
      for (int64_t g = 0; KINKED && g < groups; g++) mass += factor[g] * group.data[g].column_mass[at + j];
      if (KINKED) column_mass.data[column] = mass;
      copy_row<RUN>(group_db.data + at * width, j, COLS, p.h, db + column * p.h);
    }
  }

  void finish() {
    const float shift = highest_shift();
    double total = 0.0, positives = 0.0;
    for (int64_t g = 0; g < groups; g++) {
      total += group.data[g].mass * ratio(group.data[g].shift, shift);
      positives += group.data[g].positives;
    }
    const double pairs = static_cast<double>(p.n) * p.m - (p.include_diagonal ? 0 : p.n);
    const float bias = p.bias ? *p.bias : 0.0f;
    *p.j = static_cast<float>(positives / p.n) + bias;
    *p.el = static_cast<float>(shift + log(total) - log(pairs)) + bias;
    if (!for_a && !for_b) return;
#pragma omp parallel for num_threads(p.threads)
    for (int64_t k0 = 0; k0 < p.h; k0 += CHUNK) {
      const int64_t count = smaller(CHUNK, p.h - k0);
      double dw[CHUNK] = {};
      for (int64_t g = 0; g < groups; g++) {
        const double unit = ratio(group.data[g].shift, shift) / total;
        if (for_a)
          for (int64_t i = group.data[g].first; i < group.data[g].last; i++) {
            this->finish_vector(this->a, i, da, k0, unit, KINKED ? row_mass.data[i] : 0.0f, 1.0, dw);
            if (p.need_a && own_da.data) write(da + i * p.h + k0, i * p.h + k0, count, p.features_dtype, p.da);
          }
      }
      if (for_b)
        for (int64_t j = 0; j < p.m; j++) {
          const double unit = ratio(block_shift.data[j / block], shift) / total;
          this->finish_vector(this->b, j, db, k0, unit, KINKED ? column_mass.data[j] : 0.0f, -1.0, dw);
          if (p.need_b && own_db.data) write(db + j * p.h + k0, j * p.h + k0, count, p.features_dtype, p.db);
        }
      if (!p.need_w) continue;
      for (int64_t k = k0; k < k0 + count; k++) {
        double sum = dw[k - k0];
        if constexpr (!KINKED) {
          sum = 0.0;
          for (int64_t g = 0; g < groups; g++) sum += ratio(group.data[g].shift, shift) / total * group.data[g].dw[k];
        }
        p.dw[k] = static_cast<float>(sum);
      }
    }
  }

  const AdditiveMoments& p;
  const bool for_a, for_b;  // sums over columns, over rows
  const int64_t groups;
  ZeroBuffer<float> row_mass, column_mass;  // (n,) (m,); ReLU family only
  Buffer<float> own_da, own_db;             // in place of gradients that only dw needs, or that are not float32
  float *const da, *const db;               // unnormalised, without w, until finish()
  ZeroBuffer<float> group_db, group_column_mass;
  ZeroBuffer<double> group_dw;
  ZeroBuffer<float> block_shift;  // (blocks,) units of db
  ZeroBuffer<Group> group;
};

template <class Tile>
void run(const AdditiveMoments& p, const Tile& tile, float below) {
  Sweep<Tile>(p, tile, below).run();
}

}  // namespace

void additive_moments(const AdditiveMoments& p) {
  const bool finite = all_finite(Features{p.a, p.features_dtype}, p.n * p.h, p.threads) &&
                      all_finite(Features{p.b, p.features_dtype}, p.m * p.h, p.threads) && all_finite(p.w, p.h, 1) &&
                      all_finite(&p.slope, 1, 1);
  if (!finite) {
    *p.j = *p.el = NAN;
    if (p.need_a) write_nan(p.n * p.h, p.features_dtype, p.da);
    if (p.need_b) write_nan(p.m * p.h, p.features_dtype, p.db);
    if (p.need_w) fill(p.dw, p.h, NAN);
    return;
  }
  with_tile(p, [&p](const auto& tile, float below) { run(p, tile, below); });
}

void additive_moments_backward(const AdditiveMomentsBackward& p) {
  with_activation(p.activation, p.slope, [&p](const auto& phi) { Positives(p, phi).run(); });
}

}  // namespace CK_ISA
}  // namespace ck
