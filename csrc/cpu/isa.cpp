// Finds the CPU's instruction set once, and lets the environment or a test choose a lesser one.
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#if defined(TELEPORT_FAST_X86)
#include <cpuid.h>
#endif

namespace teleport_fast {
namespace {

constexpr const char* kNames[] = {"default", "avx2", "avx512"};

#if defined(TELEPORT_FAST_X86)
// gcc before 11 does not know the name f16c in __builtin_cpu_supports.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

bool supported(Isa isa) {
#if defined(TELEPORT_FAST_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  switch (isa) {
    case Isa::Avx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::Avx2: return avx2;
    default: return true;
  }
#else
  return isa == Isa::Default;
#endif
}

Isa find() {
  const char* wanted = std::getenv("TELEPORT_FAST_ISA");
  Isa best = supported(Isa::Avx512) ? Isa::Avx512 : supported(Isa::Avx2) ? Isa::Avx2 : Isa::Default;
  if (wanted && *wanted && !isa_problem(wanted))
    for (int i = 0; i < 3; ++i)
      if (!std::strcmp(wanted, kNames[i])) best = Isa(i);
  return best;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{find()};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[int(isa)]; }

const char* isa_problem(const char* name) {
  for (int i = 0; i < 3; ++i)
    if (!std::strcmp(name, kNames[i])) return supported(Isa(i)) ? nullptr : "this CPU does not have it";
  return "it is not one of default, avx2, avx512";
}

const char* isa_environment_problem() {
  const char* wanted = std::getenv("TELEPORT_FAST_ISA");
  return wanted && *wanted ? isa_problem(wanted) : nullptr;
}

Isa current_isa() { return current().load(std::memory_order_relaxed); }

void use_isa(const char* name) {
  for (int i = 0; i < 3; ++i)
    if (!std::strcmp(name, kNames[i])) current().store(Isa(i), std::memory_order_relaxed);
}

}  // namespace teleport_fast
