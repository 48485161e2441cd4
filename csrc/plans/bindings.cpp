// The Python module cibr_kernels._plans: cibr_kernels/dispatch/plans.py says what a plan is for.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "plans/plan.h"

namespace py = pybind11;
using namespace ck::plans;

PYBIND11_MODULE(_plans, m) {
  m.doc() = "launches and matmuls that are run again with other addresses";
  m.attr("has_gemm") = blas().gemm_ex && blas().sgemm && blas().set_math_mode;
  py::class_<Plan>(m, "Plan")
      .def(py::init<int>(), py::arg("slots"))
      .def("launch", &Plan::launch, py::arg("function"), py::arg("grid"), py::arg("threads"), py::arg("shared_bytes"))
      .def("pointer", [](Plan& p, int slot, uint64_t offset) { p.pointer({slot, offset}); }, py::arg("slot"),
           py::arg("offset"))
      .def("bytes", [](Plan& p, const py::bytes& value) { p.bytes(value); }, py::arg("value"))
      .def(
          "map",
          [](Plan& p, int slot, uint64_t offset, int dtype, int element_bytes, int swizzle, std::vector<uint64_t> shape,
             std::vector<uint64_t> strides, std::vector<uint32_t> box) {
            p.map({slot, offset}, {dtype, swizzle, std::move(shape), std::move(strides), std::move(box), element_bytes});
          },
          py::arg("slot"), py::arg("offset"), py::arg("dtype"), py::arg("element_bytes"), py::arg("swizzle"),
          py::arg("shape"), py::arg("strides"), py::arg("box"), "innermost dimension first, strides in bytes")
      .def(
          "gemm",
          [](Plan& p, std::pair<int, uint64_t> a, std::pair<int, uint64_t> b, std::pair<int, uint64_t> c,
             std::array<int, 3> sizes, std::array<int, 3> pitches, bool transposed_a, bool transposed_b, bool accumulate,
             float alpha, int dtype, int math_mode) {
            p.gemm({{a.first, a.second}, {b.first, b.second}, {c.first, c.second}, sizes[0], sizes[1], sizes[2],
                    pitches[0], pitches[1], pitches[2], transposed_a, transposed_b, accumulate, alpha, dtype, math_mode});
          },
          py::arg("a"), py::arg("b"), py::arg("c"), py::arg("sizes"), py::arg("pitches"), py::arg("transposed_a"),
          py::arg("transposed_b"), py::arg("accumulate"), py::arg("alpha"), py::arg("dtype"), py::arg("math_mode"))
      .def_property_readonly("multiplies", &Plan::multiplies)
      .def("run", &Plan::run, py::arg("device"), py::arg("stream"), py::arg("handle"), py::arg("addresses"),
           py::call_guard<py::gil_scoped_release>());
}
