"""square_sums: row sums of squares and of absolute values over many strided views, in one pass over all of them.

Computes, for each joint, head and row, Σ x² and Σ |x| over the columns of the joint's views (docs/mathematics.md).
Moves every entry once; a program's partial sums, written and read again, add 0.2% (rows) to 4% (3×3 convolutions).
Launch: one program per (view, head, block of rows, run of column tiles); a second, small launch adds the partial sums
in the order of the views, so the bits depend on the shapes alone. Where nothing was split there is no second launch.
Loses to torch where one small tensor is all there is: building and moving the table costs more than two reductions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from teleport_fast.kernels.configuration import Configuration
from teleport_fast.kernels.views import (
    ALIGNED_COLUMNS,
    ALIGNED_ROWS,
    ANY_COLUMNS,
    ANY_ROWS,
    TRITON_TYPES,
    TYPE_NAMES,
    accumulator,
    describe,
    launches_on,
    open_view,
    program_view,
    split_stream,
    streaming_place,
    streaming_steps,
    tables,
    tile,
)

# Entries of a tile and warps, by bytes of an entry. Chosen so that nothing spills on any target
# (bench/resources.md); speed unmeasured, no GPU was at hand.
TUNED = {2: (4096, 16), 4: (2048, 8), 8: (2048, 8)}
# Tiles per program: fewer than 4 and the partial sums pass 5% of the traffic; programs to aim at: unmeasured.
FEWEST_TILES, MOST_TILES, PROGRAMS = 8, 32, 2048
REDUCE_BLOCK = 256


@triton.jit
def _sum_tiles(view, place, partial, DTYPE: tl.constexpr, ACC: tl.constexpr, LAYOUT: tl.constexpr,
               ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    head, row, split, first, last = streaming_place(view, place, ROWS, COLUMNS)
    rows = row + tl.arange(0, ROWS)
    opened = open_view(view, head, DTYPE, LAYOUT)
    squares = tl.zeros((ROWS, COLUMNS), ACC)
    l1 = tl.zeros((ROWS, COLUMNS), ACC)
    for step in tl.range(first, last):
        pointers, mask = tile(opened, rows, step, LAYOUT, COLUMNS)
        x = tl.load(pointers, mask=mask, other=0.0).to(ACC)
        squares += x * x
        l1 += tl.abs(x)
    # partial is (2, slots, rows of a joint); the table's extra fields are this view's first slot and the plane's size.
    h = tl.load(view + 2)
    out = partial + (tl.load(view + 10) + split) * tl.load(view + 1) * h + head * h + rows
    tl.store(out, tl.sum(squares, 1), mask=rows < h)
    tl.store(out + tl.load(view + 11), tl.sum(l1, 1), mask=rows < h)


@triton.jit
def partial_kernel(views, programs, partial, DTYPE: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr):
    view, place = program_view(views, programs)
    layout = tl.load(view + 9)
    if layout == ALIGNED_COLUMNS:
        _sum_tiles(view, place, partial, DTYPE, ACC, ALIGNED_COLUMNS, 8, TILE // 8)
    elif layout == ALIGNED_ROWS:
        _sum_tiles(view, place, partial, DTYPE, ACC, ALIGNED_ROWS, 64, TILE // 64)
    elif layout == ANY_COLUMNS:
        _sum_tiles(view, place, partial, DTYPE, ACC, ANY_COLUMNS, 128, TILE // 128)
    else:
        _sum_tiles(view, place, partial, DTYPE, ACC, ANY_ROWS, 64, TILE // 64)


@triton.jit
def reduce_kernel(partial, first_slots, out, joint_rows, plane, BLOCK: tl.constexpr):
    """out[sum, joint, row] = Σ over the joint's slots, in order."""
    joint, which = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < joint_rows
    total = tl.zeros((BLOCK,), out.dtype.element_ty)
    for slot in tl.range(tl.load(first_slots + joint), tl.load(first_slots + joint + 1)):
        total += tl.load(partial + which * plane + slot * joint_rows + rows, mask=inside, other=0.0)
    tl.store(out + (which * tl.num_programs(1) + joint) * joint_rows + rows, total, mask=inside)


def square_sums(tensors: Sequence[Tensor], joints: int = 1) -> tuple[Tensor, Tensor]:
    """Sums of squares and of absolute values over the columns of each joint's views; see `ops.square_sums`."""
    if not tensors or len(tensors) % joints:
        raise ValueError(f"tensors must be {joints} equal runs, got {len(tensors)} tensors; pass one run per joint")
    heads, h = tensors[0].shape[:2]
    if any(t.shape[:2] != (heads, h) for t in tensors):
        raise ValueError(f"all views must be ({heads}, {h}, ...), got {[tuple(t.shape) for t in tensors]}")
    device = tensors[0].device
    acc = torch.float64 if any(accumulator(t.dtype) == torch.float64 for t in tensors) else torch.float32
    described = [describe(tensor) for tensor in tensors]
    blocks = [streaming_steps(row, TUNED[t.element_size()][0]) for row, t in zip(described, tensors, strict=True)]
    tiles = min(max(sum(r * steps for r, steps in blocks) // PROGRAMS, FEWEST_TILES), MOST_TILES)
    parts = [split_stream(row, TUNED[t.element_size()][0], tiles) for row, t in zip(described, tensors, strict=True)]
    splits = [count for _, count in parts]
    run = len(tensors) // joints
    first_slots = [sum(splits[: joint * run]) for joint in range(joints + 1)]
    partial = torch.empty((2, first_slots[-1], heads * h), dtype=acc, device=device)
    for index, row in enumerate(described):
        row[10:12] = sum(splits[:index]), partial[0].numel()
    with launches_on(device):
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            mine = [i for i, t in enumerate(tensors) if t.dtype == dtype]
            programs = [parts[i][0] * parts[i][1] for i in mine]
            views, table, slots, grid = tables([described[i] for i in mine], programs, device, first_slots)
            entries, warps = TUNED[dtype.itemsize]
            if grid:
                partial_kernel[(grid,)](
                    views, table, partial, TRITON_TYPES[dtype], TRITON_TYPES[acc], entries, num_warps=warps
                )
        if first_slots == list(range(joints + 1)):
            out = partial
        else:
            out = torch.empty((2, joints, heads * h), dtype=acc, device=device)
            if out.numel():
                grid_of_rows = (triton.cdiv(heads * h, REDUCE_BLOCK), joints, 2)
                reduce_kernel[grid_of_rows](partial, slots, out, heads * h, partial[0].numel(), REDUCE_BLOCK)
    return out[0].view(joints * heads, h), out[1].view(joints * heads, h)


def shipped() -> Iterator[Configuration]:
    """Every configuration that `square_sums` can launch."""
    pointers = {"views": "*i64", "programs": "*i64"}
    for dtype, name in TYPE_NAMES.items():
        acc = accumulator(dtype)
        entries, warps = TUNED[dtype.itemsize]
        types = pointers | {"partial": f"*{TYPE_NAMES[acc]}"}
        constants = {"DTYPE": TRITON_TYPES[dtype], "ACC": TRITON_TYPES[acc], "TILE": entries}
        yield Configuration(f"square_sums {name}", partial_kernel, types, constants, warps)
    for name in ("fp32", "fp64"):
        types = {"partial": f"*{name}", "first_slots": "*i64", "out": f"*{name}", "joint_rows": "i32", "plane": "i32"}
        yield Configuration(f"square_sums reduce {name}", reduce_kernel, types, {"BLOCK": REDUCE_BLOCK})
