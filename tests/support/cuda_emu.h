// Runs CUDA kernels compiled by a host compiler, so that its sanitizers can watch them.  Needs the toolkit's headers only.
//
//     #include "cuda_emu.h"      // before the .cu file
//     #include "kernel.cu"       // as rewritten by sanitizers.py: <<<>>> and `extern __shared__` are not C++
//     int main() { emu::launch(dim3(2), dim3(64), /*dynamic shared bytes*/ 0, [&] { kernel(x, y, n); }); }
//
// Blocks run one after another.  Within a block a CUDA thread is
//   - a fiber (default): switched at barriers only, in a random order that changes from barrier to barrier, so that what
//     depends on the order differs between runs; for AddressSanitizer; a barrier that not all threads reach aborts;
//   - a std::thread (-DEMU_THREADS): for ThreadSanitizer.
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
#ifdef EMU_THREADS
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <atomic>
#include <climits>
#include <mutex>
#include <thread>
#else
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
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

#ifdef EMU_THREADS

inline thread_local Thread* current = nullptr;

// std::barrier yields before it sleeps; with hundreds of threads on two cores that is most of the time.
class Barrier {
 public:
  explicit Barrier(int n) : expected_(n) {}

  void arrive_and_wait() {
    uint32_t before;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      before = generation_.load(std::memory_order_relaxed);
      if (++arrived_ == expected_) return release();
    }
    while (generation_.load(std::memory_order_acquire) == before) futex(FUTEX_WAIT_PRIVATE, before);
  }

  void arrive_and_drop() {  // as on a GPU: a barrier counts the threads that still run
    std::lock_guard<std::mutex> lock(mutex_);
    if (--expected_ == arrived_ && arrived_) release();
  }

 private:
  void release() {
    arrived_ = 0;
    generation_.fetch_add(1, std::memory_order_release);
    futex(FUTEX_WAKE_PRIVATE, INT_MAX);
  }
  void futex(int what, uint32_t value) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&generation_), what, value, nullptr, nullptr, 0);
  }

  std::mutex mutex_;
  int expected_, arrived_ = 0;
  std::atomic<uint32_t> generation_{0};
};

struct Block {
  int threads;
  std::vector<Warp> warps;
  Barrier barrier;
  std::vector<std::unique_ptr<Barrier>> warp_barriers;

  explicit Block(int n) : threads(n), warps((n + 31) / 32), barrier(n) {
    for (int w = 0; w < (n + 31) / 32; ++w)
      warp_barriers.emplace_back(std::make_unique<Barrier>(std::min(32, n - 32 * w)));
  }
};

inline Block* block = nullptr;
inline void sync_block() { block->barrier.arrive_and_wait(); }
inline void sync_warp() { block->warp_barriers[current->linear / 32]->arrive_and_wait(); }

inline void run_block(Block& b, std::vector<Thread>& threads, const std::function<void()>& kernel) {
  std::vector<std::thread> running;
  for (int i = 0; i < b.threads; ++i)
    running.emplace_back([&, i] {
      current = &threads[i];
      kernel();
      b.barrier.arrive_and_drop();
      b.warp_barriers[i / 32]->arrive_and_drop();
    });
  for (auto& t : running) t.join();
}

#else  // fibers

inline Thread* current = nullptr;

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Fiber {
  ucontext_t context;
  void* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  State state = State::ready;
};

struct Block {
  int threads;
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  void* fake_stack = nullptr;
  const std::function<void()>* kernel = nullptr;

  explicit Block(int n) : threads(n), warps((n + 31) / 32), fibers(n) {}
};

inline Block* block = nullptr;
constexpr size_t stack_bytes = 256 << 10;
inline const void* scheduler_stack;
inline size_t scheduler_stack_bytes;

inline void to_scheduler(Fiber& f) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(f.state == State::done ? nullptr : &f.fake_stack, scheduler_stack, scheduler_stack_bytes);
#endif
  swapcontext(&f.context, &block->scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

inline void to_fiber(Fiber& f) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block->fake_stack, f.stack, stack_bytes);
#endif
  swapcontext(&block->scheduler, &f.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block->fake_stack, nullptr, nullptr);
#endif
}

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  (*block->kernel)();
  Fiber& f = block->fibers[current->linear];
  f.state = State::done;
  to_scheduler(f);
}

inline void wait(State s) {
  Fiber& f = block->fibers[current->linear];
  f.state = s;
  to_scheduler(f);
}
inline void sync_block() { wait(State::at_block_barrier); }
inline void sync_warp() { wait(State::at_warp_barrier); }

// Frees the fibers [begin, end) if all that are not done wait at `s`.
inline void release(Block& b, int begin, int end, State s) {
  for (int i = begin; i < end; ++i)
    if (b.fibers[i].state != State::done && b.fibers[i].state != s) return;
  for (int i = begin; i < end; ++i)
    if (b.fibers[i].state == s) b.fibers[i].state = State::ready;
}

inline void run_block(Block& b, std::vector<Thread>& threads, const std::function<void()>& kernel) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  static unsigned random = 12345;
  while (static_cast<int>(stacks.size()) < b.threads) stacks.emplace_back(new char[stack_bytes]);
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
  for (;;) {
    for (int i = b.threads - 1; i > 0; --i) {
      random = random * 1664525u + 1013904223u;
      std::swap(order[i], order[(random >> 8) % (i + 1)]);
    }
    bool ran = false, done = true;
    for (int i : order) {
      if (b.fibers[i].state != State::ready) continue;
      ran = true;
      current = &threads[i];
      to_fiber(b.fibers[i]);
    }
    for (auto& f : b.fibers) done &= f.state == State::done;
    if (done) return;
    if (!ran) {
      std::fprintf(stderr, "cuda_emu: deadlock: not all threads of block (%u, %u, %u) reach the same barrier\n",
                   threads[0].bid.x, threads[0].bid.y, threads[0].bid.z);
      std::abort();
    }
    for (int w = 0; w < b.threads; w += 32) release(b, w, std::min(b.threads, w + 32), State::at_warp_barrier);
    release(b, 0, b.threads, State::at_block_barrier);
  }
}

#endif

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
  Warp& w = *current->warp;
  std::memcpy(&w.slot[current->linear & 31][0], &value, sizeof value);
  sync_warp();
  T result;
  std::memcpy(&result, &w.slot[source][0], sizeof result);
  sync_warp();
  return result;
}

}  // namespace emu

#define threadIdx (emu::current->tid)
#define blockIdx (emu::current->bid)
#define blockDim (emu::current->bdim)
#define gridDim (emu::current->gdim)

#include "cuda_emu_intrinsics.h"
