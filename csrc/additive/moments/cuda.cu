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

#define CK_SCORES(name, Phi, blocks)                                  \
  extern "C" __global__ void __launch_bounds__(SCORE_THREADS, blocks) \
      additive_moments_scores_##name##_kernel(CK_SCORES_PARAMETERS) { \
    scores_of_tile<Phi>(CK_SCORES_ARGUMENTS);                         \
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

namespace {

using ScoresKernel = void (*)(CK_SCORES_PARAMETERS);
using SweepKernel = void (*)(CK_SWEEP_PARAMETERS);

struct Kernels {
  const char *scores_name, *rows_name, *columns_name;
  ScoresKernel scores;
  SweepKernel rows, columns;
};

#define CK_ENTRY(of_scores, name)                                                                 \
  {"additive_moments_scores_" #of_scores "_kernel", "additive_moments_rows_" #name "_kernel",     \
   "additive_moments_columns_" #name "_kernel",     additive_moments_scores_##of_scores##_kernel, \
   additive_moments_rows_##name##_kernel,           additive_moments_columns_##name##_kernel}
const Kernels KERNELS[] = {// in the order of enum Activation
                           CK_ENTRY(relu, relu),           CK_ENTRY(relu, leaky_relu), CK_ENTRY(gelu, gelu),
                           CK_ENTRY(gelu_tanh, gelu_tanh), CK_ENTRY(silu, silu),       CK_ENTRY(elu, elu),
                           CK_ENTRY(softplus, softplus),   CK_ENTRY(tanh, tanh)};

#define RUN(kernel, ...) run(#kernel, kernel, __VA_ARGS__)

int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }
int64_t padded(int64_t count, int64_t unit) { return blocks(count, unit) * unit; }
int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }
int64_t larger(int64_t x, int64_t y) { return x > y ? x : y; }

// The sums over `others` for `tiles` x `unit_tiles` blocks, cut into parts where those are too few for the device.
struct Split {
  int count, length;
  Split() : count(0), length(0) {}
  Split(int64_t tiles, int64_t unit_tiles, int64_t others, int processors) {
    const int64_t wanted = smaller(blocks(4 * processors, tiles * unit_tiles), blocks(others, TILE));
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
    panel_rows_ = gradients ? smaller(larger(p.score_budget / (4 * m_padded_) / TILE, 1) * TILE, n_padded_) : n_padded_;
    panels_ = static_cast<int>(blocks(n_padded_, panel_rows_));
    chunks_ = static_cast<int>(smaller(blocks(larger(p.n, p.m), 64), 32));
    row_chunks_ = static_cast<int>(smaller(blocks(p.n, 64), 256));
    column_chunks_ = static_cast<int>(smaller(blocks(p.m, 64), 256));
    if (for_a_) row_split_ = Split(panel_rows_ / TILE, units_ / UNITS, m_padded_, p.processors);
    if (for_b_) column_split_ = Split(m_padded_ / TILE, units_ / UNITS, panel_rows_, p.processors);
    const int64_t panel_tiles = panel_rows_ / TILE;

    low_ = workspace_.take<float>("low", 2 * chunks_ * p.h);
    high_ = workspace_.take<float>("high", 2 * chunks_ * p.h);
    centre_ = workspace_.take<float>("centre", units_);
    weights_ = workspace_.take<float>("weights", units_);
    poison_ = workspace_.take<float>("poison", 1);
    at_ = workspace_.take<float>("at", units_ * n_padded_);
    bt_ = workspace_.take<float>("bt", units_ * m_padded_);
    row_term_ = workspace_.take<float>("row_term", kinked_ ? p.n : 0);
    column_term_ = workspace_.take<float>("column_term", kinked_ ? p.m : 0);
    positives_ = workspace_.take<float>("positives", p.n);
    tile_max_ = workspace_.take<float>("tile_max", panel_tiles * (m_padded_ / TILE));
    tile_sum_ = workspace_.take<float>("tile_sum", panel_tiles * (m_padded_ / TILE));
    running_ = workspace_.take<double>("running", 2);
    shift_ = workspace_.take<float>("shift", panels_);
    factor_ = workspace_.take<float>("factor", panels_);
    lse_ = workspace_.take<float>("lse", 1);
    scores_ = workspace_.take<float>("scores", gradients ? panel_rows_ * m_padded_ : 0);
    // unnormalised gradients: in place where the output is float32
    const bool in_place_a = p.need_a && p.dtype == 0, in_place_b = p.need_b && p.dtype == 0;
    ua_ = workspace_.take<float>("ua", for_a_ && !in_place_a ? p.n * p.h : 0);
    ub_ = workspace_.take<float>("ub", for_b_ && !in_place_b ? p.m * p.h : 0);
    if (in_place_a) ua_ = p.da;
    if (in_place_b) ub_ = p.db;
    row_parts_ = workspace_.take<float>("row_parts", row_split_.count > 1 ? row_split_.count * panel_rows_ * p.h : 0);
    column_parts_ =
        workspace_.take<float>("column_parts", column_split_.count > 1 ? column_split_.count * p.m * p.h : 0);
    const int64_t weight_parts = kinked_ ? row_chunks_ + column_chunks_ : row_split_.count * panel_tiles;
    weight_parts_ = workspace_.take<float>("weight_parts", p.need_w ? weight_parts * p.h : 0);
    weight_sum_ = workspace_.take<float>("weight_sum", p.need_w && !kinked_ ? p.h : 0);
  }

