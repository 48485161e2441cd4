// The CUDA part of cibr_kernels._C.
#pragma once

#include <pybind11/pybind11.h>

namespace ck {

// Adds the CUDA kernels, their parameter structs and their plans; `has_cuda` is False where nvcc was not found.
// After the CPU structs, which they extend.
void bind_cuda(pybind11::module_& m);

}  // namespace ck
