// additive_shifts on the CPU: k n h pairs and units in each direction, straight from the rows of a and b.  The k rows that
// a row meets are its neighbour's but one, so they come from cache, and nothing is packed.
//
// Forward: the units of a row lie in the lanes, for SHIFTS shifts at a time.  Backward: a row of a gradient is summed over
// the shifts in registers, VECTORS vectors of units at a time; da, with dw's sums, and then db, which computes phi' again
// rather than keep it.  Rows are finite inside the sums: what is not is found first, one number for each row, and added.
#include "additive/shifts/additive_shifts.h"

#include "common/buffer.h"
#include "additive/with_activation.h"

namespace ck {
namespace CK_ISA {
namespace {

constexpr int SHIFTS = 4;
constexpr int VECTORS = VL == 16 ? 4 : 2;
constexpr int64_t MAX_BLOCKS = 256;  // of rows of a, each with its sum for dw
constexpr int64_t LEAST_ROWS = 16;   // of a block: the sums for dw stay small beside a

// `count` < VL numbers, then zeros.
inline vf load_part(const float* x, int64_t count) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), x);
#elif defined(__AVX2__)
  return _mm256_maskload_ps(x, reinterpret_cast<__m256i>(iota() < static_cast<int32_t>(count)));
#else
  float lane[VL] = {};
  for (int64_t i = 0; i < count; i++) lane[i] = x[i];
  return load(lane);
#endif
}

template <bool PART>
inline vf load_units(const float* x, int64_t count) {
  return PART ? load_part(x, count) : load(x);
}

// 0 for a row of finite numbers, otherwise NaN.
float row_taint(const float* x, int64_t h) {
  vf sum{};
  int64_t u = 0;
  for (; u + VL <= h; u += VL) sum += load(x + u) * 0.0f;
  if (u < h) sum += load_part(x + u, h - u) * 0.0f;
  return reduce_add(sum);
}

class Shifts {
 protected:
  explicit Shifts(const AdditiveShifts& p) : p(p), shift((p.first % p.m + p.m) % p.m), taint_a(p.n), taint_b(p.m) {
#pragma omp parallel num_threads(p.threads)
    {
#pragma omp for nowait
      for (int64_t i = 0; i < p.n; i++) taint_a.data[i] = row_taint(p.a + i * p.h, p.h);
#pragma omp for
      for (int64_t j = 0; j < p.m; j++) taint_b.data[j] = row_taint(p.b + j * p.h, p.h);
    }
  }

  // The row of b beside row i of a at the first shift, and the one beside a row's partner at the next.
  int64_t first_partner(int64_t i) const { return (i + shift) % p.m; }
  int64_t after(int64_t j) const { return j + 1 == p.m ? 0 : j + 1; }

  const AdditiveShifts& p;
  const int64_t shift;  // 0 <= shift < m
  Buffer<float> taint_a, taint_b;
};

template <class Phi>
class Forward : Shifts {
 public:
  Forward(const AdditiveShifts& p, const Phi& phi) : Shifts(p), phi(phi) {}

  void run() const {
#pragma omp parallel for num_threads(p.threads)
    for (int64_t i = 0; i < p.n; i++) {
      int64_t j = first_partner(i), r = 0;
      for (; r + SHIFTS <= p.k; r += SHIFTS) j = scores<SHIFTS>(i, j, r);
      for (; r < p.k; r++) j = scores<1>(i, j, r);
    }
  }

 private:
  // Scores of row i on COUNT shifts from r on, the first with row j of b; returns the row of the next shift.
  template <int COUNT>
  int64_t scores(int64_t i, int64_t j, int64_t r) const {
    const float *a = p.a + i * p.h, *b[COUNT];
    float taint[COUNT];
    for (int s = 0; s < COUNT; s++) {
      b[s] = p.b + j * p.h;
      taint[s] = taint_a.data[i] + taint_b.data[j];
      j = after(j);
    }
    vf sum[COUNT] = {};
    int64_t u = 0;
    for (; u + VL <= p.h; u += VL) add<COUNT, false>(a, b, u, VL, sum);
    if (u < p.h) add<COUNT, true>(a, b, u, p.h - u, sum);
    for (int s = 0; s < COUNT; s++) p.scores[(r + s) * p.n + i] = reduce_add(sum[s]) + taint[s];
    return j;
  }

  template <int COUNT, bool PART>
  void add(const float* a, const float* const* b, int64_t u, int64_t count, vf* sum) const {
    const vf x = load_units<PART>(a + u, count), weight = load_units<PART>(p.w + u, count);
#pragma GCC unroll 4
    for (int s = 0; s < COUNT; s++) sum[s] += weight * phi(x + load_units<PART>(b[s] + u, count)).value;
  }

  const Phi phi;
};

template <class Phi>
class Backward : Shifts {
 public:
  Backward(const AdditiveShifts& p, const Phi& phi)
      : Shifts(p), phi(phi), blocks(count_blocks(p.n)), weights(p.need_w ? blocks * p.h : 0) {}

