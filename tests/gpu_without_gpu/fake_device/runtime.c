// libcudart for a device that does nothing: PyTorch's host side runs for real on "cuda" tensors.
// Device memory is addresses that nobody may touch; a launch is counted and forgotten; a copy to the host is zeros.
// What PyTorch asks for and is not here returns success: build.py makes it.
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fake.h"

EXPORT long fake_counts[COUNTERS];
EXPORT int fake_logging = 0;
EXPORT char fake_names[1 << 20];
static size_t names_length = 0;

EXPORT void fake_reset(void) {
  memset(fake_counts, 0, sizeof fake_counts);
  names_length = fake_names[0] = 0;
}

EXPORT void fake_note(const char* name) {
  size_t room = sizeof fake_names - names_length;
  if (!fake_logging || room < 2) return;
  int wanted = snprintf(fake_names + names_length, room, "%.400s\n", name);
  names_length += (size_t)wanted < room ? (size_t)wanted : room - 1;
}

// ---- kernels: a hash table from the host's function to the device's name
#define SLOTS (1 << 20)
static const void* functions[SLOTS];
static const char* function_names[SLOTS];

static size_t slot_of(const void* function) {
  size_t slot = ((uintptr_t)function >> 4) & (SLOTS - 1);
  while (functions[slot] && functions[slot] != function) slot = (slot + 1) & (SLOTS - 1);
  return slot;
}

static cudaError_t launched(const void* function) {
  __atomic_fetch_add(&fake_counts[KERNELS], 1, __ATOMIC_RELAXED);
  const char* name = function_names[slot_of(function)];
  fake_note(name ? name : "?");
  return cudaSuccess;
}

EXPORT void** __cudaRegisterFatBinary(void* binary) { static void* handle; return &handle; }
EXPORT void __cudaRegisterFatBinaryEnd(void** handle) {}
EXPORT void __cudaUnregisterFatBinary(void** handle) {}
EXPORT char __cudaInitModule(void** handle) { return 1; }
EXPORT void __cudaRegisterVar(void** handle, char* host, char* device, const char* name, int ext, size_t size, int constant, int global) {}
EXPORT void __cudaRegisterFunction(void** handle, const char* host, char* device, const char* name, int limit, void* tid, void* bid, void* block, void* grid, int* warp) {
  size_t slot = slot_of(host);
  functions[slot] = host;
  function_names[slot] = name;
}
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) { *kernel = (cudaKernel_t)function; return cudaSuccess; }
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t stream) { return launched(kernel); }
EXPORT cudaError_t __cudaLaunchKernel_ptsz(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t stream) { return launched(kernel); }
EXPORT cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t stream) { return launched(function); }
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** args) { return launched(function); }
static __thread struct { dim3 grid, block; size_t shared; cudaStream_t stream; } pushed;
EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  pushed.grid = grid, pushed.block = block, pushed.shared = shared, pushed.stream = stream;
  return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *(cudaStream_t*)stream = pushed.stream;
  return cudaSuccess;
}
EXPORT cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* a, const void* function) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->binaryVersion = a->ptxVersion = 90;
  return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function, int threads, size_t shared, unsigned flags) { *blocks = 8; return cudaSuccess; }
EXPORT cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) { *address = (void*)0x1000; return cudaSuccess; }

// ---- the device: an H200
static __thread int current = 0;
int fake_devices(void) {
  const char* wanted = getenv("FAKE_DEVICES");
  return wanted ? atoi(wanted) : 1;
}
int fake_current(void) { return current; }
EXPORT cudaError_t cudaGetDeviceCount(int* count) { *count = fake_devices(); return cudaSuccess; }
EXPORT cudaError_t cudaGetDevice(int* device) { *device = current; return cudaSuccess; }
EXPORT cudaError_t cudaSetDevice(int device) { current = device; return cudaSuccess; }
EXPORT cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "Fake H200");
  p->major = 9, p->minor = 0, p->multiProcessorCount = 132, p->warpSize = 32, p->l2CacheSize = 60 << 20;
  p->totalGlobalMem = 150000000000UL, p->totalConstMem = 65536, p->memoryBusWidth = 6144;
  p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = 232448, p->sharedMemPerMultiprocessor = 233472;
  p->reservedSharedMemPerBlock = 1024, p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048, p->maxBlocksPerMultiProcessor = 32;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->unifiedAddressing = p->concurrentKernels = p->cooperativeLaunch = 1, p->textureAlignment = 512;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attribute, int device) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 233472; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    default: *value = 1;
  }
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceCanAccessPeer(int* can, int a, int b) { *can = 0; return cudaSuccess; }
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { *least = 0, *greatest = -5; return cudaSuccess; }
EXPORT cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int device) { snprintf(id, length, "0000:0%d:00.0", device); return cudaSuccess; }
EXPORT cudaError_t cudaDriverGetVersion(int* version) { *version = 13000; return cudaSuccess; }
EXPORT cudaError_t cudaRuntimeGetVersion(int* version) { *version = 13000; return cudaSuccess; }
EXPORT const char* cudaGetErrorString(cudaError_t error) { return error ? "an error of the fake device" : "no error"; }
EXPORT const char* cudaGetErrorName(cudaError_t error) { return error ? "fakeError" : "cudaSuccess"; }
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version, unsigned long long flags, enum cudaDriverEntryPointQueryResult* result) {
  extern int fake_success(void);
  *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) *function = (void*)fake_success;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
