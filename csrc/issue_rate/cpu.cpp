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

// a b + c in one instruction; where there is none, a b.
inline vf multiply_add(vf a, vf b, vf c) {
#if defined(__FMA__) || defined(__aarch64__)
  return a * b + c;
#else
  (void)c;
  return a * b;
#endif
}

// Half of them multiply, because a Zen 4 multiplies on one half of its pipes, and adds and takes maxima on the other.  Its four
// pipes of 8 lanes are kept busy by eight multiply-adds and four additions under way, which take 4 and 3 cycles; with `half`
// that fills 16 registers.  An array of them would be put in memory.
constexpr int64_t INSTRUCTIONS = 16;

void spin(int64_t iterations) {
  vf half = broadcast(0.5f);
  CK_OPAQUE(half);
  vf p0 = half, p1 = half, p2 = half, p3 = half, p4 = half, p5 = half, p6 = half, p7 = half;
  vf m0 = half, m1 = half, m2 = half;
  vf s0 = half, s1 = half, s2 = half, s3 = half;
#define CK_STEP(p, m, q, s)        \
  p = multiply_add(p, half, half); \
  m = vmax(m, half);               \
  q = multiply_add(q, half, half); \
  s = s + half;                    \
  CK_OPAQUE(p);                    \
  CK_OPAQUE(m);                    \
  CK_OPAQUE(q);                    \
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
