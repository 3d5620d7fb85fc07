"""permutation_action_: rows of many strided views reordered in place, bit by bit, one launch per size of entry.

Computes A[head, row, …] ← A[head, index[head, row], …] for every view. Moves every entry once in and once out; a program
reads its head's index once, 4% of the traffic at most.
Launch: one program per (view, head, run of column tiles) overwrites tile after tile; a tile holds all h rows of its
columns, so nothing that is still to be read is ever overwritten. Rows are picked by address: along contiguous columns
that is as coalesced as a plain load, along contiguous rows a column's picks meet in the first-level cache.
h ≤ 4096 where rows are contiguous, h ≤ 256 else (1024 for 8-byte entries), so that a tile fits the registers and its
rows are whole sectors; wider views go to torch (gather, then copy: twice the traffic).
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
    TYPE_NAMES,
    describe,
    in_order,
    launches_on,
    open_view,
    program_view,
    tables,
    tile,
)

# Entries of a tile and warps. Chosen so that nothing spills on any target (bench/resources.md): 8192 of 4 bytes
# spilled 16 bytes a thread, 16384 of 2 bytes 2,800. Speed unmeasured, no GPU was at hand.
ENTRIES, WARPS = 4096, 16
# Padded widths, and the most columns of a tile: few enough that all configurations compile in CI.
WIDTHS, MOST_COLUMNS = (16, 64, 256, 1024, 4096), 256
SECTOR = 32
# Share of the traffic that reading the index may have, and programs to aim at: unmeasured.
INDEX_SHARE, PROGRAMS = 0.04, 2048
BITS = {2: tl.int16, 4: tl.int32, 8: tl.int64}


@triton.jit
def _permute_tiles(view, head, first, last, DTYPE: tl.constexpr, LAYOUT: tl.constexpr, H: tl.constexpr,
                   K: tl.constexpr):  # fmt: skip
    opened = open_view(view, head, DTYPE, LAYOUT)
    # The table's extra field is the address of the view's index (heads, h). Rows of padding come from row h, which no
    # mask lets through.
    h = tl.load(view + 2)
    rows = tl.arange(0, H)
    source = tl.load(tl.load(view + 10).to(tl.pointer_type(tl.int64)) + head * h + rows, mask=rows < h, other=h)
    for step in tl.range(first, last):
        pointers, mask = tile(opened, source, step, LAYOUT, K)
        x = tl.load(pointers, mask=mask, other=0)
        pointers, mask = tile(opened, rows, step, LAYOUT, K)
        # Every thread's loads come before any thread's store.
        tl.debug_barrier()
        tl.store(pointers, x, mask=mask)


@triton.jit
def permutation_kernel(views, programs, tiles, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, H: tl.constexpr,
                       K: tl.constexpr):  # fmt: skip
    view, place = program_view(views, programs)
    steps = (tl.load(view + 3) * tl.cdiv(tl.load(view + 4), K)).to(tl.int32)
    splits = tl.cdiv(steps, tiles)
    head = (place // splits).to(tl.int64)
    first = place % splits * tiles
    last = tl.minimum(steps, first + tiles)
    layout = tl.load(view + 9)
    COLUMNS: tl.constexpr = ALIGNED_COLUMNS if ALIGNED else ANY_COLUMNS
    ROWS: tl.constexpr = ALIGNED_ROWS if ALIGNED else ANY_ROWS
    if (layout == ALIGNED_COLUMNS) | (layout == ANY_COLUMNS):
        _permute_tiles(view, head, first, last, DTYPE, COLUMNS, H, K)
    else:
        _permute_tiles(view, head, first, last, DTYPE, ROWS, H, K)


def permutation_action_(tensors: Sequence[Tensor], index: Tensor, joints: int = 1) -> None:
    """A[head, row, …] ← A[head, index[head, row], …] in place; see `ops.permutation_action`.

    tensors: joint-major list of (heads, h, …) views, any strides, float32, float64, float16 or bfloat16. index:
    (joints·heads, h) int64, each row a permutation. Views of the same memory move in the list's order, in launches of
    their own. Errors: ValueError if a view does not fit the index. Source: docs/mathematics.md.
    """
    heads, h = index.shape[0] // joints, index.shape[1]
    for tensor in tensors:
        if tensor.shape[:2] != (heads, h):
            raise ValueError(
                f"a view must be ({heads}, {h}, ...) to fit index {tuple(index.shape)} of {joints} joints, "
                f"got {tuple(tensor.shape)}"
            )
    if h < 2:
        return
    index = index.contiguous()
    for wave in in_order(tensors):
        groups: dict[int, list[tuple[Tensor, list[int]]]] = {}
        for i in wave:
            tensor = tensors[i]
            rows = index[i * joints // len(tensors) * heads :][:heads]
            if not tensor.numel():
                continue
            described = describe(tensor, rows.data_ptr())
            if _fits(described, tensor.element_size()):
                groups.setdefault(tensor.element_size(), []).append((tensor, described))
            else:
                picked = rows.reshape(*rows.shape, *[1] * (tensor.dim() - 2))
                tensor.copy_(torch.take_along_dim(tensor, picked, 1))
        for size, work in groups.items():
            _launch(work, size, h)


def _shape(h: int) -> tuple[int, int]:
    """(padded width, columns) of a tile."""
    width = next(w for w in WIDTHS if h <= w)
    return width, min(MOST_COLUMNS, ENTRIES // width)


def _fits(row: list[int], size: int) -> bool:
    h, layout = row[2], row[9]
    if h > WIDTHS[-1]:
        return False
    return layout in (ALIGNED_ROWS.value, ANY_ROWS.value) or _shape(h)[1] * size >= SECTOR


def _launch(work: list[tuple[Tensor, list[int]]], size: int, h: int) -> None:
    width, columns = _shape(h)
    rows = [row for _, row in work]
    steps = [row[3] * -(-row[4] // columns) for row in rows]
    # Columns that a view does not have leave a tile shorter, and the index weighs more.
    fewest = int(8 / (2 * size * columns * INDEX_SHARE)) + 1
    tiles = max(fewest, sum(row[1] * count for row, count in zip(rows, steps, strict=True)) // PROGRAMS)
    programs = [row[1] * -(-count // tiles) for row, count in zip(rows, steps, strict=True)]
    device = work[0][0].device
    views, table, _, grid = tables(rows, programs, device)
    aligned = all(row[9] in (ALIGNED_COLUMNS.value, ALIGNED_ROWS.value) for row in rows)
    with launches_on(device):
        permutation_kernel[(grid,)](views, table, tiles, BITS[size], aligned, width, columns, num_warps=WARPS)


def shipped() -> Iterator[Configuration]:
    """Every configuration that `permutation_action_` launches, by the bits of an entry."""
    types = {"views": "*i64", "programs": "*i64", "tiles": "i32"}
    for size in sorted({dtype.itemsize for dtype in TYPE_NAMES}):
        for width in WIDTHS:
            for aligned in (True, False):
                columns = _shape(width)[1]
                constants = {"DTYPE": BITS[size], "ALIGNED": aligned, "H": width, "K": columns}
                yield Configuration(
                    f"permutation_action_ {8 * size}-bit h≤{width}{'' if aligned else ' unaligned'}",
                    permutation_kernel, types, constants, WARPS,
                )  # fmt: skip
