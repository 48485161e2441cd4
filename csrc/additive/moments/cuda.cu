// All-pairs additive critic on a GPU: moments and gradients in one sweep, in panels of rows.
//
//   S_ij = sum_h w_h phi(a_ih + b_jh)      J = mean_i S_{i,first_positive+i}      L = log(1/|P| sum_P e^{S_ij})
//   da_ih = w_h sum_j P_ij phi'(t_ijh)     db_jh = w_h sum_i P_ij phi'(t_ijh)     dw_h = sum_ij P_ij phi(t_ijh)
//
// A panel is as many rows as have their scores in the budget.  For each: the scores (scores.cuh), the largest so far as the
// unit of its exponentials (prologue_epilogue.cuh), the sums over its columns for da, those over its rows added to db (gradients.cuh).
// L divides at the end, so no score is computed twice, whatever n m is.  One writer per number, sums in an order that only
// the shape and the number of processors decide, no atomics, nothing waits for the device.
//
// phi = t phi' gives dw of the ReLU family from da and db; the other activations sum P phi next to P phi'.
#include "additive/moments/cuda.h"

#include "additive/moments/prologue_epilogue.cuh"
#include "additive/moments/gradients.cuh"
#include "additive/moments/positives.cuh"
#include "common/cuda/launcher.cuh"

namespace ck {
namespace cuda {

// Blocks of a multiprocessor: two leave a thread 128 registers, which is too few where one is asked for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define CK_SMOOTH_ROWS 1
#else
#define CK_SMOOTH_ROWS 2
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1000
#define CK_LOGISTIC_SCORES 1
#else
#define CK_LOGISTIC_SCORES 2
#endif

#define CK_SCORES(name, Phi, blocks)                                        \
  extern "C" __global__ void __launch_bounds__(SCORE_THREADS, blocks)       \
      additive_moments_scores_##name##_kernel(CK_SCORES_PARAMETERS) {       \
    scores_of_tile<Phi, false>(CK_SCORES_ARGUMENTS);                        \
  }                                                                         \
  extern "C" __global__ void __launch_bounds__(SCORE_THREADS, 1)            \
      additive_moments_scores_##name##_group_kernel(CK_SCORES_PARAMETERS) { \
    scores_of_tile<Phi, true>(CK_SCORES_ARGUMENTS);                         \
  }
#define CK_SWEEPS(name, Phi, row_blocks)                                  \
  extern "C" __global__ void __launch_bounds__(SWEEP_THREADS, row_blocks) \
      additive_moments_rows_##name##_kernel(CK_SWEEP_PARAMETERS) {        \
    sweep<Phi, false>(CK_SWEEP_ARGUMENTS);                                \
  }                                                                       \
  extern "C" __global__ void __launch_bounds__(SWEEP_THREADS, 2)          \
      additive_moments_columns_##name##_kernel(CK_SWEEP_PARAMETERS) {     \
    sweep<Phi, true>(CK_SWEEP_ARGUMENTS);                                 \
  }

CK_SCORES(relu, Kinked, 2)  // leaky ReLU too: what differs is in the terms and in w
CK_SWEEPS(relu, Step<false>, 2)
CK_SWEEPS(leaky_relu, Step<true>, 2)
CK_SCORES(gelu, Gelu, 2)
CK_SWEEPS(gelu, Gelu, CK_SMOOTH_ROWS)
CK_SCORES(gelu_tanh, GeluTanh, CK_LOGISTIC_SCORES)
CK_SWEEPS(gelu_tanh, GeluTanh, CK_SMOOTH_ROWS)
CK_SCORES(silu, Silu, CK_LOGISTIC_SCORES)
CK_SWEEPS(silu, Silu, CK_SMOOTH_ROWS)
CK_SCORES(elu, Elu, 2)
CK_SWEEPS(elu, Elu, CK_SMOOTH_ROWS)
CK_SCORES(softplus, Softplus, 2)
CK_SWEEPS(softplus, Softplus, CK_SMOOTH_ROWS)
CK_SCORES(tanh, Tanh, 2)
CK_SWEEPS(tanh, Tanh, CK_SMOOTH_ROWS)

#define CK_POSITIVES(name, Phi)                                             \
  extern "C" __global__ void __launch_bounds__(POSITIVE_THREADS)            \
      additive_moments_positives_##name##_kernel(CK_POSITIVES_PARAMETERS) { \
    positives<Phi>(CK_POSITIVES_ARGUMENTS);                                 \
  }
