// Runs CUDA kernels on one CPU core: grid, blocks, threads as fibers, barriers, shuffles, votes and integer atomics.
//
// Included by csrc/cuda/compat.h when g++ compiles a .cu file. Blocks run one after another, a block's threads as fibers
// that switch only at barriers; both in an order shuffled by emu_seed, so a result that hangs on the order shows up.
// A fault (divergent barrier, bad address, race) ends the launch and is told by emu_error. No PTX, TMA, thread groups.
#pragma once
#include <sys/mman.h>

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>
#if !defined(__x86_64__) || defined(TF_EMULATOR_UCONTEXT)
#include <ucontext.h>
#define TF_FIBER_UCONTEXT 1
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define threadIdx (emu::current->index)
#define blockIdx (emu::block_index)
#define blockDim (emu::block_size)
#define gridDim (emu::grid_size)
#define warpSize 32

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

namespace emu {

constexpr int kMaxThreads = 1024;
constexpr size_t kStack = 64 << 10;          // per fiber; the kernels' largest frames are under 4 KiB
constexpr size_t kSharedLimit = 227 << 10;   // what one block may have on sm_90

struct Barrier {
  uint64_t phase = 0;
  int arrived = 0;
  const char* what = nullptr;
  int line = 0;
  int votes = 0, last_votes = 0;
};

// Lanes of one mask meet here; values are kept for two phases, so that a fast lane cannot overwrite what a slow one reads.
struct WarpMeeting {
  unsigned mask;
  Barrier barrier;
  uint64_t value[2][32];
};

struct Warp {
  std::vector<WarpMeeting> meetings;
  uint32_t epoch = 0;  // full __syncwarp calls so far
};

struct Thread {
#ifdef TF_FIBER_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
  uint3 index{};
  int linear = 0;
  bool done = true;
  Barrier* waiting = nullptr;
  uint64_t waiting_phase = 0;
};

inline Thread threads[kMaxThreads];
inline Warp warps[kMaxThreads / 32];
inline Thread scheduler;
inline Thread* current = nullptr;
inline uint3 block_index{};
inline dim3 block_size, grid_size;
inline int thread_count = 0;
inline Barrier block_barrier;
inline uint32_t block_epoch = 0;   // grows over all launches: barriers passed and blocks begun
inline uint32_t block_first_epoch = 0;
inline std::mt19937 random_order{0};
inline char error[512] = "";
inline const char* kernel_name = "";
inline char* stacks = nullptr;
inline void (*body)(void*) = nullptr;
inline void* body_arguments = nullptr;
inline void (*at_barrier)() = nullptr;  // set by emulator_memory.h: settles the traffic seen since the last barrier

#ifdef TF_FIBER_UCONTEXT
inline void switch_fiber(Thread& from, Thread& to) { swapcontext(&from.context, &to.context); }
#else
// Saves the callee-saved registers and the stack pointer of one fiber and takes up another's.
extern "C" void emu_switch(void** from, void* to);
__asm__(R"(
.weak emu_switch
.type emu_switch, @function
emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
inline void switch_fiber(Thread& from, Thread& to) { emu_switch(&from.stack_pointer, to.stack_pointer); }
#endif

// Records the first fault and leaves the running fiber for good; the scheduler then gives up the launch.
[[noreturn]] inline void fail(const char* format, ...) {
  if (!error[0]) {
    int used = std::snprintf(error, sizeof error, "%s, block (%u, %u, %u), thread %d: ", kernel_name, block_index.x,
                             block_index.y, block_index.z, current ? current->linear : -1);
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(error + used, sizeof error - used, format, arguments);
    va_end(arguments);
  }
  switch_fiber(*current, scheduler);
  std::abort();
}

inline void fiber_main() {
  body(body_arguments);
  current->done = true;
  switch_fiber(*current, scheduler);
  std::abort();
}

inline void start_fiber(Thread& thread) {
  char* low = stacks + kStack * thread.linear;
#ifdef TF_FIBER_UCONTEXT
  getcontext(&thread.context);
  thread.context.uc_stack = {low, 0, kStack};
  makecontext(&thread.context, fiber_main, 0);
#else
  void** top = reinterpret_cast<void**>(low + kStack);
  *--top = nullptr;  // the return address fiber_main never uses; leaves the stack as after a call
  *--top = reinterpret_cast<void*>(fiber_main);
  thread.stack_pointer = top - 6;
#endif
  *reinterpret_cast<uint64_t*>(low) = 0x5afe5afe5afe5afe;
}

// Waits until `count` threads have come; all must come by the same line. Returns the phase's summed votes.
inline int arrive(Barrier& barrier, int count, const char* what, int line, int vote = 0) {
  if (barrier.arrived == 0) {
    barrier.what = what;
    barrier.line = line;
    barrier.votes = 0;
  } else if (barrier.what != what || barrier.line != line) {
    fail("divergent barrier: some threads wait at %s line %d, this one came to %s line %d", barrier.what, barrier.line,
         what, line);
  }
  barrier.votes += vote;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    barrier.last_votes = barrier.votes;
    ++barrier.phase;
    if (&barrier == &block_barrier) {
      if (at_barrier) at_barrier();
      ++block_epoch;
    }
  } else {
    current->waiting = &barrier;
    current->waiting_phase = barrier.phase;
    switch_fiber(*current, scheduler);
    current->waiting = nullptr;
  }
  return barrier.last_votes;
}

inline void report_deadlock() {
  int returned = 0, waiting = 0;
  const Barrier* at = nullptr;
  for (int i = 0; i < thread_count; ++i) {
    returned += threads[i].done;
    if (!threads[i].done) at = threads[i].waiting, waiting += 1;
  }
  std::snprintf(error, sizeof error,
                "%s, block (%u, %u, %u): divergent barrier: %d threads wait for ever (%s line %d), %d have returned",
                kernel_name, block_index.x, block_index.y, block_index.z, waiting, at ? at->what : "?", at ? at->line : 0,
                returned);
}

inline void run_block() {
  static std::vector<int> orders[8];
  if (orders[0].size() != static_cast<size_t>(thread_count)) {
    for (auto& order : orders) {
      order.resize(thread_count);
      for (int i = 0; i < thread_count; ++i) order[i] = i;
    }
  }
  std::vector<int>& fresh = orders[random_order() % 8];
  for (int i = thread_count - 1; i > 0; --i) std::swap(fresh[i], fresh[random_order() % (i + 1)]);
  block_barrier = Barrier();
  block_first_epoch = ++block_epoch;
  for (int w = 0; w * 32 < thread_count; ++w) warps[w].meetings.clear(), warps[w].epoch = 0;
  for (int i = 0; i < thread_count; ++i) {
    Thread& thread = threads[i];
    thread.linear = i;
    thread.index = {i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y)};
    thread.done = false;
    thread.waiting = nullptr;
    start_fiber(thread);
  }
  for (int left = thread_count; left > 0;) {
    bool progress = false;
    for (int i : orders[random_order() % 8]) {
      Thread& thread = threads[i];
      if (thread.done || (thread.waiting && thread.waiting->phase == thread.waiting_phase)) continue;
      progress = true;
      current = &thread;
      switch_fiber(scheduler, thread);
      if (error[0]) return;
      left -= thread.done;
    }
    if (!progress) return report_deadlock();
  }
  for (int i = 0; i < thread_count; ++i) {
    if (*reinterpret_cast<uint64_t*>(stacks + kStack * i) != 0x5afe5afe5afe5afe) {
      std::snprintf(error, sizeof error, "%s: a fiber's stack of %zu bytes overflowed", kernel_name, kStack);
    }
  }
  if (at_barrier) at_barrier();
}

