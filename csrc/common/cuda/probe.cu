// Part of common/cuda/launch.h.
#include <cuda_runtime_api.h>

#include "common/cuda/launch.h"

namespace ck {
namespace cuda {
namespace {

__global__ void probe_kernel() {}

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

}  // namespace

std::string refusal(int device) {
  int before = -1, runtime = 0, driver = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  cudaFuncAttributes attributes;  // asking for them loads the machine code, or has the driver make it from PTX
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (before >= 0) cudaSetDevice(before);
  cudaGetLastError();  // the next launch shall not find this one's
  if (error == cudaSuccess) return "";
  cudaRuntimeGetVersion(&runtime);
  cudaDriverGetVersion(&driver);
  const std::string has = driver ? "the driver's CUDA is " + version(driver) : "no driver was found";
  return error_text(error) + "; the kernels were built with CUDA " + version(runtime) + ", " + has;
}

}  // namespace cuda
}  // namespace ck