EXPORT int fake_success(void) { return 0; }

// ---- memory
static const uintptr_t BOTTOM = 0x200000000000UL;
static uintptr_t top = 0x200000000000UL;
EXPORT cudaError_t cudaMalloc(void** p, size_t size) {
  const uintptr_t granularity = 2UL << 20;
  __atomic_fetch_add(&fake_counts[MALLOCS], 1, __ATOMIC_RELAXED);
  *p = (void*)__atomic_fetch_add(&top, (size + granularity) & ~(granularity - 1), __ATOMIC_RELAXED);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMallocAsync(void** p, size_t size, cudaStream_t stream) { return cudaMalloc(p, size); }
EXPORT cudaError_t cudaFree(void* p) { return cudaSuccess; }
EXPORT cudaError_t cudaFreeAsync(void* p, cudaStream_t stream) { return cudaSuccess; }
EXPORT cudaError_t cudaMemGetInfo(size_t* available, size_t* total) { *total = 150000000000UL, *available = 149000000000UL; return cudaSuccess; }
EXPORT cudaError_t cudaHostAlloc(void** p, size_t size, unsigned flags) { return posix_memalign(p, 4096, size ? size : 1) ? cudaErrorMemoryAllocation : cudaSuccess; }
EXPORT cudaError_t cudaFreeHost(void* p) { free(p); return cudaSuccess; }
EXPORT cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* a, const void* p) {
  memset(a, 0, sizeof *a);
  int ours = (uintptr_t)p >= BOTTOM && (uintptr_t)p < top;
  a->type = ours ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  *(ours ? &a->devicePointer : &a->hostPointer) = (void*)p;
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  __atomic_fetch_add(&fake_counts[MEMCPYS], 1, __ATOMIC_RELAXED);
  fake_note("memcpy");
  if (kind == cudaMemcpyDeviceToHost) memset(to, 0, size);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpy(void* to, const void* from, size_t size, enum cudaMemcpyKind kind) {
  __atomic_fetch_add(&fake_counts[SYNCHRONISATIONS], 1, __ATOMIC_RELAXED);
  return cudaMemcpyAsync(to, from, size, kind, 0);
}
EXPORT cudaError_t cudaMemsetAsync(void* p, int value, size_t size, cudaStream_t stream) {
  __atomic_fetch_add(&fake_counts[MEMSETS], 1, __ATOMIC_RELAXED);
  fake_note("memset");
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemset(void* p, int value, size_t size) { return cudaMemsetAsync(p, value, size, 0); }

// ---- streams and events
static uintptr_t last_handle = 0x1000;
#define NEW(type, handle) (*(handle) = (type)__atomic_add_fetch(&last_handle, 16, __ATOMIC_RELAXED), cudaSuccess)
#define WAITS (__atomic_fetch_add(&fake_counts[SYNCHRONISATIONS], 1, __ATOMIC_RELAXED), cudaSuccess)
EXPORT cudaError_t cudaStreamCreate(cudaStream_t* s) { return NEW(cudaStream_t, s); }
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned flags) { return NEW(cudaStream_t, s); }
EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned flags, int priority) { return NEW(cudaStream_t, s); }
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus* status) { *status = cudaStreamCaptureStatusNone; return cudaSuccess; }
#if CUDART_VERSION >= 13000
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges, size_t* count) {
#else
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph, const cudaGraphNode_t** nodes, size_t* count) {
#endif
  *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t s, int* priority) { *priority = 0; return cudaSuccess; }
EXPORT cudaError_t cudaEventCreate(cudaEvent_t* e) { return NEW(cudaEvent_t, e); }
EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned flags) { return NEW(cudaEvent_t, e); }
EXPORT cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b) { *ms = 1.0f; return cudaSuccess; }
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t s) { return WAITS; }
EXPORT cudaError_t cudaDeviceSynchronize(void) { return WAITS; }
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t e) { return WAITS; }
