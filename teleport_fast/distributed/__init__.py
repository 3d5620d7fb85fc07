"""Teleports of tensors that lie on many ranks: what each rank holds, sums over ranks, and moves where the tensors lie."""

from teleport_fast.distributed.layout import Layout, Over, Run, as_dtensor, layout_of, local_part, widest_mesh
from teleport_fast.distributed.reduce import Traffic, all_reduce_, counted

__all__ = [
    "Layout",
    "Over",
    "Run",
    "Traffic",
    "all_reduce_",
    "as_dtensor",
    "counted",
    "layout_of",
    "local_part",
    "widest_mesh",
]
