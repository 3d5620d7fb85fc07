"""Builds the native libraries with CMake and ninja; without the tools the install is pure Python and says so."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
REQUIRED = os.environ.get("TELEPORT_FAST_REQUIRE_EXT", "") not in ("", "0")
# The environment's own tools first: pip runs this file without activating it.
SEARCH = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])


def find(*names: str) -> str | None:
    return next((path for path in (shutil.which(name, path=SEARCH) for name in names) if path), None)


def compiler() -> str | None:
    return find(os.environ["CXX"].split()[0]) if os.environ.get("CXX") else find("c++", "g++", "clang++")


def torch_folder() -> Path | None:
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def missing() -> list[str]:
    """What the native build lacks, each with the command that brings it."""
    torch = torch_folder()
    wanted = {
        "a C++17 compiler (Debian, Ubuntu: apt-get install g++; or set CXX)": compiler(),
        "cmake (pip install cmake)": find("cmake"),
        "ninja (pip install ninja)": find("ninja", "make"),
        "torch's headers (pip install torch, then install with --no-build-isolation)": torch
        and (torch / "include" / "torch" / "csrc" / "stable").is_dir(),
        "Python.h (Debian, Ubuntu: apt-get install python3-dev)": (
            Path(sysconfig.get_path("include")) / "Python.h"
        ).is_file(),
    }
    if sys.platform != "linux":
        return [f"Linux (this is {sys.platform})"]
    return [name for name, there in wanted.items() if not there]


def nvcc() -> str | None:
    """The CUDA compiler, where the installed torch can use what it compiles; None leaves the build as it is without CUDA."""
    torch = torch_folder()
    with_cuda = torch is not None and (torch / "lib" / "libtorch_cuda.so").is_file()
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return (find("nvcc") or find(os.path.join(home, "bin", "nvcc"))) if with_cuda else None


def fall_back(reason: str) -> None:
    """Says why there is no extension; raises where TELEPORT_FAST_REQUIRE_EXT asks for one."""
    if REQUIRED:
        sys.exit(f"teleport_fast: {reason}; TELEPORT_FAST_REQUIRE_EXT is set, so the install stops here")
    consequence = "Installing the pure-Python package: everything works, through plain torch."
    print(f"\nteleport_fast: {reason}.\n{consequence}\n", file=sys.stderr)


class CMakeBuild(build_ext):
    """Runs CMake and puts `_ops.so`, `_C.*.so` and, with CUDA, `_ops_cuda.so` beside the package's Python files."""

    def run(self) -> None:
        package = "teleport_fast"
        output = ROOT / package if self.inplace else Path(self.build_lib).resolve() / package
        folder = ROOT / "build" / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        output.mkdir(parents=True, exist_ok=True)
        try:
            try:
                self.build(folder, output, nvcc())
            except subprocess.CalledProcessError:
                if not nvcc():
                    raise
                print(
                    "\nteleport_fast: the CUDA part did not build (see above); going on without it.\n", file=sys.stderr
                )
                self.build(folder, output, None)
        except subprocess.CalledProcessError as error:
            fall_back(f"the extension did not build ({' '.join(map(str, error.cmd[:2]))} failed, see above)")

    def build(self, folder: Path, output: Path, cuda: str | None) -> None:
        torch = torch_folder()
        cmake, ninja = find("cmake"), find("ninja")
        assert torch and cmake
        # The options override what a cache of another torch says; a cache of another generator or checkout must go.
        options = [
            *(["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
            f"-DCMAKE_CXX_COMPILER={compiler()}",
            f"-DTORCH_INCLUDE={torch / 'include'}",
            f"-DTORCH_LIBRARY_DIR={torch / 'lib'}",
            f"-DPYTHON_INCLUDE={sysconfig.get_path('include')}",
            f"-DPYTHON_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}",
            f"-DOUTPUT_DIR={output}",
            *(["-DTELEPORT_FAST_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={cuda}"] if cuda else ["-DTELEPORT_FAST_CUDA=OFF"]),
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        configure = [cmake, "-S", str(ROOT), "-B", str(folder), *options]
        if subprocess.run(configure).returncode:
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run(configure, check=True)
        jobs = str(self.parallel or os.cpu_count() or 1)
        subprocess.run([cmake, "--build", str(folder), "--parallel", jobs], check=True)

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib) / "teleport_fast"
        return [str(path) for path in (*folder.glob("_ops*.so"), *folder.glob("_C*.so"))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


lacking = missing()
if lacking:
    fall_back("the extension cannot be built without " + ", ".join(lacking))
setup(
    ext_modules=[] if lacking else [Extension("teleport_fast._C", sources=[])],
    cmdclass={} if lacking else {"build_ext": CMakeBuild},
)