  void run() const {
#pragma omp parallel num_threads(p.threads)
    {
      if (p.need_a || p.need_w) {
#pragma omp for schedule(dynamic) nowait
        for (int64_t block = 0; block < blocks; block++)
          for (int64_t i = block * p.n / blocks; i < (block + 1) * p.n / blocks; i++) {
            if (p.need_w)
              row<false, true>(i, weights.data + block * p.h);
            else
              row<false, false>(i, nullptr);
          }
      }
      if (p.need_b) {
#pragma omp for
        for (int64_t j = 0; j < p.m; j++) row<true, false>(j, nullptr);
      }
    }
    if (!p.need_w) return;
    for (int64_t u = 0; u < p.h; u++) {
      double sum = 0.0;
      for (int64_t block = 0; block < blocks; block++) sum += weights.data[block * p.h + u];
      p.dw[u] = static_cast<float>(sum);
    }
  }

 private:
  static int64_t count_blocks(int64_t n) {
    const int64_t blocks = (n + LEAST_ROWS - 1) / LEAST_ROWS;
    return blocks < MAX_BLOCKS ? blocks : MAX_BLOCKS;
  }

  // Row `own` of b (OF_B) or of a, and the row of the other that it meets at the first shift.
  struct Row {
    const float* x;
    float* gradient;  // null where only dw is needed
    double* weights;  // (h,) of the block, OF_B has none
    int64_t own, other;
    float taint;
  };

  // f(r, other, g) for the shifts r at which the row meets a row of the other side, in order; n <= m, so b's may meet none.
  template <bool OF_B, class F>
  void each_shift(int64_t own, int64_t other, const F& f) const {
    const float* g = p.g;
    for (int64_t r = 0; r < p.k; r++, g += p.n) {
      if (!OF_B)
        f(other, g[own]);
      else if (other < p.n)
        f(other, g[other]);
      if (OF_B)
        other = other == 0 ? p.m - 1 : other - 1;
      else
        other = after(other);
    }
  }

  // A row of da, and the row's part of dw (WEIGHTS), or a row of db (OF_B).
  template <bool OF_B, bool WEIGHTS>
  void row(int64_t own, double* dw) const {
    const int64_t other = OF_B ? (own + p.m - shift) % p.m : first_partner(own);
    float* const gradient = OF_B ? p.db : p.need_a ? p.da : nullptr;
    Row t{(OF_B ? p.b : p.a) + own * p.h, gradient ? gradient + own * p.h : nullptr, dw, own, other, 0.0f};
    bool alone = true;
    each_shift<OF_B>(own, other, [&](int64_t met, float g) {
      alone = false;
      t.taint += (OF_B ? taint_a : taint_b).data[met] + g * 0.0f;
    });
    if (alone) {
      if (t.gradient) memset(t.gradient, 0, p.h * sizeof(float));
      return;
    }
    t.taint += (OF_B ? taint_b : taint_a).data[own];
    int64_t u = 0;
    for (; u + VECTORS * VL <= p.h; u += VECTORS * VL) units<OF_B, WEIGHTS, VECTORS, false>(t, u, VL);
    for (; u + VL <= p.h; u += VL) units<OF_B, WEIGHTS, 1, false>(t, u, VL);
    if (u < p.h) units<OF_B, WEIGHTS, 1, true>(t, u, p.h - u);
  }

  // COUNT vectors of a row from unit u on; `count` lanes of them if they are one PART.
  template <bool OF_B, bool WEIGHTS, int COUNT, bool PART>
  void units(const Row& t, int64_t u, int64_t count) const {
    const float* const others = (OF_B ? p.a : p.b) + u;
    vf x[COUNT], slopes[COUNT], values[COUNT];
    for (int v = 0; v < COUNT; v++) {
      x[v] = load_units<PART>(t.x + u + v * VL, count);
      slopes[v] = values[v] = broadcast(t.taint);
    }
    each_shift<OF_B>(t.own, t.other, [&](int64_t met, float g) {
      const float* const y = others + met * p.h;
      const vf weight = broadcast(g);
#pragma GCC unroll 4
      for (int v = 0; v < COUNT; v++) {
        const ValueAndSlope f = phi(x[v] + load_units<PART>(y + v * VL, count));
        slopes[v] += weight * f.slope;
        if (WEIGHTS) values[v] += weight * f.value;
      }
    });
    for (int v = 0; v < COUNT; v++) {
      const int64_t at = u + v * VL;
      float lane[VL];
      if (t.gradient) {
        store(lane, load_units<PART>(p.w + at, count) * slopes[v]);
        memcpy(t.gradient + at, lane, count * sizeof(float));
      }
      if (WEIGHTS) {
        store(lane, values[v]);
        for (int64_t i = 0; i < count; i++) t.weights[at + i] += lane[i];
      }
    }
  }

  const Phi phi;
  const int64_t blocks;
  ZeroBuffer<double> weights;  // (blocks, h)
};

template <class Phi>
void forward(const AdditiveShifts& p, const Phi& phi) {
  Forward<Phi>(p, phi).run();
}

template <class Phi>
void backward(const AdditiveShifts& p, const Phi& phi) {
  Backward<Phi>(p, phi).run();
}

}  // namespace

void additive_shifts_forward(const AdditiveShifts& p) {
  with_activation(p.activation, p.slope, [&p](const auto& phi) { forward(p, phi); });
}

void additive_shifts_backward(const AdditiveShifts& p) {
  with_activation(p.activation, p.slope, [&p](const auto& phi) { backward(p, phi); });
}

}  // namespace CK_ISA
}  // namespace ck
