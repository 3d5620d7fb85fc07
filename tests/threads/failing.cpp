// Preloaded: the n-th allocation that code between two addresses asks for fails, whether by operator new or by aligned_alloc.
#include <dlfcn.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>

static std::atomic<uintptr_t> from{0}, to{0};
static std::atomic<long> left{0}, asked{0};

// Fails the n-th from now on; 0: none. Answers with how many were asked for since the last call.
extern "C" long fail_allocation(uintptr_t begin, uintptr_t end, long n) {
  from = begin, to = end;
  left = n;
  return asked.exchange(0);
}

static bool fails(void* caller) {
  const auto at = reinterpret_cast<uintptr_t>(caller);
  if (at < from || at >= to) return false;
  ++asked;
  return left > 0 && --left == 0;
}

template <class F>
static F* next(const char* name) {
  return reinterpret_cast<F*>(dlsym(RTLD_NEXT, name));
}

extern "C" void* aligned_alloc(size_t alignment, size_t size) {
  static auto* real = next<void*(size_t, size_t)>("aligned_alloc");
  return fails(__builtin_return_address(0)) ? nullptr : real(alignment, size);
}

void* operator new(size_t size) {
  static auto* real = next<void*(size_t)>("_Znwm");
  if (fails(__builtin_return_address(0))) throw std::bad_alloc();
  return real(size);
}