void begin_launch();                      // emulator_memory.h: forgets the last launch's places of access
void begin_block(size_t dynamic_shared);  // and poisons shared memory

template <class Function>
cudaError_t launch(const char* name, dim3 grid, dim3 block, size_t shared, Function function) {
  if (error[0]) return 1;
  kernel_name = name;
  uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  thread_count = block.x * block.y * block.z;
  if (blocks == 0 || thread_count == 0 || thread_count > kMaxThreads || grid.y > 65535 || grid.z > 65535 ||
      grid.x > 0x7fffffff || shared > kSharedLimit) {
    std::snprintf(error, sizeof error, "%s: invalid launch: %llu blocks of %d threads with %zu bytes shared", name,
                  static_cast<unsigned long long>(blocks), thread_count, shared);
    return 1;
  }
  if (!stacks) {
    stacks = static_cast<char*>(mmap(nullptr, kStack * kMaxThreads, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  grid_size = grid;
  block_size = block;
  begin_launch();
  body = [](void* pointer) { (*static_cast<Function*>(pointer))(); };
  body_arguments = &function;
  uint64_t start = random_order() % blocks;
  for (uint64_t i = 0; i < blocks && !error[0]; ++i) {
    uint64_t b = (i + start) % blocks;
    block_index = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / (uint64_t{grid.x} * grid.y))};
    begin_block(shared);
    run_block();
  }
  return error[0] != 0;
}

inline WarpMeeting& meeting(unsigned mask) {
  Warp& warp = warps[current->linear / 32];
  if (!(mask >> (current->linear % 32) & 1)) fail("a warp operation whose mask %08x leaves out the calling lane", mask);
  if (warp.meetings.capacity() < 16) warp.meetings.reserve(16);  // waiting threads hold addresses of its elements
  for (WarpMeeting& found : warp.meetings) {
    if (found.mask == mask) return found;
  }
  if (warp.meetings.size() == 16) fail("more than 16 different warp masks in one block");
  warp.meetings.push_back({mask, {}, {}});
  return warp.meetings.back();
}

// Every lane of the mask leaves a value and then sees those of all others.
template <class T>
const uint64_t* exchange(unsigned mask, T value, const char* what, int line) {
  static_assert(sizeof(T) <= 8, "warp operations take values of at most 8 bytes");
  WarpMeeting& met = meeting(mask);
  uint64_t* slots = met.value[met.barrier.phase & 1];
  std::memcpy(&slots[current->linear % 32], &value, sizeof(T));
  arrive(met.barrier, __builtin_popcount(mask), what, line);
  return slots;
}

template <class T>
T from_lane(unsigned mask, T value, int source, const char* what, int line) {
  const uint64_t* slots = exchange(mask, value, what, line);
  int lane = source < 0 || source > 31 ? current->linear % 32 : source;
  if (!(mask >> lane & 1)) fail("%s reads lane %d, which is not in mask %08x", what, lane, mask);
  T result;
  std::memcpy(&result, &slots[lane], sizeof(T));
  return result;
}

inline unsigned ballot(unsigned mask, bool vote, int line) {
  const uint64_t* slots = exchange(mask, uint64_t{vote}, "a vote", line);
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= unsigned((mask >> lane & 1) && slots[lane]) << lane;
  return result;
}

inline void sync_warp(unsigned mask, int line) {
  WarpMeeting& met = meeting(mask);
  if (met.barrier.arrived == 31) ++warps[current->linear / 32].epoch;
  arrive(met.barrier, __builtin_popcount(mask), "__syncwarp", line);
}

inline int lane_of() { return current->linear % 32; }

}  // namespace emu

