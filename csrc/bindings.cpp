// The Python module cibr_kernels._C: parameter structs of raw pointers and sizes, and one function for each kernel.
//
// No PyTorch header: a pointer field is set to tensor.data_ptr(), 0 for null, so one build serves every torch version.
// Checks are the caller's (native.py of each op).
#include <pybind11/pybind11.h>

#include "common/fields.h"
#include "common/isa.h"
#include "common/scratch.h"
#include "cuda_bindings.h"
#include "parameters.h"

namespace py = pybind11;
using namespace ck;

namespace {

#ifdef CK_HAVE_avx2
#define CK_CASE_AVX2(f) \
  case Isa::avx2:       \
    return avx2::f(p);
#else
#define CK_CASE_AVX2(f)
#endif
#ifdef CK_HAVE_avx512
#define CK_CASE_AVX512(f) \
  case Isa::avx512:       \
    return avx512::f(p);
#else
#define CK_CASE_AVX512(f)
#endif
#ifdef CK_HAVE_avx512bf16
#define CK_CASE_AVX512BF16(f) \
  case Isa::avx512bf16:       \
    return avx512bf16::f(p);
#else
#define CK_CASE_AVX512BF16(f)
#endif
#ifdef CK_HAVE_amx
#define CK_CASE_AMX(f) \
  case Isa::amx:       \
    return amx::f(p);
#else
#define CK_CASE_AMX(f)
#endif

#ifdef CK_HAVE_neonbf16
#define CK_CASE_NEONBF16(f) \
  case Isa::neonbf16:       \
    return neonbf16::f(p);
#else
#define CK_CASE_NEONBF16(f)
#endif

#ifdef CK_HAVE_avx512
#define CK_CASE_FLOAT512(f) \
  case Isa::avx512:         \
  case Isa::avx512bf16:     \
  case Isa::amx:            \
    return avx512::f(p);
#else
#define CK_CASE_FLOAT512(f)
#endif

// Runs the copy of `function` built for the instruction set in use, without the GIL.
#define CK_KERNEL(function, Params, cases)             \
  m.def(                                               \
      #function,                                       \
      [](const Params& p) {                            \
        py::gil_scoped_release unlocked;               \
        switch (isa()) {                               \
          CK_CASE_AVX2(function)                       \
          cases default : return generic::function(p); \
        }                                              \
      },                                               \
      py::arg("params"))

// With products of bf16, and without: CMakeLists.txt.
#define BF16_KERNEL(f, Params) \
  CK_KERNEL(f, Params, CK_CASE_AVX512(f) CK_CASE_AVX512BF16(f) CK_CASE_AMX(f) CK_CASE_NEONBF16(f));
#define FLOAT_KERNEL(f, Params) CK_KERNEL(f, Params, CK_CASE_FLOAT512(f));

template <typename P>
void bind_struct(py::module_& m, const char* name) {
  py::class_<P> c(m, name);
  constructible(c);
  each_field(Of<P>{}, [&](const char* of, auto member) { field(c, of, member); });
}

// Scratch memory as a Python buffer, for tensors that live between two kernels.
struct Scratch {
  void* data;
  int64_t size;
  explicit Scratch(int64_t size) : data(scratch_take(size)), size(size) {
    if (!data) throw std::bad_alloc();
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() { scratch_give(data); }
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ kernels of cibr_kernels; see csrc/<op>/<op>.h for the fields";
  bind_struct<DotForward>(m, "DotForward");
  bind_struct<DotBackward>(m, "DotBackward");
  bind_struct<ClipLoss>(m, "ClipLoss");
  bind_struct<DotSoftplus>(m, "DotSoftplus");
  bind_struct<SiglipLoss>(m, "SiglipLoss");
  bind_struct<AdditiveMoments>(m, "AdditiveMoments");
  bind_struct<AdditiveMomentsBackward>(m, "AdditiveMomentsBackward");
  bind_struct<AdditiveScores>(m, "AdditiveScores");
  bind_struct<AdditiveShifts>(m, "AdditiveShifts");
  bind_struct<LogMeanExp>(m, "LogMeanExp");
  bind_struct<IssueRate>(m, "IssueRate");

  CK_BF16_KERNELS(BF16_KERNEL)
  CK_FLOAT_KERNELS(FLOAT_KERNEL)

  bind_cuda(m);

  py::class_<Scratch>(m, "Scratch", py::buffer_protocol(), "uninitialised bytes, given back when nobody holds them")
      .def(py::init<int64_t>(), py::arg("size"))
      .def_buffer([](Scratch& s) { return py::buffer_info(static_cast<uint8_t*>(s.data), s.size); });
  m.def("scratch_kept", &scratch_kept, "bytes kept for the next call");
  m.def("scratch_limit", &scratch_limit);
  m.def("set_scratch_limit", &set_scratch_limit, py::arg("size"), "the most bytes to keep; frees what is beyond");

#if defined(__clang__)
  m.attr("compiler") = __VERSION__;  // names Clang
#else
  m.attr("compiler") = "gcc " __VERSION__;
#endif
  m.def("isa", [] { return isa_name(isa()); }, "the instruction set in use");
  m.def("supported_isas", [] {
    py::list names;
    for (Isa i : {Isa::generic, Isa::avx2, Isa::avx512, Isa::avx512bf16, Isa::amx, Isa::neonbf16})
      if (isa_supported(i)) names.append(isa_name(i));
    return names;
  });
  m.def("set_isa", [](const std::string& name) {
    for (Isa i : {Isa::generic, Isa::avx2, Isa::avx512, Isa::avx512bf16, Isa::amx, Isa::neonbf16})
      if (name == isa_name(i) && isa_supported(i)) return set_isa(i);
    throw py::value_error("unknown or unsupported instruction set '" + name + "'; see supported_isas()");
  });
}
