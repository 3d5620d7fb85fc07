"""group_action_: A₊ → g A₊ and A₋ → g⁻ᵀ A₋ in place on strided head views: weights, gradients, momenta in one launch.

Computes one h × h product per column. Moves every entry once in and once out and no copy of it; g is read once per
program, 4% of the traffic at most, so a program stays on one head for as many columns as that takes. From h = 65 in
float32 and float64 the matrix does not fit beside the tile and is read again, from cache, for every tile: twice the
traffic at h = 128 in float32, 3 times in float64 (tiles of 128 columns would make it 1.5 times, and spill 1,100 bytes).
Launch: one program per (view, head, run of column tiles) overwrites tile after tile; a tile holds all h rows of its
columns, so nothing that is still to be read is ever overwritten. h ≤ 128; wider h goes to BLAS (gather, product,
scatter), which wins where the product outweighs the copies.
float32 runs on CUDA cores ("ieee", no tf32). Half types run on tensor cores with g split into two halves of the storage
type, g = high + low: twice the products, and g loses nothing that the result's rounding would keep.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from teleport_fast.kernels.configuration import Configuration
from teleport_fast.kernels.gram import padded
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
    tables,
    tile,
)

# Columns of a tile, warps and pipeline stages, by bytes of an entry and padded width. Chosen so that nothing spills on any target
# (bench/resources.md); speed unmeasured, no GPU was at hand.
TUNED = {
    2: {16: (128, 4, 3), 32: (128, 4, 3), 64: (64, 4, 3), 128: (32, 8, 3)},
    4: {16: (128, 4, 3), 32: (64, 4, 3), 64: (32, 8, 3), 128: (64, 8, 1)},
    8: {16: (64, 4, 3), 32: (32, 4, 3), 64: (32, 8, 3), 128: (32, 8, 3)},
}
WIDEST = 128
# Share of the traffic that reading g may have, and programs to aim at: unmeasured.
MATRIX_SHARE, PROGRAMS = 0.04, 2048


@triton.jit
def _matrix(view, head, first, MATRIX: tl.constexpr, ACC: tl.constexpr, H: tl.constexpr, K: tl.constexpr):
    """Columns first … first + K of the head's matrix; its address and strides are the table's extra fields."""
    h = tl.load(view + 2)
    i, j = tl.arange(0, H)[:, None], first + tl.arange(0, K)[None, :]
    base = tl.load(view + 10).to(tl.pointer_type(MATRIX)) + head * tl.load(view + 11)
    pointers = base + i * tl.load(view + 12) + j * tl.load(view + 13)
    return tl.load(pointers, mask=(i < h) & (j < h), other=0.0).to(ACC)


@triton.jit
def _turn_tiles_in_pieces(view, head, first, last, DTYPE: tl.constexpr, MATRIX: tl.constexpr, ACC: tl.constexpr,
                          LAYOUT: tl.constexpr, H: tl.constexpr, K: tl.constexpr):  # fmt: skip
    opened = open_view(view, head, DTYPE, LAYOUT)
    for step in tl.range(first, last):
        turned = tl.zeros((H, K), ACC)
        for row in tl.range(0, H, 16):
            pointers, mask = tile(opened, row + tl.arange(0, 16), step, LAYOUT, K)
            x = tl.load(pointers, mask=mask, other=0.0)
            matrix = _matrix(view, head, row, MATRIX, ACC, H, 16)
            turned = tl.dot(matrix, x, turned, input_precision="ieee", out_dtype=ACC)
        pointers, mask = tile(opened, tl.arange(0, H), step, LAYOUT, K)
        # Every thread's loads come before any thread's store.
        tl.debug_barrier()
        tl.store(pointers, turned, mask=mask)


@triton.jit
def _turn_tiles(view, head, first, last, DTYPE: tl.constexpr, MATRIX: tl.constexpr, ACC: tl.constexpr,
                LAYOUT: tl.constexpr, H: tl.constexpr, K: tl.constexpr):  # fmt: skip
    opened = open_view(view, head, DTYPE, LAYOUT)
    rows = tl.arange(0, H)
    matrix = _matrix(view, head, 0, MATRIX, ACC, H, H)
    high = matrix.to(DTYPE)
    low = (matrix - high.to(ACC)).to(DTYPE)
    for step in tl.range(first, last):
        pointers, mask = tile(opened, rows, step, LAYOUT, K)
        x = tl.load(pointers, mask=mask, other=0.0)
        turned = tl.dot(high, x, input_precision="ieee", out_dtype=ACC)
        if DTYPE.primitive_bitwidth == 16 and MATRIX.primitive_bitwidth > 16:
            turned = tl.dot(low, x, turned, input_precision="ieee", out_dtype=ACC)
        # Every thread's loads come before any thread's store.
        tl.debug_barrier()
        tl.store(pointers, turned.to(DTYPE), mask=mask)


@triton.jit
def action_kernel(views, programs, tiles, DTYPE: tl.constexpr, MATRIX: tl.constexpr, ACC: tl.constexpr,
                  ALIGNED: tl.constexpr, H: tl.constexpr, K: tl.constexpr):  # fmt: skip
    view, place = program_view(views, programs)
    steps = (tl.load(view + 3) * tl.cdiv(tl.load(view + 4), K)).to(tl.int32)
    splits = tl.cdiv(steps, tiles)
    head = (place // splits).to(tl.int64)
    first = place % splits * tiles
    last = tl.minimum(steps, first + tiles)
    layout = tl.load(view + 9)
    PIECES: tl.constexpr = H > 64 and DTYPE.primitive_bitwidth > 16
    COLUMNS: tl.constexpr = ALIGNED_COLUMNS if ALIGNED else ANY_COLUMNS
    ROWS: tl.constexpr = ALIGNED_ROWS if ALIGNED else ANY_ROWS
    if (layout == ALIGNED_COLUMNS) | (layout == ANY_COLUMNS):
        if PIECES:
            _turn_tiles_in_pieces(view, head, first, last, DTYPE, MATRIX, ACC, COLUMNS, H, K)
        else:
            _turn_tiles(view, head, first, last, DTYPE, MATRIX, ACC, COLUMNS, H, K)
    else:
        if PIECES:
            _turn_tiles_in_pieces(view, head, first, last, DTYPE, MATRIX, ACC, ROWS, H, K)
        else:
            _turn_tiles(view, head, first, last, DTYPE, MATRIX, ACC, ROWS, H, K)


@torch.no_grad()
def group_action_(
    plus: Sequence[Tensor], minus: Sequence[Tensor], g: Tensor, g_inverse_t: Tensor | None = None, joints: int = 1
) -> None:
    """Views in `plus` become g A, those in `minus` g⁻ᵀ A, in place; see `ops.group_action`.

    plus, minus: joint-major lists of (heads, h, …) views, any strides, float32, float64, float16 or bfloat16.
    g, g_inverse_t: (joints·heads, h, h), any strides; g⁻ᵀ is computed where it is not given.
    Errors: ValueError if a list does not divide into `joints` equal runs or a view does not fit g.
    """
    if len(plus) % joints or len(minus) % joints or len(g) % joints:
        raise ValueError(
            f"plus, minus and g must be {joints} equal runs, got {len(plus)}, {len(minus)} and {len(g)}; "
            f"pass one run per joint"
        )
    heads, h = len(g) // joints, g.shape[-1]
    if minus and g_inverse_t is None:
        # inv_ex leaves its error code on the device; inv reads it back.
        g_inverse_t = torch.linalg.inv_ex(g)[0].mT
    work = []
    for tensors, matrix in ((plus, g), (minus, g_inverse_t)):
        for index, tensor in enumerate(tensors):
            joint = index // (len(tensors) // joints)
            assert matrix is not None
            if tensor.shape[:2] != (heads, h):
                raise ValueError(
                    f"a view must be ({heads}, {h}, ...) to fit g {tuple(g.shape)}, got {tuple(tensor.shape)}"
                )
            work.append((tensor, matrix[joint * heads : (joint + 1) * heads]))
    kinds = [(t.dtype, matrix.dtype, t.device) for t, matrix in work]
    for kind in dict.fromkeys(kinds):
        mine = [pair for pair, k in zip(work, kinds, strict=True) if k == kind and pair[0].numel()]
        if not mine:
            continue
        if h > WIDEST:
            for tensor, matrix in mine:
                wide = accumulator(tensor.dtype)
                tensor.copy_((matrix.to(wide) @ tensor.flatten(2).to(wide)).view(tensor.shape))
        else:
            _launch(mine, h, *kind)


def _launch(
    work: list[tuple[Tensor, Tensor]], h: int, dtype: torch.dtype, matrix_dtype: torch.dtype, device: torch.device
) -> None:
    width = padded(h)
    columns, warps, stages = TUNED[dtype.itemsize][width]
    rows = [describe(t, matrix.data_ptr(), *matrix.stride()) for t, matrix in work]
    steps = [row[3] * -(-row[4] // columns) for row in rows]
    fewest = int(h * matrix_dtype.itemsize / (2 * dtype.itemsize * columns * MATRIX_SHARE)) + 1
    tiles = max(fewest, sum(row[1] * count for row, count in zip(rows, steps, strict=True)) // PROGRAMS)
    programs = [row[1] * -(-count // tiles) for row, count in zip(rows, steps, strict=True)]
    views, table, _, grid = tables(rows, programs, device)
    aligned = all(row[9] in (ALIGNED_COLUMNS.value, ALIGNED_ROWS.value) for row in rows)
    types = TRITON_TYPES[dtype], TRITON_TYPES[matrix_dtype], TRITON_TYPES[accumulator(dtype)]
    with launches_on(device):
        action_kernel[(grid,)](views, table, tiles, *types, aligned, width, columns, num_warps=warps, num_stages=stages)


def shipped() -> Iterator[Configuration]:
    """Every configuration that `group_action_` launches with a matrix of the accumulator's type."""
    for dtype, name in TYPE_NAMES.items():
        acc = TRITON_TYPES[accumulator(dtype)]
        types = {"views": "*i64", "programs": "*i64", "tiles": "i32"}
        for width, (columns, warps, stages) in TUNED[dtype.itemsize].items():
            for aligned in (True, False):
                constants = {"DTYPE": TRITON_TYPES[dtype], "MATRIX": acc, "ACC": acc, "ALIGNED": aligned}
                yield Configuration(
                    f"group_action_ {name} h≤{width}{'' if aligned else ' unaligned'}", action_kernel,
                    types, constants | {"H": width, "K": columns}, warps, stages,
                )  # fmt: skip