#define __syncthreads() ((void)emu::arrive(emu::block_barrier, emu::thread_count, "__syncthreads", __LINE__))
#define __syncthreads_count(p) emu::arrive(emu::block_barrier, emu::thread_count, "__syncthreads", __LINE__, !!(p))
#define __syncthreads_or(p) (__syncthreads_count(p) != 0)
#define __syncthreads_and(p) (__syncthreads_count(p) == emu::thread_count)
#define __syncwarp() emu::sync_warp(0xffffffffu, __LINE__)
#define __shfl_sync(m, v, l) emu::from_lane(m, v, (l) & 31, "__shfl_sync", __LINE__)
#define __shfl_xor_sync(m, v, x) emu::from_lane(m, v, emu::lane_of() ^ (x), "__shfl_xor_sync", __LINE__)
#define __shfl_down_sync(m, v, d) emu::from_lane(m, v, emu::lane_of() + int(d), "__shfl_down_sync", __LINE__)
#define __shfl_up_sync(m, v, d) emu::from_lane(m, v, emu::lane_of() - int(d), "__shfl_up_sync", __LINE__)
#define __ballot_sync(m, p) emu::ballot(m, p, __LINE__)
#define __any_sync(m, p) (emu::ballot(m, p, __LINE__) != 0)
#define __all_sync(m, p) (emu::ballot(m, p, __LINE__) == (m))

inline void __threadfence() {}
inline void __threadfence_block() {}
#include "emulator_memory.h"