CK_POSITIVES(relu, Relu)
CK_POSITIVES(leaky_relu, LeakyRelu)
CK_POSITIVES(gelu, Gelu)
CK_POSITIVES(gelu_tanh, GeluTanh)
CK_POSITIVES(silu, Silu)
CK_POSITIVES(elu, Elu)
CK_POSITIVES(softplus, Softplus)
CK_POSITIVES(tanh, Tanh)

namespace {

using ScoresKernel = void (*)(CK_SCORES_PARAMETERS);
using SweepKernel = void (*)(CK_SWEEP_PARAMETERS);

struct Kernels {
  const char *scores_name, *group_name, *rows_name, *columns_name;
  ScoresKernel scores, group;
  SweepKernel rows, columns;
};

#define CK_ENTRY(of_scores, name)                                                                          \
  {"additive_moments_scores_" #of_scores "_kernel", "additive_moments_scores_" #of_scores "_group_kernel", \
   "additive_moments_rows_" #name "_kernel",        "additive_moments_columns_" #name "_kernel",           \
   additive_moments_scores_##of_scores##_kernel,    additive_moments_scores_##of_scores##_group_kernel,    \
   additive_moments_rows_##name##_kernel,           additive_moments_columns_##name##_kernel}
const Kernels KERNELS[] = {// in the order of enum Activation
                           CK_ENTRY(relu, relu),           CK_ENTRY(relu, leaky_relu), CK_ENTRY(gelu, gelu),
                           CK_ENTRY(gelu_tanh, gelu_tanh), CK_ENTRY(silu, silu),       CK_ENTRY(elu, elu),
                           CK_ENTRY(softplus, softplus),   CK_ENTRY(tanh, tanh)};

struct PositivesKernel {
  const char* name;
  void (*kernel)(CK_POSITIVES_PARAMETERS);
};

#define CK_POSITIVES_ENTRY(name) \
  {"additive_moments_positives_" #name "_kernel", additive_moments_positives_##name##_kernel}
const PositivesKernel POSITIVES[] = {// in the order of enum Activation
                                     CK_POSITIVES_ENTRY(relu),     CK_POSITIVES_ENTRY(leaky_relu),
                                     CK_POSITIVES_ENTRY(gelu),     CK_POSITIVES_ENTRY(gelu_tanh),
                                     CK_POSITIVES_ENTRY(silu),     CK_POSITIVES_ENTRY(elu),
                                     CK_POSITIVES_ENTRY(softplus), CK_POSITIVES_ENTRY(tanh)};

#define RUN(kernel, ...) run(#kernel, kernel, __VA_ARGS__)

int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }
int64_t padded(int64_t count, int64_t unit) { return blocks(count, unit) * unit; }
int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }
int64_t larger(int64_t x, int64_t y) { return x > y ? x : y; }

// The sums over `others` of so many blocks, cut into parts where those are too few for the device.
struct Split {
  int count, length;
  Split() : count(0), length(0) {}
  Split(int64_t blocks_of_one, int64_t others, int processors) {
    const int64_t wanted = smaller(blocks(4 * processors, blocks_of_one), blocks(others, TILE));
    length = static_cast<int>(padded(blocks(others, wanted), OTHERS));
    count = static_cast<int>(blocks(others, length));
  }
};

class Sweep {
 public:
  // A null workspace counts its size only.
  Sweep(const AdditiveMoments& p, void* workspace)
      : p_(p),
        kinked_(p.activation <= static_cast<int>(Activation::leaky_relu)),
        leak_(p.activation == static_cast<int>(Activation::leaky_relu) ? p.slope : 0.0f),
        for_a_(p.need_a || p.need_w),
        for_b_(p.need_b || (p.need_w && kinked_)),
        n_(static_cast<int>(p.n)),
        m_(static_cast<int>(p.m)),
        h_(static_cast<int>(p.h)),
        n_padded_(padded(p.n, TILE)),
        m_padded_(padded(p.m, TILE)),
        units_(padded(p.h, UNITS)),
        workspace_(workspace) {
    const bool gradients = for_a_ || for_b_;
    const int64_t groups = p.groups;
    const int64_t affordable = larger(p.score_budget / (4 * m_padded_ * groups) / TILE, 1) * TILE;
    panel_rows_ = gradients ? smaller(affordable, n_padded_) : n_padded_;
    panels_ = static_cast<int>(blocks(n_padded_, panel_rows_));
    chunks_ = static_cast<int>(smaller(blocks(larger(p.n, p.m), 64), 32));
    row_chunks_ = static_cast<int>(smaller(blocks(p.n, 64), 256));
    column_chunks_ = static_cast<int>(smaller(blocks(p.m, 64), 256));
    if (for_a_) row_split_ = Split(groups * (panel_rows_ / TILE) * (units_ / UNITS), m_padded_, p.processors);
    if (for_b_) column_split_ = Split(groups * (m_padded_ / TILE) * (units_ / UNITS), panel_rows_, p.processors);
    const int64_t panel_tiles = panel_rows_ / TILE;

    low_ = workspace_.take<float>("low", groups * 2 * chunks_ * p.h);
    high_ = workspace_.take<float>("high", groups * 2 * chunks_ * p.h);
    centre_ = workspace_.take<float>("centre", groups * units_);
    weights_ = workspace_.take<float>("weights", groups * units_);
    poison_ = workspace_.take<float>("poison", groups);
    at_ = workspace_.take<float>("at", groups * units_ * n_padded_);
    bt_ = workspace_.take<float>("bt", groups * units_ * m_padded_);
    row_term_ = workspace_.take<float>("row_term", kinked_ ? groups * p.n : 0);
    column_term_ = workspace_.take<float>("column_term", kinked_ ? groups * p.m : 0);
    positives_ = workspace_.take<float>("positives", groups * p.n);
    tile_max_ = workspace_.take<float>("tile_max", groups * panel_tiles * (m_padded_ / TILE));
    tile_sum_ = workspace_.take<float>("tile_sum", groups * panel_tiles * (m_padded_ / TILE));
    running_ = workspace_.take<double>("running", groups * 2);
    shift_ = workspace_.take<float>("shift", groups * panels_);
    factor_ = workspace_.take<float>("factor", groups * panels_);
    lse_ = workspace_.take<float>("lse", groups);
    scores_ = workspace_.take<float>("scores", gradients ? groups * panel_rows_ * m_padded_ : 0);
    // unnormalised gradients: in place where the output is float32
    const bool in_place_a = p.need_a && p.dtype == 0, in_place_b = p.need_b && p.dtype == 0;
    ua_ = workspace_.take<float>("ua", for_a_ && !in_place_a ? groups * p.n * p.h : 0);
    ub_ = workspace_.take<float>("ub", for_b_ && !in_place_b ? groups * p.m * p.h : 0);
    if (in_place_a) ua_ = p.da;
    if (in_place_b) ub_ = p.db;
    row_parts_ = workspace_.take<float>(
        "row_parts", row_split_.count > 1 ? groups * row_split_.count * smaller(panel_rows_, p.n) * p.h : 0);
    column_parts_ =
        workspace_.take<float>("column_parts", column_split_.count > 1 ? groups * column_split_.count * p.m * p.h : 0);
    const int64_t weight_parts = kinked_ ? row_chunks_ + column_chunks_ : row_split_.count * panel_tiles;
    weight_parts_ = workspace_.take<float>("weight_parts", p.need_w ? groups * weight_parts * p.h : 0);
    weight_sum_ = workspace_.take<float>("weight_sum", p.need_w && !kinked_ ? groups * p.h : 0);
  }

