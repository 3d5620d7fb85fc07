"""Which block of a matrix each rank holds, and the exchange that takes matrices from one such layout to another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from teleport_fast.distributed.layout import Layout, Over
from teleport_fast.distributed.reduce import note_turn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Range = tuple[int, int]
Block = tuple[Range, Range]


@dataclass(frozen=True, eq=False)
class Spread:
    """A matrix as blocks (rows, columns) over the ranks of `group`, of which this one is number `me`.

    The group spans the mesh dimensions over which the matrix is cut; ranks outside it hold copies. It is None for one rank.
    """

    layout: Layout
    over: Over
    group: ProcessGroup | None
    blocks: tuple[Block, ...]
    me: int

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.layout.shape
        return rows, columns

    @property
    def mine(self) -> Block:
        return self.blocks[self.me]

    @property
    def local_shape(self) -> tuple[int, int]:
        (top, bottom), (left, right) = self.mine
        return bottom - top, right - left

    @property
    def replicated(self) -> bool:
        """Whether every rank of the group holds all of it."""
        return all(block == ((0, self.shape[0]), (0, self.shape[1])) for block in self.blocks)

    def keeps_whole(self, axis: int, width: int) -> bool:
        """Whether no rank holds a part of a run of `width` along this axis."""
        return all(begin % width == 0 and end % width == 0 for begin, end in (block[axis] for block in self.blocks))


def spread_of(layout: Layout, over: Over) -> Spread:
    """The blocks of a matrix under this layout, over the ranks of these mesh dimensions, the same on every rank.

    Errors: ValueError where a rank's rows or columns are not one run.
    """
    assert layout.mesh is not None
    group, ranks, me = _group(layout.mesh, over.dims)
    blocks: list[Block] = []
    for rank in ranks:
        coordinate = tuple(int(at) for at in (layout.mesh.mesh == rank).nonzero()[0])
        found: list[Range] = []
        for runs in layout.runs_at(coordinate):
            if len(runs) > 1:
                raise ValueError(
                    f"a matrix of shape {layout.shape} has placements {layout.placements}, where rank {rank} holds rows or "
                    f"columns that do not lie together; shard it so that each rank has one run of them"
                )
            found.append((runs[0].start, runs[0].stop) if runs else (0, 0))
        blocks.append((found[0], found[1]))
    return Spread(layout, over, group, tuple(blocks), me)


_groups: dict[tuple[int, ...], ProcessGroup] = {}


def _group(mesh: DeviceMesh, dims: Sequence[int]) -> tuple[ProcessGroup | None, list[int], int]:
    """The ranks along these mesh dimensions through this one: their group, their global numbers in its order, this one's place."""
    import torch.distributed as dist

    at = mesh.get_coordinate()
    assert at is not None
    chosen: tuple[Any, ...] = tuple(slice(None) if d in dims else at[d] for d in range(mesh.ndim))
    ranks = sorted(int(rank) for rank in mesh.mesh[chosen].flatten())
    if len(ranks) == 1:
        return None, ranks, 0
    if len(dims) == 1:
        group = mesh.get_group(dims[0])
    elif len(ranks) == dist.get_world_size():
        assert dist.group.WORLD is not None
        group = dist.group.WORLD
    else:
        group = _groups.get(tuple(ranks)) or dist.new_group(ranks, use_local_synchronization=True)
        _groups[tuple(ranks)] = group
    ordered = dist.get_process_group_ranks(group)
    return group, ordered, ordered.index(dist.get_rank())


def overlap(one: Block, other: Block) -> Block | None:
    """The common entries of two blocks.

    >>> overlap(((0, 2), (0, 4)), ((0, 8), (3, 4)))
    ((0, 2), (3, 4))
    """
    found = [(max(a[0], b[0]), min(a[1], b[1])) for a, b in zip(one, other, strict=True)]
    return (found[0], found[1]) if all(begin < end for begin, end in found) else None


def part(tensor: Tensor, block: Block, wanted: Block) -> Tensor:
    """The entries `wanted` of a matrix of which the tensor is `block`."""
    rows, columns = (slice(want[0] - at[0], want[1] - at[0]) for at, want in zip(block, wanted, strict=True))
    return tensor[rows, columns]


def exchange(tensors: Sequence[Tensor], moves: Sequence[tuple[Spread, Spread]]) -> list[Tensor]:
    """Each tensor, this rank's block under the first layout, becomes that under the second; new tensors.

    One all-to-all for all tensors of one group, dtype and device; each rank sends (1 − 1/ranks) of what it holds. A layout
    that every rank holds whole is cut without a word. All ranks must call it with the same moves in the same order.
    """
    import torch.distributed as dist

    found: dict[int, Tensor] = {}
    buckets: dict[tuple[Any, ...], list[int]] = {}
    for index, (tensor, (before, after)) in enumerate(zip(tensors, moves, strict=True)):
        if before.replicated:
            found[index] = part(tensor, before.mine, after.mine).contiguous()
        else:
            buckets.setdefault((before.group, tensor.dtype, tensor.device, device_type(before)), []).append(index)
    for (group, dtype, device, kind), run in buckets.items():
        sent: list[Tensor] = []
        out_sizes, in_sizes = [], []
        expected: list[list[tuple[int, Block]]] = []
        for k in range(dist.get_world_size(group)):
            out, back = 0, list[tuple[int, Block]]()
            for index in run:
                before, after = moves[index]
                going, coming = overlap(before.mine, after.blocks[k]), overlap(before.blocks[k], after.mine)
                if going is not None:
                    sent.append(part(tensors[index], before.mine, going).reshape(-1))
                    out += sent[-1].numel()
                if coming is not None:
                    back.append((index, coming))
            out_sizes.append(out)
            in_sizes.append(sum(_entries(block) for _, block in back))
            expected.append(back)
        there = torch.device(kind) if device.type != kind else device
        outgoing = torch.cat(sent).to(there) if sent else torch.empty(0, dtype=dtype, device=there)
        incoming = torch.empty(sum(in_sizes), dtype=dtype, device=there)
        dist.all_to_all_single(incoming, outgoing, in_sizes, out_sizes, group=group)
        own = out_sizes[moves[run[0]][0].me]
        note_turn((outgoing.numel() - own) * outgoing.element_size())
        incoming = incoming.to(device)
        for index in run:
            found[index] = torch.empty(moves[index][1].local_shape, dtype=dtype, device=device)
        at = 0
        for index, block in (pair for back in expected for pair in back):
            whole = part(found[index], moves[index][1].mine, block)
            whole.copy_(incoming[at : at + _entries(block)].view(whole.shape))
            at += _entries(block)
    return [found[index] for index in range(len(tensors))]


def _entries(block: Block) -> int:
    return math.prod(end - begin for begin, end in block)


def device_type(spread: Spread) -> str:
    assert spread.layout.mesh is not None
    return str(spread.layout.mesh.device_type)
