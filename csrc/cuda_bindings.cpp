// For each CUDA kernel f: f_cuda(params) launches it, f_cuda_workspace(params) is its workspace in bytes, and
// f_cuda_plan(params) is what it would launch, for tests that execute the same launches in an emulator.
// cuda_refusal(device) says why none can run there, "" when they can.
#include "cuda_bindings.h"

#include "common/fields.h"

#ifdef CK_HAVE_CUDA
#include <pybind11/stl.h>

#include <cstring>

#include "additive/moments/cuda.h"
#include "additive/shifts/cuda.h"
#endif

namespace py = pybind11;

namespace ck {

#ifdef CK_HAVE_CUDA
namespace {

py::object argument(const cuda::Argument& a) {
  if (a.kind == 'p') return py::make_tuple("pointer", a.bits);
  if (a.kind == 'i') return py::int_(static_cast<int64_t>(a.bits));
  float value;
  std::memcpy(&value, &a.bits, 4);
  return py::float_(value);
}

// -> ([(kernel, grid, threads, dynamic shared bytes, arguments)], [(name, offset, bytes) of a part of the workspace])
py::tuple plan_to_python(const cuda::Plan& plan) {
  py::list launches, sections;
  for (const cuda::Launch& l : plan.launches) {
    py::list arguments;
    for (const cuda::Argument& a : l.arguments) arguments.append(argument(a));
    launches.append(
        py::make_tuple(l.kernel, py::make_tuple(l.grid[0], l.grid[1], l.grid[2]), l.block, l.shared, arguments));
  }
  for (const cuda::Section& s : plan.workspace) sections.append(py::make_tuple(s.name, s.offset, s.bytes));
  return py::make_tuple(launches, sections);
}

template <typename P>
void bind(py::module_& m, const std::string& name, int (*launch)(const P&), int64_t (*workspace)(const P&),
          cuda::Plan (*plan)(const P&)) {
  m.def((name + "_cuda").c_str(), [launch](const P& p) {
    int error;
    {
      py::gil_scoped_release unlocked;
      error = launch(p);
    }
    if (error) throw std::runtime_error(cuda::error_text(error));
  });
  m.def((name + "_cuda_workspace").c_str(), workspace);
  m.def((name + "_cuda_plan").c_str(), [plan](const P& p) { return plan_to_python(plan(p)); });
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.attr("has_cuda") = true;
  m.def("cuda_refusal", &cuda::refusal);
  {
    using P = cuda::AdditiveMoments;
    py::class_<P, AdditiveMoments> c(m, "AdditiveMomentsCuda");
    constructible(c);
    FIELD(dtype), FIELD(w_dtype), FIELD(groups), FIELD(device), FIELD(processors), FIELD(score_budget),
        FIELD(workspace), FIELD(stream);
  }
  {
    using P = cuda::AdditiveMomentsBackward;
    py::class_<P> c(m, "AdditiveMomentsBackwardCuda");
    constructible(c);
    FIELD(a), FIELD(b), FIELD(w), FIELD(n), FIELD(m), FIELD(h), FIELD(first_positive), FIELD(activation), FIELD(dtype),
        FIELD(w_dtype), FIELD(groups), FIELD(slope), FIELD(g_j), FIELD(g_l), FIELD(da_of_l), FIELD(db_of_l),
        FIELD(dw_of_l), FIELD(da), FIELD(db), FIELD(dw), FIELD(device), FIELD(workspace), FIELD(stream);
  }
  {
    using P = cuda::AdditiveShifts;
    py::class_<P, AdditiveShifts> c(m, "AdditiveShiftsCuda");
    constructible(c);
    FIELD(dtype), FIELD(w_dtype), FIELD(device), FIELD(workspace), FIELD(stream);
  }
  bind(m, "additive_moments", cuda::additive_moments, cuda::additive_moments_workspace, cuda::additive_moments_plan);
  bind(m, "additive_moments_backward", cuda::additive_moments_backward, cuda::additive_moments_backward_workspace,
       cuda::additive_moments_backward_plan);
  bind(m, "additive_shifts_forward", cuda::additive_shifts_forward, cuda::additive_shifts_forward_workspace,
       cuda::additive_shifts_forward_plan);
  bind(m, "additive_shifts_backward", cuda::additive_shifts_backward, cuda::additive_shifts_backward_workspace,
       cuda::additive_shifts_backward_plan);
}

#else
void bind_cuda(py::module_& m) { m.attr("has_cuda") = false; }
#endif

}  // namespace ck
