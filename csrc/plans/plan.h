// A plan: launches and matmuls whose arguments are known but for addresses, run with new addresses in one call.
//
//     slots       the tensors of a call, by their addresses: inputs, outputs, workspaces
//     a pointer   slot + offset; everything else that a launch passes is bytes, fixed when the plan was made
//     a map       a tensor map (TMA) of an address, encoded again only where the address is another than before
//
// Several threads may run one plan: they take turns.  Nothing here waits for the device.
#pragma once

#include <array>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "plans/driver.h"

namespace ck {
namespace plans {

struct Place {
  int slot;
  uint64_t offset;  // bytes
};

// What cuTensorMapEncodeTiled is told; innermost dimension first, strides (bytes) from the second on.
struct MapLayout {
  int dtype, swizzle;
  std::vector<uint64_t> shape, strides;
  std::vector<uint32_t> box;
  int element_bytes;
};

// c (rows, cols) float32 = alpha a b, or c += alpha a b, all row-major; a "transposed" operand lies as its transpose does.
struct Gemm {
  Place a, b, c;
  int rows, cols, inner;
  int lda, ldb, ldc;  // numbers from a row to the next, as they lie
  bool transposed_a, transposed_b, accumulate;
  float alpha;
  int dtype;      // cudaDataType of a and b: 0 float32, 2 float16, 14 bfloat16
  int math_mode;  // cublasMath_t around half precision, as PyTorch sets it
};

class Plan {
 public:
  explicit Plan(int slots) : slots_(slots) {}

  // A launch; the parameters that are added after it are its own, in order.
  void launch(uintptr_t function, std::array<unsigned, 3> grid, unsigned threads, unsigned shared_bytes);
  void pointer(Place place);
  void bytes(const std::string& value);  // a number as it lies in memory, or 8 zeros: at most 8 bytes
  void map(Place place, MapLayout layout);

  void gemm(const Gemm& gemm);

  // Enqueues everything on the stream.  handle: PyTorch's cuBLAS handle of this thread and stream, where there are
  // matmuls.  Throws std::runtime_error, naming the call that CUDA or cuBLAS refused.
  void run(int device, uintptr_t stream, uintptr_t handle, const std::vector<uint64_t>& addresses);

  int slots() const { return slots_; }
  bool multiplies() const { return !gemms_.empty(); }

 private:
  struct Command {
    int gemm;  // index, or -1: a launch
    void* function;
    std::array<unsigned, 3> grid;
    unsigned threads, shared;
    size_t first, count;  // of parameters_
  };
  struct Pointer {
    size_t word;
    Place place;
  };
  struct Map {
    Place place;
    MapLayout layout;
    uint64_t address;
  };
  struct Parameter {
    bool is_map;
    size_t index;  // of maps_ or words_
  };

  void check(Place place) const;
  void parameter(bool is_map, size_t index);
  void encode(size_t i, uint64_t address);
  void multiply(const Gemm& g, void* handle, const std::vector<uint64_t>& addresses) const;

  int slots_;
  std::vector<Command> commands_;
  std::vector<Parameter> parameters_;
  std::vector<uint64_t> words_;
  std::vector<Pointer> pointers_;
  std::vector<Map> maps_;
  std::vector<TensorMap> encoded_;  // of maps_
  std::vector<void*> places_;       // of parameters_, from the first run on
  std::vector<Gemm> gemms_;
  std::mutex turn_;
};

}  // namespace plans
}  // namespace ck
