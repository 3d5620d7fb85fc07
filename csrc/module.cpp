// The Python module teleport_fast._C: how the extension was built and which instruction set it runs.
//
// Plain C API: pybind11's headers took 5 s to read, a twentieth of the whole build.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "cpu/isa.h"

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue(
      "{s:s,s:s,s:s,s:s}", "isa", teleport_fast::isa_name(teleport_fast::current_isa()), "compiler", kCompiler, "torch_target",
      TELEPORT_FAST_TORCH_TARGET, "cuda_targets", TELEPORT_FAST_CUDA_TARGETS);
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS,
     "Keys isa, compiler, torch_target (least torch version), cuda_targets (empty: none); all strings."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", "How the extension was built and which instruction set it runs.", 0, methods,
    nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
