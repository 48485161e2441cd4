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

// Where an instruction leaves its operands alone none waits for another; elsewhere chains that fill 16 registers keep the pipes
// busy with results that take up to 4 cycles, short of the peak where there are four pipes.  An array of them would be put in
// memory.
#if defined(__AVX2__) || defined(__aarch64__)
#define CK_OPERAND(v) other
#else
#define CK_OPERAND(v) v
#endif

// Half of them multiply, because a Zen 4 multiplies on one half of its pipes, and adds and takes maxima on the other.
constexpr int64_t INSTRUCTIONS = 16;

void spin(int64_t iterations) {
  vf one = broadcast(1.0f), other = broadcast(2.0f);
  CK_OPAQUE(one);
  CK_OPAQUE(other);
  vf p0 = one, p1 = one, p2 = one, p3 = one, p4 = one, p5 = one, p6 = one, p7 = one;
  vf m0 = one, m1 = one, m2 = one;
  vf s0 = one, s1 = one, s2 = one, s3 = one;
#define CK_ONE(v, expression) \
  CK_OPAQUE(one);             \
  v = expression;             \
  CK_OPAQUE(v)
#define CK_STEP(p, m, q, s)            \
  CK_ONE(p, CK_OPERAND(p) * one);      \
  CK_ONE(m, vmax(CK_OPERAND(m), one)); \
  CK_ONE(q, CK_OPERAND(q) * one);      \
  CK_ONE(s, CK_OPERAND(s) + one)
  for (int64_t n = 0; n < iterations; n++) {
    CK_STEP(p0, m0, p1, s0);
    CK_STEP(p2, m1, p3, s1);
    CK_STEP(p4, m2, p5, s2);
    CK_STEP(p6, m0, p7, s3);
  }
#undef CK_STEP
#undef CK_ONE
#undef CK_OPERAND
}

}  // namespace

void issue_rate(const IssueRate& p) {
#pragma omp parallel num_threads(p.threads)
  spin(p.iterations);
  *p.issued = p.iterations * INSTRUCTIONS;
}

}  // namespace CK_ISA
}  // namespace ck
