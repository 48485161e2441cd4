// The calls of cuBLAS that give something back; those that compute are made by build.py.
#include <stdint.h>
#include <string.h>

#include "fake.h"

EXPORT int cublasCreate_v2(void** handle) { *handle = (void*)0x5000; return 0; }
static int math_mode = 0;
EXPORT int cublasGetMathMode(void* handle, int* mode) { *mode = math_mode; return 0; }
EXPORT int cublasSetMathMode(void* handle, int mode) { math_mode = mode; return 0; }
EXPORT int cublasGetPointerMode_v2(void* handle, int* mode) { *mode = 0; return 0; }
EXPORT int cublasGetStream_v2(void* handle, void** stream) { *stream = 0; return 0; }
EXPORT int cublasLtMatmulDescCreate(void** p) { *p = (void*)0x6000; return 0; }
EXPORT int cublasLtMatmulPreferenceCreate(void** p) { *p = (void*)0x6000; return 0; }
EXPORT int cublasLtMatrixLayoutCreate(void** p) { *p = (void*)0x6000; return 0; }
EXPORT int cublasLtMatmulAlgoGetHeuristic(void* handle, void* operation, void* a, void* b, void* c, void* d, void* preference, int wanted, int64_t* results, int* found) {
  if (wanted > 0) memset(results, 0, 12 * sizeof *results);  // a cublasLtMatmulHeuristicResult_t is 96 bytes
  *found = 1;
  return 0;
}

// The matmuls that the losses run, with what they are told.
static void multiplied(const char* name, void* handle, const int* numbers, size_t count, const void* a, const void* b, const void* c, const float* alpha, const float* beta) {
  const void* addresses[] = {handle, a, b, c};
  __atomic_fetch_add(&fake_counts[GEMMS], 1, __ATOMIC_RELAXED);
  fake_note(name);
  fake_keep(name, strlen(name) + 1);
  fake_keep(numbers, count * sizeof *numbers);
  fake_keep(addresses, sizeof addresses);
  fake_keep(alpha, sizeof *alpha);
  fake_keep(beta, sizeof *beta);
}
EXPORT int cublasGemmEx(void* handle, int op_a, int op_b, int m, int n, int k, const float* alpha, const void* a, int dtype_a, int lda, const void* b, int dtype_b, int ldb, const float* beta, void* c, int dtype_c, int ldc, int compute, int algorithm) {
  const int numbers[] = {op_a, op_b, m, n, k, dtype_a, lda, dtype_b, ldb, dtype_c, ldc, compute, algorithm, math_mode};
  multiplied("cublasGemmEx", handle, numbers, sizeof numbers / sizeof *numbers, a, b, c, alpha, beta);
  return 0;
}
EXPORT int cublasSgemm_v2(void* handle, int op_a, int op_b, int m, int n, int k, const float* alpha, const float* a, int lda, const float* b, int ldb, const float* beta, float* c, int ldc) {
  const int numbers[] = {op_a, op_b, m, n, k, lda, ldb, ldc, math_mode};
  multiplied("cublasSgemm_v2", handle, numbers, sizeof numbers / sizeof *numbers, a, b, c, alpha, beta);
  return 0;
}
