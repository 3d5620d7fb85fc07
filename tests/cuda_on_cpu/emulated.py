"""Compiles csrc/cuda with g++ against the emulator and calls its host functions through ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SOURCES = ROOT / "csrc" / "cuda"
STORAGE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class ViewStruct(ctypes.Structure):
    """csrc/cuda/view.h: View."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("head_stride", "row_stride", "outer_stride", "inner_stride")],
        *[(name, ctypes.c_int32) for name in ("heads", "rows", "outer", "inner", "storage", "joint")],
        *[(name, ctypes.c_int32) for name in ("rows_fast", "vector", "splits", "row_blocks", "slot", "first_tile")],
    ]


@dataclass(frozen=True)
class Traffic:
    """What the launches since `begin` moved: bytes used, and 32-byte sectors touched, per warp access."""

    loaded: int
    stored: int
    load_sectors: int
    store_sectors: int
    transactions: int

    @property
    def bytes(self) -> int:
        return self.loaded + self.stored

    @property
    def sector_ratio(self) -> float:
        return 32 * (self.load_sectors + self.store_sectors) / self.bytes


class EmulatorError(RuntimeError):
    """A fault that the emulator found in a kernel."""


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def build(extra_flags: Sequence[str] = ()) -> Path:
    """One shared library of all kernels; an object is compiled again only if it, a header or the flags changed."""
    cxx = compiler()
    assert cxx is not None
    cache = ROOT / "build" / "cuda_on_cpu"
    cache.mkdir(parents=True, exist_ok=True)
    # nvcc contracts a·b + c into one rounding; so must g++, or every sum would look less accurate than it is on a GPU
    fused = ["-mfma", "-ffp-contract=fast"] if "AVX" in torch.backends.cpu.get_cpu_capability() else []
    # g++ would let two builds loaded into one process share the emulator's state
    apart = [] if "clang" in cxx else ["-fno-gnu-unique"]
    flags = [*fused, *apart, "-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{HERE}", *extra_flags]
    common = hashlib.sha256(" ".join([cxx, *flags]).encode())
    for header in sorted([*HERE.glob("*.h"), *SOURCES.glob("*.h")]):
        common.update(header.read_bytes())

    def compile_one(source: Path) -> Path:
        digest = common.copy()
        digest.update(source.read_bytes())
        target = cache / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        if not target.exists():
            part = target.with_suffix(f".{os.getpid()}.tmp")
            command = [cxx, *flags, "-x", "c++", "-c", str(source), "-o", str(part)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            part.replace(target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*sorted(SOURCES.glob("*.cu")), HERE / "planted.cu"]))
    name = hashlib.sha256(" ".join(o.name for o in objects).encode()).hexdigest()[:16]
    library = cache / f"kernels-{name}.so"
    if not library.exists():
        part = library.with_suffix(f".{os.getpid()}.tmp")
        subprocess.run([cxx, "-shared", "-o", str(part), *map(str, objects)], check=True)
        part.replace(library)
    return library


def build_launch(kernels: Path) -> Path:
    """csrc/cuda/launch.cpp as ops of namespace teleport_fast_emulated on CPU tensors, over the kernels' library."""
    cxx = compiler()
    assert cxx is not None
    # The torch that is compiled for: the stable ABI's 2.11, as in CMakeLists.txt.
    names = ["CUDA_HOST", "EMULATED", "LIBRARY=teleport_fast_emulated", "KEY=CPU"]
    defined = [*[f"-DTELEPORT_FAST_{name}" for name in names], "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    home = Path(torch.__file__).parent
    flags = [*defined, "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    flags += [f"-I{HERE / 'host'}", "-isystem", str(home / "include")]
    libraries = [str(kernels), str(home / "lib" / "libtorch_cpu.so")]
    digest = hashlib.sha256(" ".join([cxx, *flags, *libraries]).encode())
    for path in sorted([*(HERE / "host").glob("*.h"), *SOURCES.glob("*.h"), SOURCES / "launch.cpp"]):
        digest.update(path.read_bytes())
    library = kernels.with_name(f"launch-{digest.hexdigest()[:16]}.so")
    if not library.exists():
        part = library.with_suffix(f".{os.getpid()}.tmp")
        command = [cxx, *flags, "-shared", str(SOURCES / "launch.cpp"), *libraries, "-o", str(part)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        part.replace(library)
    return library


class Emulated:
    """The kernels on the CPU; every call begins with fresh allocations and counters and raises what went wrong."""

    def __init__(self, library: Path, seed: int = 0) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.emu_error.restype = ctypes.c_char_p
        self.seed = seed

    def begin(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Forget all allocations and counts, then allow loads from all and stores to the outputs' whole storages."""
        self.library.emu_reset(ctypes.c_uint(self.seed))
        for tensors, writable in ((inputs, 0), (outputs, 1)):
            for tensor in tensors:
                storage = tensor.untyped_storage()
                self.register(storage.data_ptr(), storage.nbytes(), writable)

    def register(self, address: int, size: int, writable: int = 0) -> None:
        self.library.emu_register(ctypes.c_void_p(address), ctypes.c_int64(size), ctypes.c_int(writable))

    def table(self, array: ctypes.Array) -> ctypes.Array:
        """A host array that kernels may read, as if it had been copied to the device."""
        self.register(ctypes.addressof(array), ctypes.sizeof(array))
        return array

    def check(self, code: int) -> None:
        message = self.library.emu_error().decode()
        if message or code:
            self.library.emu_reset(ctypes.c_uint(self.seed))  # the next call, a planner's perhaps, must not see it
            raise EmulatorError(message or f"the host function returned {code}")

    def traffic(self) -> Traffic:
        counts = (ctypes.c_uint64 * 5)()
        self.library.emu_traffic(counts)
        return Traffic(*counts)


def view_struct(tensor: Tensor, joint: int = 0) -> ViewStruct:
    """The descriptor of a (heads, h, n) or (heads, h, outer, inner) view."""
    if tensor.dim() == 3:
        tensor = tensor.unsqueeze(2)
    heads, rows, outer, inner = tensor.shape
    return ViewStruct(tensor.data_ptr(), *tensor.stride(), heads, rows, outer, inner, STORAGE[tensor.dtype], joint)


def view_table(tensors: Sequence[Tensor], joints: int = 1) -> ctypes.Array:
    """Descriptors of a joint-major list in `joints` equal runs."""
    run = max(1, len(tensors) // joints)
    return (ViewStruct * max(1, len(tensors)))(*[view_struct(t, i // run) for i, t in enumerate(tensors)])
