// Part of common/cuda/launch.h.
#include <cuda_runtime_api.h>

#include "common/cuda/launch.h"

namespace ck {
namespace cuda {

std::string error_text(int error) {
  const cudaError_t e = static_cast<cudaError_t>(error);
  return std::string("CUDA: ") + cudaGetErrorString(e) + " (" + cudaGetErrorName(e) + ")";
}

}  // namespace cuda
}  // namespace ck
