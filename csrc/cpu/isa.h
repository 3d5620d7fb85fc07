// Which instruction set the kernels use: the best one the CPU has, or the one TELEPORT_FAST_ISA names.
#pragma once

namespace teleport_fast {

enum class Isa { Default, Avx2, Avx512 };

const char* isa_name(Isa isa);
// Nothing wrong: nullptr. Otherwise a static sentence that says why `name` cannot be used here.
const char* isa_problem(const char* name);
// Read once, at first use, from the CPU and from the environment variable TELEPORT_FAST_ISA (default, avx2, avx512).
Isa current_isa();
// For tests: switch to `name`, which isa_problem has accepted.
void use_isa(const char* name);
// Nothing wrong with TELEPORT_FAST_ISA: nullptr.
const char* isa_environment_problem();

}  // namespace teleport_fast

// Declares a kernel once per instruction set, and a selector that calls the current one's.
#if defined(TELEPORT_FAST_X86)
#define TELEPORT_FAST_KERNEL(name, parameters)            \
  namespace isa_default { void name parameters; }         \
  namespace isa_avx2 { void name parameters; }            \
  namespace isa_avx512 { void name parameters; }          \
  inline decltype(&isa_default::name) select_##name() {   \
    switch (current_isa()) {                              \
      case Isa::Avx512: return &isa_avx512::name;         \
      case Isa::Avx2: return &isa_avx2::name;             \
      default: return &isa_default::name;                 \
    }                                                     \
  }
#else
#define TELEPORT_FAST_KERNEL(name, parameters)    \
  namespace isa_default { void name parameters; } \
  inline decltype(&isa_default::name) select_##name() { return &isa_default::name; }
#endif