  const Workspace& workspace() const { return workspace_; }

  void launch(Launcher& run) const {
    const unsigned widest = static_cast<unsigned>(larger(n_padded_, m_padded_) / 32), unit_blocks = blocks(h_, 32);
    const unsigned sides = 2 * p_.groups;
    RUN(additive_moments_range_kernel, dim3(unit_blocks, chunks_, sides), END_THREADS, p_.a, p_.b, p_.dtype, n_, m_, h_,
        low_, high_);
    RUN(additive_moments_centre_kernel, dim3(p_.groups), END_THREADS, low_, high_, chunks_, p_.w, p_.w_dtype, h_,
        units_, p_.slope, leak_, centre_, weights_, poison_);
    RUN(additive_moments_pack_kernel, dim3(widest, units_ / 32, sides), END_THREADS, p_.a, p_.b, p_.dtype, n_, m_, h_,
        n_padded_, m_padded_, at_, bt_);
    if (kinked_)
      RUN(additive_moments_terms_kernel, dim3(blocks(larger(n_, m_), END_THREADS / 32), 1, sides), END_THREADS, p_.a,
          p_.b, p_.dtype, n_, m_, h_, p_.w, p_.w_dtype, centre_, units_, leak_, row_term_, column_term_);
    for (int panel = 0; panel < panels_; panel++) launch_panel(run, panel);
    launch_gradients(run);
  }

