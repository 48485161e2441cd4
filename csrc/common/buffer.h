// Scratch memory of a kernel, given back at the end of its scope (common/scratch.h).
#pragma once

#include <stdlib.h>
#include <string.h>

#include <cstdint>

#include "common/scratch.h"

namespace ck {
namespace CK_ISA {

template <typename T>
struct Buffer {
  T* data = nullptr;

  // Uninitialised.  A kernel that cannot get its O((n + m) d) scratch ends the process, as operator new would.
  explicit Buffer(int64_t count) {
    if (count <= 0) return;
    data = static_cast<T*>(scratch_take(count * static_cast<int64_t>(sizeof(T))));
    if (!data) ::abort();
  }
  ~Buffer() { scratch_give(data); }
  void release() {  // early, for the memory that follows
    scratch_free(data);
    data = nullptr;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

template <typename T>
struct ZeroBuffer : Buffer<T> {
  explicit ZeroBuffer(int64_t count) : Buffer<T>(count) {
    if (count > 0) ::memset(static_cast<void*>(this->data), 0, count * sizeof(T));
  }
};

}  // namespace CK_ISA
}  // namespace ck
