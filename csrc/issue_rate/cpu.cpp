#include "issue_rate/issue_rate.h"

#include "common/simd.h"

namespace ck {
namespace CK_ISA {
namespace {

// The compiler knows nothing of v's value after this, so it can neither drop nor merge what made it.
#if defined(__AVX512F__)
#define CK_OPAQUE(v) asm volatile("" : "+v"(v))
#elif defined(__x86_64__)
#define CK_OPAQUE(v) asm volatile("" : "+x"(v))
#elif defined(__aarch64__)
#define CK_OPAQUE(v) asm volatile("" : "+w"(v))
#else
#define CK_OPAQUE(v) asm volatile("" : "+m"(v))
#endif

// Half of them multiply, because a Zen 4 multiplies on one half of its pipes, and adds and takes maxima on the other; additions
// borrow from multiply-adds there, not from multiplications.  Chains of so many keep four pipes busy with results that take up
// to 4 cycles, and with `one` they fill 16 registers.  An array of them would be put in memory.
constexpr int64_t INSTRUCTIONS = 16;

void spin(int64_t iterations) {
  vf one = broadcast(1.0f);
  CK_OPAQUE(one);
  vf p0 = one, p1 = one, p2 = one, p3 = one, p4 = one, p5 = one, p6 = one, p7 = one;
  vf m0 = one, m1 = one, m2 = one;
  vf s0 = one, s1 = one, s2 = one, s3 = one;
#define CK_STEP(p, m, q, s) \
  p = p * one;              \
  m = vmax(m, one);         \
  q = q * one;              \
  s = s + one;              \
  CK_OPAQUE(p);             \
  CK_OPAQUE(m);             \
  CK_OPAQUE(q);             \
  CK_OPAQUE(s)
  for (int64_t n = 0; n < iterations; n++) {
    CK_STEP(p0, m0, p1, s0);
    CK_STEP(p2, m1, p3, s1);
    CK_STEP(p4, m2, p5, s2);
    CK_STEP(p6, m0, p7, s3);
  }
#undef CK_STEP
}

}  // namespace

void issue_rate(const IssueRate& p) {
#pragma omp parallel num_threads(p.threads)
  spin(p.iterations);
  *p.issued = p.iterations * INSTRUCTIONS;
}

}  // namespace CK_ISA
}  // namespace ck
