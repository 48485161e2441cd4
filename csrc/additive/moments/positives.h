// The backward of additive_moments: gradients of L, which the forward made, and the positives of J.
//
//   t_i = a_i + b_{first_positive+i}
//   da_i = g_l dL/da_i + (g_j / n) w phi'(t_i)    db_{first_positive+i} the same    dw = g_l dL/dw + (g_j / n) sum_i phi(t_i)
//
// dw is summed over blocks of rows, and then over the blocks in order, so the number of threads does not matter.
#pragma once

#include "additive/moments/additive_moments.h"
#include "additive/sweep.h"

namespace ck {
namespace CK_ISA {
namespace {

template <class Phi>
class Positives {
 public:
  Positives(const AdditiveMomentsBackward& p, const Phi& phi)
      : p(p),
        phi(phi),
        width(round_up(p.h, CHUNK)),
        blocks((p.n + BLOCK - 1) / BLOCK),
        weight(p.groups * width),
        sum(p.groups * blocks * width) {
    for (int64_t group = 0; group < p.groups; group++)
      for (int64_t k = 0; k < p.h; k++) weight.data[group * width + k] = of_j(group) * p.w[group * p.h + k];
  }

  void run() const {
#pragma omp parallel num_threads(p.threads)
    {
#pragma omp for
      for (int64_t task = 0; task < p.groups * blocks; task++) rows(task / blocks, task % blocks);
#pragma omp for nowait
      for (int64_t task = 0; task < p.groups * p.m; task++) column_alone(task / p.m, task % p.m);
#pragma omp for
      for (int64_t group = 0; group < p.groups; group++) weights(group);
    }
  }

 private:
  static constexpr int64_t BLOCK = 64;  // rows whose phi are added in float32
  struct Units {
    float a[CHUNK], b[CHUNK], of_l[CHUNK], gradient[CHUNK], out[CHUNK];
  };

  float of_j(int64_t group) const { return p.g_j ? p.g_j[group] / p.n : 0.0f; }
  float of_l(int64_t group) const { return p.g_l ? p.g_l[group] : 0.0f; }

  // One block of rows of one critic, with their positives.
  void rows(int64_t group, int64_t block) const {
    float* total = sum.data + (group * blocks + block) * width;
    const int64_t last = smaller(p.n, (block + 1) * BLOCK);
    Units t = {};
    for (int64_t i = block * BLOCK; i < last; i++)
      for (int64_t k = 0; k < p.h; k += CHUNK) {
        const int64_t at_a = (group * p.n + i) * p.h + k, at_b = (group * p.m + p.first_positive + i) * p.h + k;
        const int64_t count = smaller(CHUNK, p.h - k);
        positive(at_a, at_b, count, weight.data + group * width + k, total + k, t);
        if (p.da) add(p.da_of_l, at_a, count, of_l(group), t, p.da);
        if (p.db) add(p.db_of_l, at_b, count, of_l(group), t, p.db);
      }
  }

  // The gradient of a column that is nobody's positive.
  void column_alone(int64_t group, int64_t j) const {
    if (!p.db || (j >= p.first_positive && j < p.first_positive + p.n)) return;
    Units t = {};
    for (int64_t k = 0; k < p.h; k += CHUNK)
      add(p.db_of_l, (group * p.m + j) * p.h + k, smaller(CHUNK, p.h - k), of_l(group), t, p.db);
  }

  void weights(int64_t group) const {
    for (int64_t k = 0; p.dw && k < p.h; k++) {
      double total = 0.0;
      for (int64_t block = 0; block < blocks; block++) total += sum.data[(group * blocks + block) * width + k];
      const int64_t at = group * p.h + k;
      p.dw[at] = of_l(group) * p.dw_of_l[at] + static_cast<float>(of_j(group) * total);
    }
  }

  // t.gradient = weight phi'(t) and total += phi(t), of units of one positive.
  void positive(int64_t at_a, int64_t at_b, int64_t count, const float* weight, float* total, Units& t) const {
    const float *a = units(p.a, at_a, count, t.a), *b = units(p.b, at_b, count, t.b);
    for (int k = 0; k < CHUNK; k += VL) {
      const ValueAndSlope f = phi(load(a + k) + load(b + k));
      store(t.gradient + k, load(weight + k) * f.slope);
      store(total + k, load(total + k) + f.value);
    }
  }

  // out = g_l of_l + t.gradient, from number `at` on.
  void add(const void* of_l, int64_t at, int64_t count, float g_l, Units& t, void* out) const {
    const float* x = units(of_l, at, count, t.of_l);
    for (int k = 0; k < CHUNK; k += VL) store(t.out + k, g_l * load(x + k) + load(t.gradient + k));
    write(t.out, at, count, p.features_dtype, out);
  }

  // CHUNK numbers, the first `count` those from `at` on: where they are, or in `buffer`.
  const float* units(const void* data, int64_t at, int64_t count, float* buffer) const {
    const float* x = Features{data, p.features_dtype}.read(at, count, buffer);
    if (x == buffer || count == CHUNK) return x;
    memcpy(buffer, x, count * sizeof(float));
    return buffer;
  }

  const AdditiveMomentsBackward& p;
  const Phi phi;
  const int64_t width, blocks;  // h, padded; of rows
  ZeroBuffer<float> weight;     // (groups, width) g_j / n w
  ZeroBuffer<float> sum;        // (groups, blocks, width) phi
};

}  // namespace
}  // namespace CK_ISA
}  // namespace ck
