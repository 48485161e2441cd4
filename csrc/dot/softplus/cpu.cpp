// dot_softplus on the CPU: one pass of dot/sweep.h, whose epilogue turns scores into softplus, its sums, and G.
//
//     t_ij = +-(scale s_ij + bias)     R_i = sum_j softplus(t_ij)     C_j = sum_i softplus(t_ij)
//     G_ij = +-sigmoid(t_ij) (u_i + v_j)
//
// Pairs that take no part have the score -infinity: softplus and sigmoid of it are 0, without a mask in the sums.
#include "dot/softplus/dot_softplus.h"

#include "additive/activations.h"
#include "dot/sweep.h"

namespace ck {
namespace CK_ISA {

struct Softplus {
  static constexpr bool kRowSums = true;
  static constexpr bool needs_scores = true;
  const DotSoftplus& p;
  const float* col_weight;    // (padded m,)
  double *row_sum, *col_sum;  // (n,), (padded m,)
  double* block_bias;         // (blocks of columns,) sum of G

  void tile(const TileShape& t, float* s, float* row_sums) const {
    const bool attract = p.row_ids && p.attract;
    mask(p, true, !attract, t, s, nullptr);
    if (p.row_weight)
      attract ? reduce<true, true>(t, s, row_sums) : reduce<true, false>(t, s, row_sums);
    else
      attract ? reduce<false, true>(t, s, row_sums) : reduce<false, false>(t, s, row_sums);
  }

  void add_row(int64_t i, double sum) const { row_sum[i] += sum; }
  Blocks<const float> soon(int64_t, int64_t) const { return {}; }

 private:
  // Of a row of the tile; the last for the padding, where softplus and sigmoid are 0.
  int64_t problem_row(const TileShape& t, int64_t r) const { return t.first_row + (r < t.rows ? r : t.rows - 1); }

  template <bool GRADIENTS, bool ATTRACT>
  void reduce(const TileShape& t, float* s, float* row_sums) const {
    constexpr int W = kBlock / VL, TOGETHER = VL == 16 ? 8 : 4;  // vectors of a row; side by side in softplus
    const float scale = p.scale, shift = p.bias;
    int32_t ids[kBlock];
    if (ATTRACT) column_ids(p, t, ids);
    vf sums[W], bias[W], weight[W];
    for (int v = 0; v < W; v++) sums[v] = bias[v] = vf{}, weight[v] = load(col_weight + t.first_col + v * VL);
    for (int64_t r0 = 0; r0 < t.padded_rows; r0 += VL, s += VL * kBlock) {
      vf row[VL] = {};  // its lanes are summed for VL rows at once
      for (int q = 0; q < VL * W; q += TOGETHER) {
        Vectors<TOGETHER> l;
        vi same[TOGETHER] = {};
        for (int n = 0; n < TOGETHER; n++) {
          l.v[n] = load(s + (q + n) * VL) * scale + shift;
          if (!ATTRACT) continue;
          same[n] =
              (load(ids + (q + n) % W * VL) == p.row_ids[problem_row(t, r0 + (q + n) / W)]) & (l.v[n] > neg_inf());
          l.v[n] = select(same[n], -l.v[n], l.v[n]);
        }
        const auto e = softplus(l);
        for (int n = 0; n < TOGETHER; n++) {
          const int r = (q + n) / W, v = (q + n) % W;
          sums[v] += e.value.v[n];
          row[r] += e.value.v[n];
          if (!GRADIENTS) continue;
          const vf g = e.slope.v[n] * (p.row_weight[problem_row(t, r0 + r)] + weight[v]);
          const vf signed_g = ATTRACT ? select(same[n], -g, g) : g;
          store(s + (q + n) * VL, signed_g);
          bias[v] += signed_g;
        }
      }
      reduce_add_each(row, row_sums + r0);
    }
    float lanes[kBlock];
    for (int v = 0; v < W; v++) store(lanes + v * VL, sums[v]);
    for (int c = 0; c < kBlock; c++) col_sum[t.first_col + c] += lanes[c];
    if (!GRADIENTS) return;
    for (int v = 0; v < W; v++) store(lanes + v * VL, bias[v]);
    for (int c = 0; c < kBlock; c++) block_bias[t.first_col / kBlock] += lanes[c];
  }
};

static void fill_nan(void* out, int32_t dtype, int64_t count) {
  const float nan = __builtin_nanf("");
  for (int64_t k = 0; out && k < count; k++) {
    if (dtype == kBFloat16)
      from_float(nan, static_cast<bf16*>(out) + k);
    else if (dtype == kFloat16)
      from_float(nan, static_cast<fp16*>(out) + k);
    else
      from_float(nan, static_cast<float*>(out) + k);
  }
}

void dot_softplus(const DotSoftplus& p) {
  if (!(score_bound(p) + ::fabsf(p.bias) < 1e37f)) {  // NaN or infinity somewhere, or logits past float32
    fill_nan(p.row_sum, p.n), fill_nan(p.col_sum, p.m);
    fill_nan(p.dx, p.dtype, p.n * p.d), fill_nan(p.dy, p.dtype, p.m * p.d);
    if (p.row_weight) *p.dscale = *p.dbias = __builtin_nanf("");
    return;
  }
  const int64_t mp = pad32(p.m);
  ZeroBuffer<double> row_sum(p.n), col_sum(mp), block_bias(mp / kBlock);
  ZeroBuffer<float> col_weight(mp);
  if (p.col_weight) std::memcpy(col_weight.data, p.col_weight, p.m * sizeof(float));
  gradient_pass(p, Softplus{p, col_weight.data, row_sum.data, col_sum.data, block_bias.data});
  for (int64_t i = 0; i < p.n; i++) p.row_sum[i] = static_cast<float>(row_sum.data[i]);
  for (int64_t j = 0; p.col_sum && j < p.m; j++) p.col_sum[j] = static_cast<float>(col_sum.data[j]);
  if (!p.row_weight) return;
  double dbias = 0;
  for (int64_t b = 0; b < mp / kBlock; b++) dbias += block_bias.data[b];
  *p.dbias = static_cast<float>(dbias);
}

}  // namespace CK_ISA
}  // namespace ck
