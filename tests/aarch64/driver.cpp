// The C++ kernels for a caller on another machine, or under an emulator: calls come through stdin, results go to stdout.
//
// A call is lines of text; after a line `data` come so many bytes, which become the pointer:
//     call ISA KERNEL
//     number FIELD VALUE
//     data FIELD SIZE
//     run
// The answer to `run` is a line `ok FIELD FIELD ...` and the bytes of these fields, those that the kernel may write; or a
// line that says what was wrong.  `isas` answers with the names of the instruction sets.
#include <cstdlib>
#include <iostream>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "common/isa.h"
#include "parameters.h"

namespace {

struct Field {
  std::string name, number;
  char* data = nullptr;  // at a multiple of 64, or null: a number
  size_t size = 0;
  bool written = false;
};

struct Call {
  std::string isa, kernel;
  std::vector<Field> fields;
};

template <typename T>
void assign(T*& member, Field& field) {
  member = reinterpret_cast<T*>(field.data);
  field.written = !std::is_const<T>::value;
}

template <typename T>
void assign(T& member, Field& field) {
  member = static_cast<T>(std::is_floating_point<T>::value ? std::strtod(field.number.c_str(), nullptr)
                                                           : std::strtoll(field.number.c_str(), nullptr, 10));
}

// Fills a struct and runs the kernel; says what is unknown.
template <typename P>
std::string run(Call& call, void (*kernel)(const P&)) {
  P p{};
  for (Field& field : call.fields) {
    bool known = false;
    ck::each_field(ck::Of<P>{}, [&](const char* name, auto member) {
      if (field.name == name) known = true, assign(p.*member, field);
    });
    if (!known) return call.kernel + " has no field " + field.name;
  }
  kernel(p);
  return "ok";
}

#ifdef CK_HAVE_neonbf16
#define COPY(f) call.isa == "neonbf16" ? ck::neonbf16::f : ck::generic::f
#else
#define COPY(f) ck::generic::f
#endif
#define BF16_CASE(f, Params) \
  if (call.kernel == #f) return run<ck::Params>(call, COPY(f));
#define FLOAT_CASE(f, Params) \
  if (call.kernel == #f) return run<ck::Params>(call, ck::generic::f);

std::string dispatch(Call& call) {
  CK_BF16_KERNELS(BF16_CASE)
  CK_FLOAT_KERNELS(FLOAT_CASE)
  return "there is no kernel " + call.kernel;
}

Field read_field(const std::string& kind, std::istringstream& words) {
  Field field;
  words >> field.name;
  if (kind == "number") {
    words >> field.number;
    return field;
  }
  words >> field.size;
  field.data = static_cast<char*>(std::aligned_alloc(64, (field.size + 127) / 64 * 64));
  std::cin.read(field.data, static_cast<std::streamsize>(field.size));
  return field;
}

void answer(Call& call) {
  std::cout << dispatch(call);
  for (const Field& field : call.fields)
    if (field.written) std::cout << " " << field.name;
  std::cout << "\n";
  for (const Field& field : call.fields) {
    if (field.written) std::cout.write(field.data, static_cast<std::streamsize>(field.size));
    std::free(field.data);
  }
  std::cout.flush();
}

}  // namespace

int main() {
  std::ios::sync_with_stdio(false);
  Call call;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string kind;
    words >> kind;
    if (kind == "call") {
      call = {};
      words >> call.isa >> call.kernel;
    } else if (kind == "run") {
      answer(call);
    } else if (kind == "isas") {
      for (ck::Isa isa : {ck::Isa::generic, ck::Isa::neonbf16})
        if (ck::isa_supported(isa)) std::cout << ck::isa_name(isa) << " ";
      std::cout << std::endl;
    } else {
      call.fields.push_back(read_field(kind, words));
    }
  }
}