  const Workspace& workspace() const { return workspace_; }

  void launch(Launcher& run) const {
    const unsigned widest = static_cast<unsigned>(larger(n_padded_, m_padded_) / 32), unit_blocks = blocks(h_, 32);
    RUN(additive_moments_range_kernel, dim3(unit_blocks, chunks_, 2), END_THREADS, p_.a, p_.b, p_.dtype, n_, m_, h_,
        low_, high_);
    RUN(additive_moments_centre_kernel, dim3(1), END_THREADS, low_, high_, chunks_, p_.w, p_.w_dtype, h_, units_,
        p_.slope, leak_, centre_, weights_, poison_);
    RUN(additive_moments_pack_kernel, dim3(widest, units_ / 32, 2), END_THREADS, p_.a, p_.b, p_.dtype, n_, m_, h_,
        n_padded_, m_padded_, at_, bt_);
    if (kinked_)
      RUN(additive_moments_terms_kernel, dim3(blocks(larger(n_, m_), END_THREADS / 32), 1, 2), END_THREADS, p_.a, p_.b,
          p_.dtype, n_, m_, h_, p_.w, p_.w_dtype, centre_, leak_, row_term_, column_term_);
    for (int panel = 0; panel < panels_; panel++) launch_panel(run, panel);
    launch_gradients(run);
  }

