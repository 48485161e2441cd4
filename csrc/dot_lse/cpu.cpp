// dot_lse on the CPU: the sweeps of common/dot.h.
#include "dot_lse.h"

#include "common/dot.h"

namespace ck {
namespace CK_ISA {

void dot_lse_forward(const DotForward& p) { dot_forward(p); }

// An empty sum has the logarithm -infinity and no gradient: weight 0 beside any finite number.
static void clean(int64_t count, const float* lse, const float* weight, float* lse_out, float* weight_out) {
  for (int64_t i = 0; i < count; i++) {
    const bool empty = lse[i] == neg_inf();
    lse_out[i] = empty ? 0 : lse[i];
    weight_out[i] = empty ? 0 : weight[i];
  }
}

void dot_lse_backward(const DotBackward& p) {
  const int64_t cols = p.col_lse ? p.m : 0;
  Buffer<float> row_lse(p.n), row_weight(p.n), col_lse(cols), col_weight(cols);
  clean(p.n, p.row_lse, p.row_weight, row_lse.data, row_weight.data);
  clean(cols, p.col_lse, p.col_weight, col_lse.data, col_weight.data);
  DotBackward q = p;
  q.row_lse = row_lse.data;
  q.row_weight = row_weight.data;
  q.col_lse = col_lse.data;
  q.col_weight = col_weight.data;
  dot_backward(q);
}

}  // namespace CK_ISA
}  // namespace ck
