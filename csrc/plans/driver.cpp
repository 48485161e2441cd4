#include "plans/driver.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace ck {
namespace plans {
namespace {

template <typename F>
void find(void* library, const char* name, F& function, bool needed = true) {
  function = reinterpret_cast<F>(dlsym(library, name));
  if (!function && needed) throw std::runtime_error(std::string("libcuda.so.1 has no ") + name);
}

Driver load() {
  void* library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (!library) throw std::runtime_error("there is no libcuda.so.1");
  Driver d{};
  find(library, "cuLaunchKernel", d.launch);
  find(library, "cuTensorMapEncodeTiled", d.encode_tiled, false);
  find(library, "cuCtxGetCurrent", d.context);
  find(library, "cuCtxSetCurrent", d.set_context);
  find(library, "cuDevicePrimaryCtxRetain", d.retain_primary);
  find(library, "cuGetErrorString", d.error_text);
  int (*version)(int*) = nullptr;
  find(library, "cuDriverGetVersion", version);
  if (version(&d.version)) throw std::runtime_error("cuDriverGetVersion failed");
  return d;
}

}  // namespace

const Driver& driver() {
  static const Driver loaded = load();
  return loaded;
}

const Blas& blas() {
  static const Blas found = [] {
    Blas b{};  // PyTorch's wheels load cuBLAS for all to see
    find(RTLD_DEFAULT, "cublasGemmEx", b.gemm_ex, false);
    find(RTLD_DEFAULT, "cublasSgemm_v2", b.sgemm, false);
    find(RTLD_DEFAULT, "cublasSetMathMode", b.set_math_mode, false);
    return b;
  }();
  return found;
}

}  // namespace plans
}  // namespace ck