 private:
  void launch_panel(Launcher& run, int panel) const {
    const Kernels& kernels = KERNELS[p_.activation];
    const int first = static_cast<int>(panel * panel_rows_),
              rows = static_cast<int>(smaller(panel_rows_, n_padded_ - first));
    const dim3 tiles(m_padded_ / TILE, rows / TILE);
    run(kernels.scores_name, kernels.scores, tiles, SCORE_THREADS, at_ + first, bt_, n_padded_, m_padded_, weights_,
        centre_, row_term_, column_term_, static_cast<int>(padded(h_, SCORE_UNITS)), first, n_, m_,
        static_cast<int>(p_.first_positive), p_.include_diagonal, p_.slope, scores_, positives_, tile_max_, tile_sum_);
    RUN(additive_moments_total_kernel, dim3(1), TOTAL_THREADS, tile_max_, tile_sum_,
        static_cast<int64_t>(tiles.x) * tiles.y, panel, panel + 1 == panels_, positives_, n_, m_, p_.include_diagonal,
        poison_, running_, shift_, factor_, lse_, p_.moments);
    const float* const factor = panel ? factor_ + panel : nullptr;
    if (for_a_) {
      const int count = static_cast<int>(smaller(rows, n_ - first));
      const int64_t size = static_cast<int64_t>(count) * h_;
      const bool parts = row_split_.count > 1;
      float* const u = ua_ + static_cast<int64_t>(first) * h_;
      const dim3 grid(units_ / UNITS, rows / TILE, row_split_.count);
      run(kernels.rows_name, kernels.rows, grid, SWEEP_THREADS, at_ + first, n_padded_, count, bt_, m_padded_, scores_,
          m_padded_, static_cast<int>(m_padded_), row_split_.length, shift_ + panel, h_, p_.slope, nullptr,
          parts ? row_parts_ : u, size, kinked_ ? nullptr : weight_parts_);
      if (parts) fold(run, row_parts_, row_split_.count, size, nullptr, u);
      if (weight_sum_) fold(run, weight_parts_, grid.y * grid.z, h_, factor, weight_sum_);
    }
    if (for_b_) {
      const int64_t size = p_.m * p_.h;
      const bool parts = column_split_.count > 1;
      const int count = static_cast<int>(blocks(rows, column_split_.length));  // the last panel may be shorter
      run(kernels.columns_name, kernels.columns, dim3(units_ / UNITS, m_padded_ / TILE, count), SWEEP_THREADS, bt_,
          m_padded_, m_, at_ + first, n_padded_, scores_, m_padded_, rows, column_split_.length, shift_ + panel, h_,
          p_.slope, parts ? nullptr : factor, parts ? column_parts_ : ub_, size, nullptr);
      if (parts) fold(run, column_parts_, count, size, factor, ub_);
    }
  }

  void launch_gradients(Launcher& run) const {
    const unsigned unit_blocks = blocks(h_, 32);
    float* const row_weights = kinked_ ? weight_parts_ : nullptr;
    float* const column_weights = row_weights ? weight_parts_ + static_cast<int64_t>(row_chunks_) * h_ : nullptr;
    if (p_.need_a || row_weights)
      RUN(additive_moments_scale_kernel, dim3(unit_blocks, row_chunks_), END_THREADS, p_.a, p_.dtype, n_, h_, 1.0f,
          centre_, ua_, shift_, static_cast<int>(panel_rows_), lse_, p_.w, p_.w_dtype, p_.need_a ? p_.da : nullptr,
          row_weights);
    if (p_.need_b || row_weights)
      RUN(additive_moments_scale_kernel, dim3(unit_blocks, column_chunks_), END_THREADS, p_.b, p_.dtype, m_, h_, -1.0f,
          centre_, ub_, shift_ + panels_ - 1, INT32_MAX, lse_, p_.w, p_.w_dtype, p_.need_b ? p_.db : nullptr,
          column_weights);
    if (!p_.need_w) return;
    const dim3 grid(blocks(h_, END_THREADS));
    if (kinked_)
      RUN(additive_moments_weights_kernel, grid, END_THREADS, weight_parts_, row_chunks_ + column_chunks_, h_, nullptr,
          nullptr, p_.dw, p_.w_dtype);
    else
      RUN(additive_moments_weights_kernel, grid, END_THREADS, weight_sum_, 1, h_, shift_ + panels_ - 1, lse_, p_.dw,
          p_.w_dtype);
  }

  void fold(Launcher& run, const float* parts, int count, int64_t size, const float* factor, float* u) const {
    RUN(additive_moments_fold_kernel, dim3(blocks(size, END_THREADS)), END_THREADS, parts, count, size, factor, u);
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

}  // namespace

int64_t additive_moments_workspace(const AdditiveMoments& p) { return Sweep(p, nullptr).workspace().size(); }

int additive_moments(const AdditiveMoments& p) {
  const cudaError_t set = cudaSetDevice(p.device);
  if (set != cudaSuccess) return set;
  Launcher run(static_cast<cudaStream_t>(p.stream));
  Sweep(p, p.workspace).launch(run);
  return run.error();
}

Plan additive_moments_plan(const AdditiveMoments& p) {
  Plan plan;
  Launcher run(plan);
  const Sweep sweep(p, p.workspace);
  sweep.launch(run);
  plan.workspace = sweep.workspace().sections();
  return plan;
}

}  // namespace cuda
}  // namespace ck
