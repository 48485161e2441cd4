// What a plan calls: the CUDA driver and cuBLAS, found at run time in the process that PyTorch made.
//
// No CUDA header: the build needs no toolkit, and one build serves every driver.  The declarations are those of cuda.h and
// cublas_api.h, whose binary interface does not change.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ck {
namespace plans {

struct alignas(64) TensorMap {  // CUtensorMap
  uint64_t words[16];
};

// Functions of libcuda.so.1; 0 is success.
struct Driver {
  int (*launch)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                unsigned block_z, unsigned shared, void* stream, void** parameters, void** extra);
  int (*encode_tiled)(TensorMap* map, int dtype, uint32_t rank, void* address, const uint64_t* shape,
                      const uint64_t* strides, const uint32_t* box, const uint32_t* steps, int interleave, int swizzle,
                      int promotion, int fill);  // null before CUDA 12
  int (*context)(void** context);
  int (*set_context)(void* context);
  int (*retain_primary)(void** context, int device);
  int (*error_text)(int error, const char** text);
  int version;  // 13010 is 13.1
};

// Of the process.  Throws std::runtime_error where there is no libcuda.so.1 or a function is missing.
const Driver& driver();

// Functions of the cuBLAS that PyTorch loaded; null where its symbols are not visible.
struct Blas {
  int (*gemm_ex)(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a, int dtype_a,
                 int lda, const void* b, int dtype_b, int ldb, const void* beta, void* c, int dtype_c, int ldc,
                 int compute, int algorithm);
  int (*sgemm)(void* handle, int op_a, int op_b, int m, int n, int k, const float* alpha, const float* a, int lda,
               const float* b, int ldb, const float* beta, float* c, int ldc);
  int (*set_math_mode)(void* handle, int mode);
};

const Blas& blas();

}  // namespace plans
}  // namespace ck
