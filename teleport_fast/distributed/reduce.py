"""Sums over ranks: many small tensors in one all-reduce per group of ranks, and a count of what was sent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from teleport_fast.distributed.layout import Over

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass
class Traffic:
    """What went through `all_reduce_`: collectives and payload bytes; `turned` has the bytes of tensors laid out anew.

    broadcasts, broadcast: what one rank of a group sent to the others, as every rank of it counts.
    """

    reductions: int = 0
    reduced: int = 0
    turns: int = 0
    turned: int = 0
    broadcasts: int = 0
    broadcast: int = 0


@dataclass
class _Meters:
    open: list[Traffic] = field(default_factory=list)


_METERS = _Meters()


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """Count what is communicated inside.

    >>> with counted() as traffic:
    ...     all_reduce_([])
    >>> traffic.reduced
    0
    """
    traffic = Traffic()
    _METERS.open.append(traffic)
    try:
        yield traffic
    finally:
        _METERS.open.remove(traffic)


def note_turn(count: int) -> None:
    """A tensor of so many local bytes is laid out anew by a collective."""
    for traffic in _METERS.open:
        traffic.turns += 1
        traffic.turned += count


def all_reduce_(requests: Iterable[tuple[Tensor, Over]], op: str = "sum") -> None:
    """Replace every tensor by its sum (or "max") over its ranks, in place; one collective per group of ranks and dtype.

    Tensors of one group are flattened into one buffer, in the order given, which every rank must share; dtypes stay as they
    are, so float64 is summed in float64. Every rank of a group gets the same bits. A tensor whose `Over` names no
    dimension stays. Records no gradients. Source: own; tests/distributed/test_reduce.py.
    """
    buckets: dict[tuple[Over, torch.dtype, torch.device], list[Tensor]] = {}
    for tensor, over in requests:
        if over.size > 1:
            buckets.setdefault((over, tensor.dtype, tensor.device), []).append(tensor)
    for (over, _, device), tensors in buckets.items():
        _reduce_bucket_(tensors, over, device, op)


@torch.no_grad()
def _reduce_bucket_(tensors: list[Tensor], over: Over, device: torch.device, op: str) -> None:
    import torch.distributed as dist

    assert over.mesh is not None
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    if device.type != over.mesh.device_type:  # offloaded to a CPU: the mesh's own backend does the sum
        flat = flat.to(over.mesh.device_type)
    for group in over.groups:
        dist.all_reduce(flat, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op], group=group)
        for traffic in _METERS.open:
            traffic.reductions += 1
            traffic.reduced += flat.numel() * flat.element_size()
    for tensor, part in zip(tensors, flat.to(device).split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))


@torch.no_grad()
def broadcast_(tensor: Tensor, source: int, group: ProcessGroup | None, device_type: str) -> Tensor:
    """The tensor of the group's rank number `source`, of one shape on all of them; on the device where it came in.

    device_type: of the devices between which the group sends.
    """
    import torch.distributed as dist

    there = tensor if tensor.device.type == device_type else tensor.to(device_type)
    dist.broadcast(there, group=group, group_src=source)
    for traffic in _METERS.open:
        traffic.broadcasts += 1
        traffic.broadcast += there.numel() * there.element_size()
    return there.to(tensor.device)