 private:
  void launch_panel(Launcher& run, int panel) const {
    const Kernels& kernels = KERNELS[p_.activation];
    const int first = static_cast<int>(panel * panel_rows_),
              rows = static_cast<int>(smaller(panel_rows_, n_padded_ - first));
    const int64_t scores_of_group = panel_rows_ * m_padded_;
    const dim3 tiles(m_padded_ / TILE, rows / TILE, p_.groups);
    const bool group = p_.groups > 1;
    run(group ? kernels.group_name : kernels.scores_name, group ? kernels.group : kernels.scores, tiles, SCORE_THREADS,
        at_ + first, bt_, n_padded_, m_padded_, weights_, centre_, row_term_, column_term_,
        static_cast<int>(padded(h_, SCORE_UNITS)), units_, first, n_, m_, static_cast<int>(p_.first_positive),
        p_.include_diagonal, p_.slope, scores_, scores_of_group, positives_, tile_max_, tile_sum_);
    RUN(additive_moments_total_kernel, dim3(p_.groups), TOTAL_THREADS, tile_max_, tile_sum_,
        static_cast<int64_t>(tiles.x) * tiles.y, panel, panels_, positives_, n_, m_, p_.include_diagonal, poison_,
        p_.bias, running_, shift_, factor_, lse_, p_.j, p_.el);
    const float* const factor = panel ? factor_ + panel : nullptr;
    if (for_a_) {
      const int count = static_cast<int>(smaller(rows, n_ - first)), splits = row_split_.count;
      const int64_t size = static_cast<int64_t>(count) * h_, size_of_group = p_.n * p_.h;
      const bool parts = splits > 1;
      float* const u = ua_ + static_cast<int64_t>(first) * h_;
      const dim3 grid(units_ / UNITS, rows / TILE, p_.groups * splits);
      run(kernels.rows_name, kernels.rows, grid, SWEEP_THREADS, at_ + first, n_padded_, count, bt_, m_padded_, scores_,
          m_padded_, scores_of_group, static_cast<int>(m_padded_), row_split_.length, splits, shift_ + panel, panels_,
          h_, p_.slope, nullptr, parts ? row_parts_ : u, parts ? size : size_of_group,
          kinked_ ? nullptr : weight_parts_);
      if (parts && panels_ > 1) fold(run, row_parts_, splits, size, nullptr, u, size_of_group);
      if (weight_sum_) fold(run, weight_parts_, grid.y * splits, h_, factor, weight_sum_, h_);
    }
    if (for_b_) {
      const int64_t size = p_.m * p_.h;
      const bool parts = column_split_.count > 1;
      const int splits = static_cast<int>(blocks(rows, column_split_.length));  // the last panel may be shorter
      run(kernels.columns_name, kernels.columns, dim3(units_ / UNITS, m_padded_ / TILE, p_.groups * splits),
          SWEEP_THREADS, bt_, m_padded_, m_, at_ + first, n_padded_, scores_, m_padded_, scores_of_group, rows,
          column_split_.length, splits, shift_ + panel, panels_, h_, p_.slope, parts ? nullptr : factor,
          parts ? column_parts_ : ub_, size, nullptr);
      if (parts && panels_ > 1) fold(run, column_parts_, splits, size, factor, ub_, size);
    }
  }

  // A single panel's parts are added here; those of several were, panel by panel.
  void launch_gradients(Launcher& run) const {
    const unsigned unit_blocks = blocks(h_, 32), groups = p_.groups;
    const int weight_chunks = row_chunks_ + column_chunks_;
    const bool row_parts = row_split_.count > 1 && panels_ == 1, column_parts = column_split_.count > 1 && panels_ == 1;
    const int64_t parts_of_group = static_cast<int64_t>(weight_chunks) * h_;
    float* const row_weights = kinked_ ? weight_parts_ : nullptr;
    float* const column_weights = row_weights ? weight_parts_ + static_cast<int64_t>(row_chunks_) * h_ : nullptr;
    if (p_.need_a || row_weights)
      RUN(additive_moments_scale_kernel, dim3(unit_blocks, row_chunks_, groups), END_THREADS, p_.a, p_.dtype, n_, h_,
          1.0f, centre_, units_, row_parts ? row_parts_ : ua_, row_parts ? row_split_.count : 1, shift_, panels_,
          static_cast<int>(panel_rows_), lse_, p_.w, p_.w_dtype, p_.need_a ? p_.da : nullptr, row_weights,
          parts_of_group);
    if (p_.need_b || row_weights)
      RUN(additive_moments_scale_kernel, dim3(unit_blocks, column_chunks_, groups), END_THREADS, p_.b, p_.dtype, m_, h_,
          -1.0f, centre_, units_, column_parts ? column_parts_ : ub_, column_parts ? column_split_.count : 1,
          shift_ + panels_ - 1, panels_, INT32_MAX, lse_, p_.w, p_.w_dtype, p_.need_b ? p_.db : nullptr, column_weights,
          parts_of_group);
    if (!p_.need_w) return;
    const dim3 grid(blocks(h_, END_THREADS), groups);
    if (kinked_)
      RUN(additive_moments_weights_kernel, grid, END_THREADS, weight_parts_, weight_chunks, h_, nullptr, 0, nullptr,
          p_.dw, p_.w_dtype);
    else
      RUN(additive_moments_weights_kernel, grid, END_THREADS, weight_sum_, 1, h_, shift_ + panels_ - 1, panels_, lse_,
          p_.dw, p_.w_dtype);
  }

