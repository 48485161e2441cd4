// Runs CUDA kernels compiled by a host compiler, so that its sanitizers can watch them.  Needs the toolkit's headers only.
//
//     #include "cuda_emu.h"      // before the .cu file
//     #include "kernel.cu"       // as rewritten by sanitizers.py: <<<>>> and `extern __shared__` are not C++
//     int main() { emu::launch(dim3(2), dim3(64), /*dynamic shared bytes*/ 0, [&] { kernel(x, y, n); }); }
//
// Blocks run one after another.  Within a block a CUDA thread is a fiber, switched at barriers only, in a random order that
// changes from barrier to barrier, so that what depends on the order differs between runs.  A barrier that not all threads
// reach aborts.  ThreadSanitizer is told that fibers are threads, and that nothing but a barrier orders them.
// __shared__ variables are static, so AddressSanitizer puts red zones around each, and ThreadSanitizer sees all threads
// share them.  They keep what the block before left; dynamic shared memory is filled with 0xFF (NaN) for every block.
// Not modelled: atomics, textures, clusters, tensor cores except mma.sync m16n8k16 bf16, other inline PTX.  A shuffle here
// synchronises its warp; on a GPU it does not order memory.  The mask of *_sync must be the whole warp.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>
#include <ucontext.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif
// Host versions of the 16-bit types and vectors; they have to come before the keywords are redefined.
#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __shared__
#undef __launch_bounds__
#undef __forceinline__
#undef __noinline__
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static  // one block runs at a time
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __noinline__

namespace emu {

// What the lanes of a warp exchange: 12 registers of up to 8 bytes each.
struct Warp {
  uint64_t slot[32][12];
};

struct Thread {
  dim3 tid, bid, bdim, gdim;
  int linear = 0;  // number in the block
  Warp* warp = nullptr;
};

inline std::vector<unsigned char> dynamic_bytes;

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(dynamic_bytes.data());
}

// ThreadSanitizer's view.  What only the emulator reads and writes is not watched: it would order the fibers, or be a race.
#if defined(__SANITIZE_THREAD__)
#define EMU_UNWATCHED __attribute__((no_sanitize_thread))
inline void arrives(char& at) { __tsan_release(&at); }
inline void leaves(char& at) { __tsan_acquire(&at); }
#else
#define EMU_UNWATCHED
inline void arrives(char&) {}
inline void leaves(char&) {}
#endif

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Fiber {
  ucontext_t context;
  void* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  State state = State::ready;
};

// Two places take turns: who is early at the next barrier must not be seen by who still leaves this one.
struct Barrier {
  char places[2] = {};
  unsigned passed = 0;
};

struct Block {
  int threads;
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
  Barrier barrier;
  std::vector<Barrier> warp_barriers;
  char begin = 0, end = 0;
  ucontext_t scheduler;
  void* fake_stack = nullptr;
  const std::function<void()>* kernel = nullptr;

  explicit Block(int n) : threads(n), warps((n + 31) / 32), fibers(n), warp_barriers((n + 31) / 32) {}
};

inline Block* block = nullptr;
inline Thread* running = nullptr;
constexpr size_t stack_bytes = 256 << 10;
inline const void* scheduler_stack;
inline size_t scheduler_stack_bytes;
inline void* scheduler_watched;             // ThreadSanitizer's name of the scheduler,
inline std::vector<void*> fibers_watched;  // and of the fibers, which serve every block

EMU_UNWATCHED inline Thread* current() { return running; }

