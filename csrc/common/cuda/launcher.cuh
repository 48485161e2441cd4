// Runs kernels on a stream, or records them in a Plan (launch.h).
#pragma once

#include <cuda_runtime_api.h>

#include <cstring>
#include <tuple>
#include <type_traits>

#include "common/cuda/launch.h"

namespace ck {
namespace cuda {

class Launcher {
 public:
  explicit Launcher(cudaStream_t stream) : stream_(stream) {}
  explicit Launcher(Plan& plan) : plan_(&plan) {}

  // After an error nothing is launched, and error() is the first.
  template <typename... Parameters, typename... Arguments>
  void operator()(const char* name, void (*kernel)(Parameters...), dim3 grid, unsigned block, Arguments... arguments) {
    std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
    std::apply([&](auto&... v) { start(name, kernel, grid, block, v...); }, values);
  }

  cudaError_t error() const { return error_; }

 private:
  template <typename Kernel, typename... Values>
  void start(const char* name, Kernel kernel, dim3 grid, unsigned block, Values&... values) {
    if (plan_) {
      plan_->launches.push_back({name, {grid.x, grid.y, grid.z}, block, 0, {argument(values)...}});
    } else if (error_ == cudaSuccess) {
#ifdef __CUDACC__
      void* pointers[] = {const_cast<void*>(static_cast<const void*>(&values))...};
      error_ = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(block), pointers, 0, stream_);
#else  // tests: the host compiler and an emulated device
      emu::launch(grid, dim3(block), 0, [&] { kernel(values...); });
#endif
    }
  }

  template <typename T>
  static Argument argument(T value) {
    if constexpr (std::is_pointer_v<T>)
      return {'p', reinterpret_cast<uint64_t>(value)};
    else if constexpr (std::is_same_v<T, float>) {
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      return {'f', bits};
    } else {
      static_assert(std::is_integral_v<T>, "kernels take pointers, integers and floats");
      return {'i', static_cast<uint64_t>(static_cast<int64_t>(value))};
    }
  }

  cudaStream_t stream_ = nullptr;
  Plan* plan_ = nullptr;
  cudaError_t error_ = cudaSuccess;
};

// Calls enqueue(run) for the device and stream of p -> a cudaError_t.
template <typename P, typename Enqueue>
int launched(const P& p, const Enqueue& enqueue) {
  const cudaError_t set = cudaSetDevice(p.device);
  if (set != cudaSuccess) return set;
  Launcher run(static_cast<cudaStream_t>(p.stream));
  enqueue(run);
  return run.error();
}

// What enqueue(run) -> Workspace would launch.
template <typename Enqueue>
Plan planned(const Enqueue& enqueue) {
  Plan plan;
  Launcher run(plan);
  plan.workspace = enqueue(run).sections();
  return plan;
}

}  // namespace cuda
}  // namespace ck
