"""matrix_exp_pair, exp(M) and exp(−M) at once, at the shapes of bench_matrix_exp.py, which times it with pytest too."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from bench_matrix_exp import SIZES, matrices

from teleport_fast.ops import matrix_exp_pair

__all__ = ["OP", "SIZES", "cases"]

OP = "matrix_exp_pair"


def cases(size: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that decide which backend is fastest at width `size`, with about the same work each, and a batch of one."""
    for batch in (1, min(4096, max(1, (1 << 22) // size**3))):
        for norm in (0.125, 1.0, 10.0):
            M = matrices(batch, size, norm, dtype)
            yield f"{batch}x{size} norm {norm}", lambda M=M: matrix_exp_pair(M)