EMU_UNWATCHED inline void to_scheduler(Fiber& f) {
  Block& b = *block;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(f.state == State::done ? nullptr : &f.fake_stack, scheduler_stack, scheduler_stack_bytes);
#elif defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(scheduler_watched, __tsan_switch_to_fiber_no_sync);
#endif
  swapcontext(&f.context, &b.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

EMU_UNWATCHED inline void to_fiber(Fiber& f) {
  Block& b = *block;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&b.fake_stack, f.stack, stack_bytes);
#elif defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(fibers_watched[running->linear], __tsan_switch_to_fiber_no_sync);
#endif
  swapcontext(&b.scheduler, &f.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(b.fake_stack, nullptr, nullptr);
#endif
}

EMU_UNWATCHED inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  leaves(block->begin);
  Fiber& f = block->fibers[running->linear];
  (*block->kernel)();
  arrives(block->end);
  f.state = State::done;
  to_scheduler(f);
}

EMU_UNWATCHED inline void wait(State s, Barrier& barrier) {
  Fiber& f = block->fibers[running->linear];
  char& place = barrier.places[barrier.passed % 2];
  f.state = s;
  arrives(place);
  to_scheduler(f);
  leaves(place);
}
EMU_UNWATCHED inline void sync_block() { wait(State::at_block_barrier, block->barrier); }
EMU_UNWATCHED inline void sync_warp() { wait(State::at_warp_barrier, block->warp_barriers[running->linear / 32]); }

// Frees the fibers [begin, end) if all that are not done wait at `s`.
EMU_UNWATCHED inline void release(Block& b, int begin, int end, State s, Barrier& barrier) {
  bool any = false;
  for (int i = begin; i < end; ++i) {
    if (b.fibers[i].state != State::done && b.fibers[i].state != s) return;
    any |= b.fibers[i].state == s;
  }
  barrier.passed += any;
  for (int i = begin; i < end; ++i)
    if (b.fibers[i].state == s) b.fibers[i].state = State::ready;
}

EMU_UNWATCHED inline void run_block(Block& b, std::vector<Thread>& threads, const std::function<void()>& kernel) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  static unsigned random = 12345;
  while (static_cast<int>(stacks.size()) < b.threads) {
    stacks.emplace_back(new char[stack_bytes]);
#if defined(__SANITIZE_THREAD__)
    scheduler_watched = __tsan_get_current_fiber();
    fibers_watched.push_back(__tsan_create_fiber(0));
#endif
  }
  b.kernel = &kernel;
  std::vector<int> order(b.threads);
  for (int i = 0; i < b.threads; ++i) {
    Fiber& f = b.fibers[i];
    order[i] = i;
    f.stack = stacks[i].get();
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack;
    f.context.uc_stack.ss_size = stack_bytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
  }
  arrives(b.begin);
  for (;;) {
    for (int i = b.threads - 1; i > 0; --i) {
      random = random * 1664525u + 1013904223u;
      std::swap(order[i], order[(random >> 8) % (i + 1)]);
    }
    bool ran = false, done = true;
    for (int i : order) {
      if (b.fibers[i].state != State::ready) continue;
      ran = true;
      running = &threads[i];
      to_fiber(b.fibers[i]);
    }
    for (auto& f : b.fibers) done &= f.state == State::done;
    if (done) break;
    if (!ran) {
      std::fprintf(stderr, "cuda_emu: deadlock: not all threads of block (%u, %u, %u) reach the same barrier\n",
                   threads[0].bid.x, threads[0].bid.y, threads[0].bid.z);
      std::abort();
    }
    for (int w = 0; w < b.threads; w += 32)
      release(b, w, std::min(b.threads, w + 32), State::at_warp_barrier, b.warp_barriers[w / 32]);
    release(b, 0, b.threads, State::at_block_barrier, b.barrier);
  }
  leaves(b.end);
}

// Runs `kernel` for every thread of every block of the grid.
template <class F>
void launch(dim3 grid, dim3 size, size_t dynamic_shared_bytes, F kernel) {
  const int n = size.x * size.y * size.z;
  const std::function<void()> function = kernel;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        Block b(n);
        block = &b;
        std::vector<unsigned char>(dynamic_shared_bytes, 0xFF).swap(dynamic_bytes);  // exact size: overruns are reported
        std::vector<Thread> threads(n);
        for (int i = 0; i < n; ++i) {
          Thread& t = threads[i];
          t.tid = dim3(i % size.x, i / size.x % size.y, i / (size.x * size.y));
          t.bid = dim3(x, y, z), t.bdim = size, t.gdim = grid;
          t.linear = i, t.warp = &b.warps[i / 32];
        }
        run_block(b, threads, function);
      }
}

// `value` of lane `source` of the warp; `scratch` rows of the warp are rewritten by the next exchange only.
template <class T>
T exchange(T value, int source) {
  static_assert(sizeof(T) <= sizeof(Warp::slot[0]));
  Warp& w = *current()->warp;
  std::memcpy(&w.slot[current()->linear & 31][0], &value, sizeof value);
  sync_warp();
  T result;
  std::memcpy(&result, &w.slot[source][0], sizeof result);
  sync_warp();
  return result;
}

}  // namespace emu

#define threadIdx (emu::current()->tid)
#define blockIdx (emu::current()->bid)
#define blockDim (emu::current()->bdim)
#define gridDim (emu::current()->gdim)

#include "cuda_emu_intrinsics.h"
