// What a launcher does, as data: the launches in order and the parts of its workspace.  No CUDA header.
//
// A launcher hands every kernel to a Launcher (launcher.cuh), which runs it on a stream or records it here.  So what tests
// execute in an emulator is the launcher's own grids, pointers and numbers: there is no second copy of that arithmetic.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ck {
namespace cuda {

struct Argument {
  char kind;      // 'p' pointer, 'i' integer, 'f' float
  uint64_t bits;  // the address, the sign-extended integer, or the bits of the float
};

struct Launch {
  std::string kernel;  // its extern "C" name
  unsigned grid[3], block, shared;
  std::vector<Argument> arguments;
};

struct Section {
  std::string name;
  int64_t offset, bytes;
};

struct Plan {
  std::vector<Launch> launches;
  std::vector<Section> workspace;
};

// "no kernel image is available ... (cudaErrorNoKernelImageForDevice)"
std::string error_text(int error);

// Why the kernels of this module cannot run on a device, such as a driver older than the runtime; empty when they can.
std::string refusal(int device);

// Cuts a buffer into aligned sections.  With a null base it only counts.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* take(const char* name, int64_t count) {
    if (count == 0) return nullptr;
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    sections_.push_back({name, size_, count * static_cast<int64_t>(sizeof(T))});
    T* const start = base_ ? reinterpret_cast<T*>(base_ + size_) : nullptr;
    size_ += bytes;
    return start;
  }

  int64_t size() const { return size_; }
  const std::vector<Section>& sections() const { return sections_; }

 private:
  char* base_;
  int64_t size_ = 0;
  std::vector<Section> sections_;
};

}  // namespace cuda
}  // namespace ck
