// The Python module teleport_fast._C: how the extension was built and which instruction set it runs.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/isa.h"

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["isa"] = teleport_fast::isa_name(teleport_fast::current_isa());
  info["compiler"] = compiler();
  info["torch_target"] = TELEPORT_FAST_TORCH_TARGET;
  info["cuda_targets"] = TELEPORT_FAST_CUDA_TARGETS;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "How the extension was built and which instruction set it runs.";
  m.def("build_info", &build_info, "Keys isa, compiler, torch_target (least torch version), cuda_targets (empty: none); all strings.");
}
