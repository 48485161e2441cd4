// Binding the fields of a parameter struct P to class c: FIELD(n), FIELD(scores), ...
//
// c.fill({"n": 3, "scores": tensor}) sets many at once: field by field in Python, a loss of 64 rows spent as long on it as
// on a third of its matmuls.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

namespace ck {

namespace py = pybind11;

template <typename P>
struct Field {
  py::str name;  // interned, as the names of keyword arguments are
  std::function<void(P&, py::handle)> set;
};

// The fields of P that `fill` knows; kept until the process ends, like the module.
template <typename P>
std::vector<Field<P>>& fields() {
  static auto* all = new std::vector<Field<P>>;
  return *all;
}

// A pointer: an address, or a contiguous tensor; null for None and for a tensor without elements.
inline uintptr_t address(py::handle value) {
  if (PyLong_Check(value.ptr())) return value.cast<uintptr_t>();
  if (value.is_none()) return 0;
  static PyObject *contiguous = PyUnicode_InternFromString("is_contiguous"),
                  *data = PyUnicode_InternFromString("data_ptr");
  const auto ask = [&](PyObject* method) {
    PyObject* answer = PyObject_CallMethodNoArgs(value.ptr(), method);
    if (!answer) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(answer);
  };
  if (!PyObject_IsTrue(ask(contiguous).ptr())) throw py::value_error("a tensor that is not contiguous");
  return ask(data).cast<uintptr_t>();
}

template <typename T>
void assign(T*& field, py::handle value) {
  field = reinterpret_cast<T*>(address(value));
}

template <typename T>
void assign(T& field, py::handle value) {
  if (!value.is_none()) field = value.cast<T>();
}

// Pointers are integers to Python, numbers what they are.
template <typename T>
uintptr_t to_python(T* value) {
  return reinterpret_cast<uintptr_t>(value);
}

template <typename T>
T to_python(T value) {
  return value;
}

template <typename Class, typename Owner, typename T>
void field(Class& c, const char* name, T Owner::* member) {
  using P = typename Class::type;
  const auto set = [member](P& p, py::handle value) { assign(p.*member, value); };
  c.def_property(name, [member](const P& p) { return to_python(p.*member); }, set);
  fields<P>().push_back({py::reinterpret_steal<py::str>(PyUnicode_InternFromString(name)), set});
}

template <typename P>
void fill(P& p, const py::dict& values) {
  for (const std::pair<py::handle, py::handle> item : values) {
    const py::handle name = item.first;
    const Field<P>* found = nullptr;
    for (const Field<P>& f : fields<P>())
      if (f.name.is(name)) found = &f;
    for (const Field<P>& f : fields<P>())  // a name that is not interned
      if (!found && f.name.equal(name)) found = &f;
    if (!found) throw py::type_error("there is no field " + std::string(py::repr(name)));
    try {
      found->set(p, item.second);
    } catch (const std::exception& error) {
      throw py::value_error(std::string(py::str(name)) + ": " + error.what());
    }
  }
}

// The fields of the base of P too.
template <typename P, typename Base>
void inherit() {
  for (const Field<Base>& f : fields<Base>())
    fields<P>().push_back({f.name, [set = f.set](P& p, py::handle value) { set(p, value); }});
}

// The constructor without arguments and `fill`; before the first FIELD.
template <typename P, typename... Bases>
void constructible(py::class_<P, Bases...>& c) {
  c.def(py::init<>());
  c.def("fill", &fill<P>, py::arg("fields"),
        "sets fields by name: numbers, addresses, contiguous tensors, None for null");
  (inherit<P, Bases>(), ...);
}

#define FIELD(name) field(c, #name, &P::name)

}  // namespace ck
