// Binding the fields of a parameter struct P to class c: FIELD(n), FIELD(scores), ...
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace ck {

// A field of a struct: pointers as integers, numbers as they are.
template <typename Class, typename Owner, typename T>
void field(Class& c, const char* name, T* Owner::*member) {
  c.def_property(
      name, [member](const typename Class::type& p) { return reinterpret_cast<uintptr_t>(p.*member); },
      [member](typename Class::type& p, uintptr_t v) { p.*member = reinterpret_cast<T*>(v); });
}

template <typename Class, typename Owner, typename T>
void field(Class& c, const char* name, T Owner::*member) {
  c.def_property(
      name, [member](const typename Class::type& p) { return p.*member; },
      [member](typename Class::type& p, T v) { p.*member = v; });
}

#define FIELD(name) field(c, #name, &P::name)

}  // namespace ck
