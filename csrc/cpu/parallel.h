// How the CPU kernels share work: a range is cut into chunks, and each may have scratch of its own, taken before any of them runs.
//
// A body must not allocate: what it threw in one thread would come when the others have written already.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#if defined(TELEPORT_FAST_STD_THREADS)
#include <thread>
#endif

namespace teleport_fast {

struct FreeMemory {
  void operator()(void* memory) const { std::free(memory); }
};
using Scratch = std::unique_ptr<void, FreeMemory>;

inline Scratch allocate(int64_t bytes) {
  void* memory = std::aligned_alloc(64, size_t((bytes + 63) / 64 * 64 + 64));
  if (!memory) throw std::bad_alloc();
  return Scratch(memory);
}

#if defined(TELEPORT_FAST_STD_THREADS)
// For ThreadSanitizer, which does not see OpenMP's barriers: threads of the standard library, as many as the macro says, whatever
// the grain. With TELEPORT_FAST_RACE=1 two of them run the first chunk at once, which must be reported.
inline int64_t threads_at_most() { return TELEPORT_FAST_STD_THREADS; }

inline int64_t chunks_of(int64_t range, int64_t) { return std::max<int64_t>(1, std::min(threads_at_most(), range)); }

inline int64_t runs_of(int64_t chunks) {
  const char* race = std::getenv("TELEPORT_FAST_RACE");
  return chunks + (race && *race == '1');
}
#else
inline int64_t threads_at_most() { return torch::stable::get_num_threads(); }

// Chunks of at least `grain`, at most one a thread.
inline int64_t chunks_of(int64_t range, int64_t grain) {
  return range <= grain ? 1 : std::min(threads_at_most(), (range + grain - 1) / grain);
}

constexpr int64_t runs_of(int64_t chunks) { return chunks; }
#endif

// Memory for each of so many chunks.
class ThreadScratch {
 public:
  ThreadScratch(int64_t bytes, int64_t chunks) : chunks_(chunks), each_(size_t(runs_of(chunks))) {
    for (Scratch& one : each_) one = allocate(bytes);
  }
  int64_t chunks() const { return chunks_; }
  void* of(int64_t run) const { return each_[size_t(run)].get(); }

 private:
  int64_t chunks_;
  std::vector<Scratch> each_;
};

// Calls f(from, to, run) for [0, range) in so many equal chunks, in parallel; `run` is a number that no two calls at once share.
template <class F>
void run_chunks(int64_t range, int64_t chunks, const F& f) {
  if (range <= 0) return;
  const int64_t size = (range + chunks - 1) / chunks;
  auto one = [&](int64_t run) {
    const int64_t from = run < chunks ? run * size : 0;
    if (from < range) f(from, std::min(range, from + size), run);
  };
#if defined(TELEPORT_FAST_STD_THREADS)
  std::vector<std::thread> threads;
  for (int64_t run = 0; run < runs_of(chunks); ++run) threads.emplace_back(one, run);
  for (std::thread& thread : threads) thread.join();
#else
  if (chunks == 1) return one(0);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t from, int64_t to) {
    for (int64_t run = from; run < to; ++run) one(run);
  });
#endif
}

// Calls f(from, to) for all of [0, range) in chunks of at least `grain`, in parallel.
template <class F>
void parallel_for(int64_t range, int64_t grain, const F& f) {
  run_chunks(range, chunks_of(range, grain), [&](int64_t from, int64_t to, int64_t) { f(from, to); });
}

// Calls f(from, to, its own memory of the scratch), on as many chunks as there is scratch for at most.
template <class F>
void parallel_for(int64_t range, int64_t grain, const ThreadScratch& scratch, const F& f) {
  run_chunks(range, std::min(scratch.chunks(), chunks_of(range, grain)), [&](int64_t from, int64_t to, int64_t run) {
    f(from, to, scratch.of(run));
  });
}

// The same with scratch of so many bytes for each chunk.
template <class F>
void parallel_for(int64_t range, int64_t grain, int64_t bytes, const F& f) {
  parallel_for(range, grain, ThreadScratch(bytes, chunks_of(range, grain)), f);
}

}  // namespace teleport_fast
