// Zeroed memory for the many matrices of one call: small ones from the heap, large ones from huge pages where the system has them.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "host.h"

namespace teleport_fast {

class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() {
    for (const auto& [memory, bytes] : maps_) munmap(memory, bytes);
  }

  void* take(int64_t bytes) {
    bytes = (bytes + 127) / 64 * 64;
    // A first touch costs a fault every 4 KiB otherwise, 0.5 us each; under 1 MiB the heap gives pages that are warm.
    if (bytes >= (1 << 20)) return from(map_, map_left_, bytes, [&](int64_t room) { return mapped(room); }, int64_t(64) << 20);
    void* memory = from(heap_, heap_left_, bytes, [&](int64_t room) { return heaped(room); }, int64_t(1) << 18);
    return std::memset(memory, 0, size_t(bytes));
  }

 private:
  template <class F>
  static void* from(char*& next, int64_t& left, int64_t bytes, const F& more, int64_t chunk) {
    if (left < bytes) {
      left = std::max(chunk, bytes);
      next = more(left);
    }
    void* memory = next;
    next += bytes;
    left -= bytes;
    return memory;
  }

  char* heaped(int64_t bytes) {
    scratch_.push_back(allocate(bytes));
    return static_cast<char*>(scratch_.back().get());
  }

  char* mapped(int64_t bytes) {
    void* memory = mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    maps_.emplace_back(memory, size_t(bytes));
#if defined(MADV_HUGEPAGE)
    madvise(memory, size_t(bytes), MADV_HUGEPAGE);
#endif
    return static_cast<char*>(memory);
  }

  std::vector<Scratch> scratch_;
  std::vector<std::pair<void*, size_t>> maps_;
  char *heap_ = nullptr, *map_ = nullptr;
  int64_t heap_left_ = 0, map_left_ = 0;
};

}  // namespace teleport_fast
