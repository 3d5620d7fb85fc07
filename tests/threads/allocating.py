"""Under failing.cpp: every allocation of every C++ op fails once. Prints, as JSON, what each call asked for and what was wrong after.

    g++ -std=c++17 -shared -fPIC -O1 tests/threads/failing.cpp -o failing.so -ldl
    LD_PRELOAD=./failing.so OMP_NUM_THREADS=2 python tests/threads/allocating.py
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path

import torch
from calls import CALLS, Call, Maker, call

import teleport_fast as tf
from teleport_fast import ops


def of_the_library() -> tuple[int, int]:
    """The addresses of the C++ ops' code."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines() if line.endswith("/_ops.so")]
    places = [place for address, *_ in lines for place in address.split("-")]
    return min(int(place, 16) for place in places), max(int(place, 16) for place in places)


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def problems(one: Call, fail: Callable[[int], int]) -> tuple[int, list[str]]:
    """How many allocations a call asks for, and what was wrong after one of them had failed."""
    before = [tensor.clone() for tensor in one.tensors()]

    def again() -> list[torch.Tensor]:
        for tensor, start in zip(one.tensors(), before, strict=True):
            tensor.copy_(start)
        return one.results()

    expected = again()
    fail(0)
    again()
    count, found = fail(0), []
    for n in range(1, count + 1):
        for tensor, start in zip(one.tensors(), before, strict=True):
            tensor.copy_(start)
        fail(n)
        try:
            one.run()
            found.append(f"{n}: no error")
        except MemoryError:
            pass
        except RuntimeError as error:
            found.append(f"{n}: {str(error).splitlines()[0]}")
        fail(0)
        if not same(one.tensors(), before):
            found.append(f"{n}: wrote before it raised")
        elif n == count and not same(one.results(), expected):
            found.append(f"{n}: another result when it is called again")
    return count, found


def control() -> Call:
    """What writes and then raises must be found."""
    x, M = torch.ones(3), Maker(torch.float32, False, 0).matrix(2, 4, 4)
    return Call(lambda: (x.mul_(2), ops.matrix_exp(M))[1], [x], [M])


def main() -> None:
    torch.set_num_threads(2)
    with tf.set_backend("cpp"):
        shim, (begin, end) = ctypes.CDLL(None), of_the_library()
        shim.fail_allocation.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_long]
        shim.fail_allocation.restype = ctypes.c_long

        def fail(n: int) -> int:
            return int(shim.fail_allocation(begin, end, n))

        found = {name: problems(call(name), fail) for name in CALLS}
        found["control"] = problems(control(), fail)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
