// Scratch memory of a kernel: aligned to a cache line, freed at the end of its scope.
#pragma once

#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

namespace ck {
namespace CK_ISA {

constexpr int64_t kHugePage = int64_t{2} << 20;

// Memory about to be touched for the first time: huge pages for the whole ones inside, 512 times fewer page faults.
static inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t unit = kHugePage, first = (reinterpret_cast<uintptr_t>(data) + unit - 1) / unit * unit;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / unit * unit;
  if (first < last) ::madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: may fail
#else
  (void)data, (void)bytes;
#endif
}

template <typename T>
struct Buffer {
  T* data = nullptr;

  // Uninitialised.  A kernel that cannot get its O((n + m) d) scratch ends the process, as operator new would.
  explicit Buffer(int64_t count) {
    if (count <= 0) return;
    const int64_t size = count * sizeof(T), unit = size >= kHugePage ? kHugePage : 64;
    data = static_cast<T*>(::aligned_alloc(unit, (size + unit - 1) / unit * unit));
    if (!data) ::abort();
    prefer_huge_pages(data, size);
  }
  ~Buffer() { release(); }
  void release() {
    ::free(data);
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
