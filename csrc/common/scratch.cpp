#include "common/scratch.h"

#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>

namespace ck {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kWorthFreeing = 8 * kHugePage;  // clearing less again is not worth what it takes from a peak
constexpr int kSlots = 64;

// Stands before the memory, in a cache line of its own; before a huge page where the memory is one.
struct alignas(64) Header {
  void* allocation;
  int64_t size;  // of the memory
};

Header* kept[kSlots];  // oldest first
int count = 0;
std::atomic<int64_t> total{0}, limit{int64_t{128} << 20};
std::atomic_flag busy = ATOMIC_FLAG_INIT;

// Who finds the list in use does without it, so a child forked meanwhile cannot wait for a thread that it does not have.
struct Guard {
  const bool mine = !busy.test_and_set(std::memory_order_acquire);
  ~Guard() {
    if (mine) busy.clear(std::memory_order_release);
  }
};

Header* header(void* data) { return static_cast<Header*>(data) - 1; }

Header* remove(int at) {
  Header* found = kept[at];
  total -= found->size;
  for (count--; at < count; at++) kept[at] = kept[at + 1];
  return found;
}

void trim(int64_t room) {
  while (count && (total + room > limit || count == kSlots)) ::free(remove(0)->allocation);
}

}  // namespace

void* scratch_take(int64_t size) {
  if (Guard guard; guard.mine) {
    int best = -1;
    for (int i = 0; i < count; i++)
      if (kept[i]->size >= size && kept[i]->size <= 2 * size + 4096 && (best < 0 || kept[i]->size < kept[best]->size))
        best = i;
    if (best >= 0) return remove(best) + 1;
  }
  const int64_t unit = size >= kHugePage ? kHugePage : 64, rounded = (size + unit - 1) / unit * unit;
  char* allocation = static_cast<char*>(::aligned_alloc(unit, unit + rounded));
  if (!allocation) return nullptr;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (unit == kHugePage) ::madvise(allocation + unit, rounded, MADV_HUGEPAGE);  // a hint: may fail
#endif
  Header* h = reinterpret_cast<Header*>(allocation + unit) - 1;
  *h = {allocation, rounded};
  return h + 1;
}

void scratch_give(void* data) {
  if (!data) return;
  Header* h = header(data);
  if (Guard guard; guard.mine && h->size <= limit) {
    trim(h->size);
    kept[count++] = h;
    total += h->size;
    return;
  }
  ::free(h->allocation);
}

void scratch_free(void* data) {
  if (data && header(data)->size < kWorthFreeing)
    scratch_give(data);
  else if (data)
    ::free(header(data)->allocation);
}

int64_t scratch_kept() { return total; }

int64_t scratch_limit() { return limit; }

void set_scratch_limit(int64_t size) {
  limit = size;
  if (Guard guard; guard.mine) trim(0);
}

}  // namespace ck
