// The backward of additive_moments: gradients of L, which the forward made, and the positives of J.
//
//   t_i = a_i + b_{first_positive+i}
//   da_i = g_l dL/da_i + (g_j / n) w phi'(t_i)    db_{first_positive+i} the same    dw = g_l dL/dw + (g_j / n) sum_i phi(t_i)
//
// A task is CHUNK units of all rows of one critic, so dw is summed in order whatever the number of threads.
#pragma once

#include "additive/moments/additive_moments.h"
#include "additive/sweep.h"

namespace ck {
namespace CK_ISA {
namespace {

template <class Phi>
class Positives {
 public:
  Positives(const AdditiveMomentsBackward& p, const Phi& phi) : p(p), phi(phi) {}

  void run() const {
    const int64_t chunks = (p.h + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(p.threads)
    for (int64_t task = 0; task < p.groups * chunks; task++) units(task / chunks, task % chunks * CHUNK);
  }

 private:
  static constexpr int64_t SUMMED = 64;  // rows whose phi are added in float32

  // Units [k0, k0 + CHUNK) of one critic.
  void units(int64_t group, int64_t k0) const {
    const int64_t count = smaller(CHUNK, p.h - k0), first_a = group * p.n * p.h + k0, first_b = group * p.m * p.h + k0;
    const float g_j = p.g_j ? p.g_j[group] / p.n : 0.0f, g_l = p.g_l ? p.g_l[group] : 0.0f;
    float of_j[CHUNK] = {}, weight[CHUNK] = {}, sum[CHUNK] = {};
    double total[CHUNK] = {};
    for (int64_t k = 0; k < count; k++) weight[k] = g_j * p.w[group * p.h + k0 + k];
    for (int64_t i = 0; i < p.n; i++) {
      const int64_t row_a = first_a + i * p.h, row_b = first_b + (p.first_positive + i) * p.h;
      positive(row_a, row_b, count, weight, of_j, sum);
      if (p.da) add(p.da_of_l, row_a, count, g_l, of_j, p.da);
      if (p.db) add(p.db_of_l, row_b, count, g_l, of_j, p.db);
      if ((i + 1) % SUMMED == 0 || i + 1 == p.n)
        for (int64_t k = 0; k < CHUNK; k++) total[k] += sum[k], sum[k] = 0.0f;
    }
    const float nothing[CHUNK] = {};
    for (int64_t j = 0; p.db && j < p.m; j++)
      if (j < p.first_positive || j >= p.first_positive + p.n)
        add(p.db_of_l, first_b + j * p.h, count, g_l, nothing, p.db);
    for (int64_t k = 0; p.dw && k < count; k++) {
      const int64_t at = group * p.h + k0 + k;
      p.dw[at] = g_l * p.dw_of_l[at] + static_cast<float>(g_j * total[k]);
    }
  }

  // of_j = weight phi'(t) and sum += phi(t), of one positive.
  void positive(int64_t row_a, int64_t row_b, int64_t count, const float* weight, float* of_j, float* sum) const {
    float buffer[2][CHUNK] = {};
    const float *a = chunk(p.a, row_a, count, buffer[0]), *b = chunk(p.b, row_b, count, buffer[1]);
    for (int k = 0; k < CHUNK; k += VL) {
      const ValueAndSlope f = phi(load(a + k) + load(b + k));
      store(of_j + k, load(weight + k) * f.slope);
      store(sum + k, load(sum + k) + f.value);
    }
  }

  // out = g_l of_l + of_j, from number `at` on.
  void add(const void* of_l, int64_t at, int64_t count, float g_l, const float* of_j, void* out) const {
    float buffer[CHUNK] = {}, result[CHUNK];
    const float* x = chunk(of_l, at, count, buffer);
    for (int k = 0; k < CHUNK; k += VL) store(result + k, g_l * load(x + k) + load(of_j + k));
    write(result, at, count, p.features_dtype, out);
  }

  // CHUNK numbers, `count` of them from `at` on and then what `buffer` has: where they are, or in `buffer`.
  const float* chunk(const void* data, int64_t at, int64_t count, float* buffer) const {
    const float* x = Features{data, p.features_dtype}.read(at, count, buffer);
    if (x == buffer || count == CHUNK) return x;
    memcpy(buffer, x, count * sizeof(float));
    return buffer;
  }

  const AdditiveMomentsBackward& p;
  const Phi phi;
};

}  // namespace
}  // namespace CK_ISA
}  // namespace ck