  void fold(Launcher& run, const float* parts, int count, int64_t size, const float* factor, float* u,
            int64_t u_of_group) const {
    RUN(additive_moments_fold_kernel, dim3(blocks(size, END_THREADS), p_.groups), END_THREADS, parts, count, size,
        factor, panels_, u, u_of_group);
  }

  const AdditiveMoments& p_;
  const bool kinked_;
  const float leak_;
  const bool for_a_, for_b_;  // sums over columns, over rows
  const int n_, m_, h_;
  const int64_t n_padded_, m_padded_, units_;
  Workspace workspace_;
  int64_t panel_rows_;
  int panels_, chunks_, row_chunks_, column_chunks_;
  Split row_split_, column_split_;
  float *low_, *high_, *centre_, *weights_, *poison_, *at_, *bt_, *row_term_, *column_term_, *positives_, *tile_max_,
      *tile_sum_, *shift_, *factor_, *lse_, *scores_, *ua_, *ub_, *row_parts_, *column_parts_, *weight_parts_,
      *weight_sum_;
  double* running_;
};

int positive_chunks(const AdditiveMomentsBackward& p) { return static_cast<int>(smaller(blocks(p.m, 64), 256)); }

float* take_parts(const AdditiveMomentsBackward& p, Workspace& workspace) {
  return workspace.take<float>("parts", p.dw ? p.groups * positive_chunks(p) * p.h : 0);
}

Workspace launch_backward(const AdditiveMomentsBackward& p, Launcher& run) {
  Workspace workspace(p.workspace);
  const PositivesKernel& positives = POSITIVES[p.activation];
  float* const parts = take_parts(p, workspace);
  const int chunks = positive_chunks(p);
  run(positives.name, positives.kernel, dim3(blocks(p.h, 32), chunks, p.groups), POSITIVE_THREADS, p.a, p.b, p.dtype,
      p.w, p.w_dtype, p.n, p.m, p.h, p.first_positive, p.slope, p.g_j, p.g_l, p.da_of_l, p.db_of_l, p.da, p.db, parts);
  if (p.dw)
    RUN(additive_moments_positive_weights_kernel, dim3(blocks(p.h, POSITIVE_THREADS), p.groups), POSITIVE_THREADS,
        parts, chunks, p.n, p.h, p.g_j, p.g_l, p.dw_of_l, p.dw, p.w_dtype);
  return workspace;
}

}  // namespace

int64_t additive_moments_workspace(const AdditiveMoments& p) { return Sweep(p, nullptr).workspace().size(); }

int64_t additive_moments_backward_workspace(const AdditiveMomentsBackward& p) {
  Workspace counter(nullptr);
  take_parts(p, counter);
  return counter.size();
}

int additive_moments(const AdditiveMoments& p) {
  return launched(p, [&](Launcher& run) { Sweep(p, p.workspace).launch(run); });
}

Plan additive_moments_plan(const AdditiveMoments& p) {
  return planned([&](Launcher& run) {
    const Sweep sweep(p, p.workspace);
    sweep.launch(run);
    return sweep.workspace();
  });
}

int additive_moments_backward(const AdditiveMomentsBackward& p) {
  return launched(p, [&](Launcher& run) { launch_backward(p, run); });
}

Plan additive_moments_backward_plan(const AdditiveMomentsBackward& p) {
  return planned([&](Launcher& run) { return launch_backward(p, run); });
}

}  // namespace cuda
}  // namespace ck
