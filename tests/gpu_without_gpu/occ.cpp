// Blocks per multiprocessor as NVIDIA's own cuda_occupancy.h computes them: the oracle of test_sass.py.
// stdin: lines of  major minor registers threads shared shared_per_multiprocessor shared_per_block threads_per_multiprocessor
// stdout: the number of blocks of each line.
#include <cuda_occupancy.h>

#include <cstdio>

int main() {
  int major, minor, registers, threads, shared, shared_per_multiprocessor, shared_per_block, threads_per_multiprocessor;
  while (std::scanf("%d %d %d %d %d %d %d %d", &major, &minor, &registers, &threads, &shared, &shared_per_multiprocessor,
                    &shared_per_block, &threads_per_multiprocessor) == 8) {
    cudaOccDeviceProp device;
    device.computeMajor = major;
    device.computeMinor = minor;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = threads_per_multiprocessor;
    device.regsPerBlock = 65536;
    device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 49152;
    device.sharedMemPerMultiprocessor = shared_per_multiprocessor;
    device.numSms = 100;
    device.sharedMemPerBlockOptin = shared_per_block;
    device.reservedSharedMemPerBlock = 1024;

    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = 0;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = shared_per_block;
    kernel.numBlockBarriers = 1;

    cudaOccDeviceState state;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared) != CUDA_OCC_SUCCESS)
      return 1;
    std::printf("%d\n", result.activeBlocksPerMultiprocessor);
  }
}
