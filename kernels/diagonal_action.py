"""diagonal_action_: rows of many strided views multiplied by their factors, in place, one launch for a whole model.

Computes A[head, row, …] ← (A[head, row, …] + c) · factor[head, row] − c for every view, rounded once, to the view's
type. Moves every entry once in and once out; table and factors add 0.5% at most.
Launch: one program per (view, head, block of rows, run of column tiles), one grid for all views of one storage type.
Loses to torch where one small tensor is all there is: building and moving the table costs more than one multiplication.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

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
    in_order,
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
TUNED = {2: (4096, 8), 4: (2048, 8), 8: (2048, 8)}
# Tiles per program, and programs to aim at: unmeasured.
FEWEST_TILES, MOST_TILES, PROGRAMS = 8, 32, 2048


@triton.jit
def _scale_tiles(view, place, DTYPE: tl.constexpr, ACC: tl.constexpr,
                 LAYOUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    head, row, _, first, last = streaming_place(view, place, ROWS, COLUMNS)
    rows = row + tl.arange(0, ROWS)
    opened = open_view(view, head, DTYPE, LAYOUT)
    # The table's extra fields are the address of the view's factors (heads, h) and the bits of its shift, a float64.
    h = tl.load(view + 2)
    factors = tl.load(view + 10).to(tl.pointer_type(ACC)) + head * h
    factor = tl.load(factors + rows, mask=rows < h, other=0.0)
    shift = tl.load(view + 11).to(tl.float64, bitcast=True).to(ACC)
    for step in tl.range(first, last):
        pointers, mask = tile(opened, rows, step, LAYOUT, COLUMNS)
        x = tl.load(pointers, mask=mask, other=0.0).to(ACC)
        tl.store(pointers, ((x + shift) * factor[:, None] - shift).to(DTYPE), mask=mask)


@triton.jit
def diagonal_kernel(views, programs, DTYPE: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr):
    view, place = program_view(views, programs)
    layout = tl.load(view + 9)
    if layout == ALIGNED_COLUMNS:
        _scale_tiles(view, place, DTYPE, ACC, ALIGNED_COLUMNS, 8, TILE // 8)
    elif layout == ALIGNED_ROWS:
        _scale_tiles(view, place, DTYPE, ACC, ALIGNED_ROWS, 64, TILE // 64)
    elif layout == ANY_COLUMNS:
        _scale_tiles(view, place, DTYPE, ACC, ANY_COLUMNS, 128, TILE // 128)
    else:
        _scale_tiles(view, place, DTYPE, ACC, ANY_ROWS, 64, TILE // 64)


def diagonal_action_(
    tensors: Sequence[Tensor], factors: Tensor, which: Sequence[int], shifts: Sequence[float], joints: int = 1
) -> None:
    """A[head, row, …] ← (A + shifts[i]) · factors[which[i], head, row] − shifts[i] in place; see `ops.diagonal_action`.

    tensors: joint-major list of (heads, h, …) views, any strides, float32, float64, float16 or bfloat16.
    factors: (kinds, joints·heads, h). Views of the same memory move in the list's order, in launches of their own.
    Errors: ValueError if a view does not fit the factors. Source: docs/mathematics.md.
    """
    rows = factors.shape[1] // joints
    for tensor in tensors:
        if tensor.shape[:2] != (rows, factors.shape[2]):
            raise ValueError(
                f"a view must be ({rows}, {factors.shape[2]}, ...) to fit factors {tuple(factors.shape)} of {joints} "
                f"joints, got {tuple(tensor.shape)}"
            )
    if not tensors or not factors.numel():
        return
    for wave in in_order(tensors):
        for dtype in dict.fromkeys(tensors[i].dtype for i in wave):
            mine = [i for i in wave if tensors[i].dtype == dtype]
            _launch([tensors[i] for i in mine], [i * joints // len(tensors) for i in mine],
                    [which[i] for i in mine], [shifts[i] for i in mine], factors, rows)  # fmt: skip


def _launch(
    tensors: list[Tensor], joint: list[int], which: list[int], shifts: list[float], factors: Tensor, heads: int
) -> None:
    dtype, device = tensors[0].dtype, tensors[0].device
    acc = accumulator(dtype)
    factors = factors.to(acc).contiguous()
    described = []
    for tensor, j, kind, shift in zip(tensors, joint, which, shifts, strict=True):
        (bits,) = struct.unpack("<q", struct.pack("<d", shift))
        described.append(describe(tensor, factors[kind, j * heads].data_ptr(), bits))
    entries, warps = TUNED[dtype.itemsize]
    blocks = [streaming_steps(row, entries) for row in described]
    tiles = min(max(sum(rows * steps for rows, steps in blocks) // PROGRAMS, FEWEST_TILES), MOST_TILES)
    programs = [rows * splits for rows, splits in (split_stream(row, entries, tiles) for row in described)]
    views, table, _, grid = tables(described, programs, device)
    if grid:
        with launches_on(device):
            diagonal_kernel[(grid,)](views, table, TRITON_TYPES[dtype], TRITON_TYPES[acc], entries, num_warps=warps)


def shipped() -> Iterator[Configuration]:
    """Every configuration that `diagonal_action_` launches."""
    for dtype, name in TYPE_NAMES.items():
        entries, warps = TUNED[dtype.itemsize]
        types = {"views": "*i64", "programs": "*i64"}
        constants = {"DTYPE": TRITON_TYPES[dtype], "ACC": TRITON_TYPES[accumulator(dtype)], "TILE": entries}
        yield Configuration(f"diagonal_action_ {name}", diagonal_kernel, types, constants, warps)
