// The Python module cibr_kernels._C: parameter structs of raw pointers and sizes, and one function for each kernel.
//
// No PyTorch header: a pointer field is set to tensor.data_ptr(), 0 for null, so one build serves every torch version.
// Checks are the caller's (native.py of each op).
#include <pybind11/pybind11.h>

#include "additive/moments/additive_moments.h"
#include "additive/scores/additive_scores.h"
#include "additive/shifts/additive_shifts.h"
#include "losses/clip/clip_loss.h"
#include "common/fields.h"
#include "common/isa.h"
#include "common/scratch.h"
#include "cuda_bindings.h"
#include "dot/lse/dot_lse.h"
#include "dot/softplus/dot_softplus.h"
#include "issue_rate/issue_rate.h"
#include "log_mean_exp/log_mean_exp.h"
#include "losses/siglip/siglip_loss.h"

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
#define BF16_KERNEL(f, Params) CK_KERNEL(f, Params, CK_CASE_AVX512(f) CK_CASE_AVX512BF16(f) CK_CASE_AMX(f))
#define FLOAT_KERNEL(f, Params) CK_KERNEL(f, Params, CK_CASE_FLOAT512(f))

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
  {
    using P = DotProblem;
    py::class_<P> c(m, "DotProblem");
    FIELD(x), FIELD(y), FIELD(dtype), FIELD(n), FIELD(m), FIELD(d), FIELD(scale), FIELD(first_positive), FIELD(row_ids),
        FIELD(col_ids), FIELD(threads);
  }
  {
    using P = DotGradient;
    py::class_<P, DotProblem> c(m, "DotGradient");
    inherit<P, DotProblem>();
    FIELD(positive_grad), FIELD(dx), FIELD(dy), FIELD(dscale);
  }
  {
    using P = DotForward;
    py::class_<P, DotProblem> c(m, "DotForward");
    constructible(c);
    FIELD(mask_positives), FIELD(row_limits), FIELD(row_lse), FIELD(col_lse), FIELD(row_max), FIELD(col_max), FIELD(positives),
        FIELD(stash), FIELD(stash_dtype), FIELD(stash_shift);
  }
  {
    using P = DotBackward;
    py::class_<P, DotGradient> c(m, "DotBackward");
    constructible(c);
    FIELD(mask_positives), FIELD(row_limits), FIELD(row_lse), FIELD(row_weight), FIELD(col_lse), FIELD(col_weight), FIELD(stash),
        FIELD(stash_dtype), FIELD(stash_shift);
  }
  {
    using P = ClipLoss;
    py::class_<P, DotGradient> c(m, "ClipLoss");
    constructible(c);
    FIELD(one_way), FIELD(loss);
  }
  {
    using P = DotSoftplus;
    py::class_<P, DotGradient> c(m, "DotSoftplus");
    constructible(c);
    FIELD(bias), FIELD(attract), FIELD(row_weight), FIELD(col_weight), FIELD(row_sum), FIELD(col_sum), FIELD(dbias);
  }
  {
    using P = SiglipLoss;
    py::class_<P, DotGradient> c(m, "SiglipLoss");
    constructible(c);
    FIELD(bias), FIELD(share), FIELD(loss), FIELD(dbias);
  }
  {
    using P = AdditiveMoments;
    py::class_<P> c(m, "AdditiveMoments");
    constructible(c);
    FIELD(a), FIELD(b), FIELD(w), FIELD(bias), FIELD(n), FIELD(m), FIELD(h), FIELD(first_positive),
        FIELD(include_diagonal), FIELD(activation), FIELD(slope), FIELD(need_a), FIELD(need_b), FIELD(need_w),
        FIELD(features_dtype), FIELD(threads), FIELD(j), FIELD(el), FIELD(da), FIELD(db), FIELD(dw);
  }
  {
    using P = AdditiveScores;
    py::class_<P> c(m, "AdditiveScores");
    constructible(c);
    FIELD(a), FIELD(b), FIELD(w), FIELD(n), FIELD(m), FIELD(h), FIELD(activation), FIELD(slope), FIELD(features_dtype),
        FIELD(threads), FIELD(scores), FIELD(grad), FIELD(da), FIELD(db), FIELD(dw);
  }
  {
    using P = AdditiveShifts;
    py::class_<P> c(m, "AdditiveShifts");
    constructible(c);
    FIELD(a), FIELD(b), FIELD(w), FIELD(n), FIELD(m), FIELD(h), FIELD(first), FIELD(k), FIELD(activation), FIELD(slope),
        FIELD(threads), FIELD(scores), FIELD(g), FIELD(need_a), FIELD(need_b), FIELD(need_w), FIELD(da), FIELD(db),
        FIELD(dw);
  }
  {
    using P = LogMeanExp;
    py::class_<P> c(m, "LogMeanExp");
    constructible(c);
    FIELD(scores), FIELD(mask), FIELD(dtype), FIELD(count), FIELD(threads), FIELD(el), FIELD(grad), FIELD(dscores);
  }
  {
    using P = IssueRate;
    py::class_<P> c(m, "IssueRate");
    constructible(c);
    FIELD(iterations), FIELD(threads), FIELD(issued);
  }

  BF16_KERNEL(dot_lse_forward, DotForward);
  BF16_KERNEL(dot_lse_backward, DotBackward);
  BF16_KERNEL(clip_loss, ClipLoss);
  BF16_KERNEL(dot_softplus, DotSoftplus);
  BF16_KERNEL(siglip_loss, SiglipLoss);
  FLOAT_KERNEL(additive_moments, AdditiveMoments);
  FLOAT_KERNEL(additive_scores_forward, AdditiveScores);
  FLOAT_KERNEL(additive_scores_backward, AdditiveScores);
  FLOAT_KERNEL(additive_shifts_forward, AdditiveShifts);
  FLOAT_KERNEL(additive_shifts_backward, AdditiveShifts);
  FLOAT_KERNEL(log_mean_exp_forward, LogMeanExp);
  FLOAT_KERNEL(log_mean_exp_backward, LogMeanExp);
  FLOAT_KERNEL(issue_rate, IssueRate);

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
    for (Isa i : {Isa::generic, Isa::avx2, Isa::avx512, Isa::avx512bf16, Isa::amx})
      if (isa_supported(i)) names.append(isa_name(i));
    return names;
  });
  m.def("set_isa", [](const std::string& name) {
    for (Isa i : {Isa::generic, Isa::avx2, Isa::avx512, Isa::avx512bf16, Isa::amx})
      if (name == isa_name(i) && isa_supported(i)) return set_isa(i);
    throw py::value_error("unknown or unsupported instruction set '" + name + "'; see supported_isas()");
  });
}
