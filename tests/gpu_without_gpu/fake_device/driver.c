// libcuda, the part of it that Triton and PyTorch ask for.
#include <cuda.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "fake.h"
#undef cuCtxGetDevice

// A kernel as Triton loads it.  Sizes of parameters: a test says them, so that fake_bytes can keep what is passed.
typedef struct { char name[120]; int parameters; int sizes[96]; } Function;
EXPORT uint8_t fake_bytes[1 << 22];
EXPORT size_t fake_bytes_length = 0;
EXPORT int fake_capturing = 0;

EXPORT void fake_register(CUfunction f, int parameters, const int* sizes) {
  Function* function = (Function*)f;
  function->parameters = parameters;
  memcpy(function->sizes, sizes, sizeof(int) * (size_t)parameters);
}

EXPORT void fake_keep(const void* p, size_t size) {
  if (!fake_capturing) return;
  if (fake_bytes_length + size > sizeof fake_bytes) abort();
  memcpy(fake_bytes + fake_bytes_length, p, size);
  fake_bytes_length += size;
}

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** parameters, void** extra) {
  const Function* function = (const Function*)f;
  __atomic_fetch_add(&fake_counts[DRIVER_KERNELS], 1, __ATOMIC_RELAXED);
  fake_note(function->name);
  if (fake_capturing) {
    const unsigned sizes[] = {c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ, c->sharedMemBytes};
    fake_keep(function->name, sizeof function->name);
    fake_keep(sizes, sizeof sizes);
    fake_keep(&c->hStream, sizeof c->hStream);
    for (int i = 0; i < function->parameters; i++) fake_keep(parameters[i], (size_t)function->sizes[i]);
  }
  return CUDA_SUCCESS;
}
EXPORT CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, CUstream stream, void** parameters, void** extra) {
  CUlaunchConfig config = {gx, gy, gz, bx, by, bz, shared, stream};
  return cuLaunchKernelEx(&config, f, parameters, extra);
}
EXPORT CUresult cuLaunchCooperativeKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, CUstream stream, void** parameters) {
  return cuLaunchKernel(f, gx, gy, gz, bx, by, bz, shared, stream, parameters, 0);
}
// The map is what it was made from, 16 words: two that differ in one argument differ.
EXPORT CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* shape, const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  uint64_t* words = (uint64_t*)map;
  if (rank > 2) return CUDA_ERROR_NOT_SUPPORTED;
  __atomic_fetch_add(&fake_counts[TENSOR_MAPS], 1, __ATOMIC_RELAXED);
  memset(map, 0, sizeof *map);
  words[0] = type, words[1] = rank, words[2] = (uint64_t)address;
  for (cuuint32_t k = 0; k < rank; k++) words[3 + k] = shape[k], words[5 + k] = box[k], words[7 + k] = steps[k];
  for (cuuint32_t k = 0; k + 1 < rank; k++) words[9 + k] = strides[k];
  words[11] = interleave, words[12] = swizzle, words[13] = promotion, words[14] = fill;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
EXPORT CUresult cuDriverGetVersion(int* version) { *version = 13000; return CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGetCount(int* count) { *count = fake_devices(); return CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGet(CUdevice* device, int i) { *device = i; return CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1;
  }
  return CUDA_SUCCESS;
}
static const CUcontext CONTEXT = (CUcontext)0x7000;
EXPORT CUresult cuCtxGetCurrent(CUcontext* context) { *context = CONTEXT; return CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetDevice(CUdevice* device) { *device = fake_current(); return CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetDevice_v2(CUdevice* device, CUcontext context) { *device = 0; return CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) { *context = CONTEXT; return CUDA_SUCCESS; }
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) { *flags = 0, *active = 1; return CUDA_SUCCESS; }
EXPORT CUresult cuModuleLoadData(CUmodule* module, const void* image) { *module = (CUmodule)0x8000; return CUDA_SUCCESS; }
EXPORT CUresult cuModuleGetFunction(CUfunction* f, CUmodule module, const char* name) {
  Function* function = calloc(1, sizeof *function);
  strncpy(function->name, name, sizeof function->name - 1);
  *f = (CUfunction)function;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction f) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGetErrorString(CUresult error, const char** text) { *text = error ? "an error of the fake device" : "no error"; return CUDA_SUCCESS; }
EXPORT CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr p) { *(CUdeviceptr*)data = p; return CUDA_SUCCESS; }
EXPORT CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction f, const CUlaunchConfig* config) { *clusters = 1; return CUDA_SUCCESS; }
