"""rotate_step_: turn the gradient, step in the turned basis, turn back and update, in one pass (docs/mathematics.md).

Computes G' = L G, m ← β₁ m + (1 − β₁) G', v ← β₂ v + (1 − β₂) G'², U = m̂ / (√v̂ + eps) or sign m, A ← keep A − lr Lᵀ U.
Moves 4 entries in and 3 out per parameter, what Adam alone moves; the matrix is read once per program up to h = 16, and above
twice per tile, from cache, since held in registers it spilled. A turn on the right is the same turn of the transposed view.
Launch: one program per (entry, head, run of column tiles); a tile holds all h rows of its columns. h ≤ 128 in float32, 32 in
other types; two sides, wider ones and row norms go to BLAS, with Adam's or sign's pointwise part in one launch between the
products. Products run on CUDA cores in float32 ("ieee", no tf32): U has no storage type to be exact in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from teleport_fast.kernels.configuration import Configuration
from teleport_fast.kernels.gram import padded
from teleport_fast.kernels.group_action import _matrix
from teleport_fast.kernels.teleport_adamw import _bits, _flat, _number
from teleport_fast.kernels.views import (
    ALIGNED_COLUMNS,
    ALIGNED_ROWS,
    ANY_COLUMNS,
    ANY_ROWS,
    FIELDS,
    TRITON_TYPES,
    TYPE_NAMES,
    accumulator,
    describe,
    launches_on,
    open_view,
    split_stream,
    streaming_place,
    streaming_steps,
    tables,
    tile,
)

# Columns of a tile and warps, by bytes of a parameter's entry and padded width, those that spill on no target: at h = 64 two and
# eight bytes spilled 40 on sm_100, and 32 columns of four bytes at h = 128 32 on sm_90. Speed unmeasured, no GPU was at hand.
TUNED = {
    2: {16: (32, 4), 32: (32, 4)},
    4: {16: (32, 4), 32: (32, 4), 64: (32, 8), 128: (16, 8)},
    8: {16: (32, 4), 32: (16, 4)},
}
# Entries of a pointwise tile and its warps; 1024 of eight bytes spilled 24 on sm_80.
POINTWISE, WARPS = 512, 8
# Share of the traffic that reading the matrix may have, programs to aim at, tiles of a pointwise program: unmeasured.
MATRIX_SHARE, PROGRAMS, TILES = 0.04, 2048, 8
ADAM, ROW_NORM = 0, 2


@triton.jit
def _map(turned, m, v, numbers, ACC: tl.constexpr, BASE: tl.constexpr):
    """(U, m, v) once the moments have taken up the turned gradient."""
    m = m * _number(numbers + 3, ACC) + _number(numbers + 4, ACC) * turned
    u = m * _number(numbers + 8, ACC) + _number(numbers + 9, ACC) * turned
    if BASE == 0:
        v = v * _number(numbers + 5, ACC) + _number(numbers + 6, ACC) * turned * turned
        u = u / (tl.sqrt(v) / _number(numbers + 7, ACC) + _number(numbers + 2, ACC))
    else:
        u = (u > 0).to(ACC) - (u < 0).to(ACC)
    return u, m, v


@triton.jit
def _step_tiles(view, head, first, last, numbers, PARAMETER: tl.constexpr, GRADIENT: tl.constexpr, FIRST: tl.constexpr,
                SECOND: tl.constexpr, ACC: tl.constexpr, LAYOUT: tl.constexpr, BASE: tl.constexpr, H: tl.constexpr,
                K: tl.constexpr):  # fmt: skip
    PIECES: tl.constexpr = H > 16
    p_view = open_view(view, head, PARAMETER, LAYOUT)
    g_view = open_view(view + FIELDS, head, GRADIENT, LAYOUT)
    m_view = open_view(view + 2 * FIELDS, head, FIRST, LAYOUT)
    v_view = open_view(view + 3 * FIELDS, head, SECOND, LAYOUT)
    rows = tl.arange(0, H)
    keep, rate = _number(numbers, ACC), _number(numbers + 1, ACC)
    if not PIECES:
        matrix = _matrix(view, head, 0, ACC, ACC, H, H)
    for step in tl.range(first, last):
        if PIECES:
            turned = tl.zeros((H, K), ACC)
            for row in tl.range(0, H, 16):
                g_at, g_mask = tile(g_view, row + tl.arange(0, 16), step, LAYOUT, K)
                x = tl.load(g_at, mask=g_mask, other=0.0).to(ACC)
                piece = _matrix(view, head, row, ACC, ACC, H, 16)
                turned = tl.dot(piece, x, turned, input_precision="ieee", out_dtype=ACC)
        else:
            g_at, g_mask = tile(g_view, rows, step, LAYOUT, K)
            x = tl.load(g_at, mask=g_mask, other=0.0).to(ACC)
            turned = tl.dot(matrix, x, input_precision="ieee", out_dtype=ACC)
        m_at, mask = tile(m_view, rows, step, LAYOUT, K)
        m = tl.load(m_at, mask=mask, other=0.0).to(ACC)
        v = m
        if BASE == 0:
            v_at = tile(v_view, rows, step, LAYOUT, K)[0]
            v = tl.load(v_at, mask=mask, other=0.0).to(ACC)
        u, m, v = _map(turned, m, v, numbers, ACC, BASE)
        tl.store(m_at, m.to(FIRST), mask=mask)
        if BASE == 0:
            tl.store(v_at, v.to(SECOND), mask=mask)
        # Rows that are not there would be 0 / eps, NaN where eps is 0.
        u = tl.where(mask, u, 0.0)
        if PIECES:
            for row in tl.range(0, H, 16):
                column = tl.trans(_matrix(view, head, row, ACC, ACC, H, 16))
                part = tl.dot(column, u, input_precision="ieee", out_dtype=ACC)
                p_at, p_mask = tile(p_view, row + tl.arange(0, 16), step, LAYOUT, K)
                p = tl.load(p_at, mask=p_mask, other=0.0).to(ACC)
                tl.store(p_at, (p * keep - rate * part).to(PARAMETER), mask=p_mask)
        else:
            back = tl.dot(tl.trans(matrix), u, input_precision="ieee", out_dtype=ACC)
            p_at = tile(p_view, rows, step, LAYOUT, K)[0]
            p = tl.load(p_at, mask=mask, other=0.0).to(ACC)
            tl.store(p_at, (p * keep - rate * back).to(PARAMETER), mask=mask)


@triton.jit
def rotate_kernel(views, programs, numbers, tiles, PARAMETER: tl.constexpr, GRADIENT: tl.constexpr, FIRST: tl.constexpr,
                  SECOND: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr, BASE: tl.constexpr, H: tl.constexpr,
                  K: tl.constexpr):  # fmt: skip
    program = programs + 2 * tl.program_id(0).to(tl.int64)
    # Four rows of the table per entry: parameter, gradient, first moment, second moment.
    view = views + 4 * FIELDS * tl.load(program)
    place = tl.load(program + 1).to(tl.int32)
    steps = (tl.load(view + 3) * tl.cdiv(tl.load(view + 4), K)).to(tl.int32)
    splits = tl.cdiv(steps, tiles)
    head = (place // splits).to(tl.int64)
    first = place % splits * tiles
    last = tl.minimum(steps, first + tiles)
    layout = tl.load(view + 9)
    COLUMNS: tl.constexpr = ALIGNED_COLUMNS if ALIGNED else ANY_COLUMNS
    ROWS: tl.constexpr = ALIGNED_ROWS if ALIGNED else ANY_ROWS
    if (layout == ALIGNED_COLUMNS) | (layout == ANY_COLUMNS):
        _step_tiles(view, head, first, last, numbers, PARAMETER, GRADIENT, FIRST, SECOND, ACC, COLUMNS, BASE, H, K)
    else:
        _step_tiles(view, head, first, last, numbers, PARAMETER, GRADIENT, FIRST, SECOND, ACC, ROWS, BASE, H, K)


@triton.jit
def _map_tiles(view, place, numbers, FIRST: tl.constexpr, SECOND: tl.constexpr, ACC: tl.constexpr,
               LAYOUT: tl.constexpr, BASE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    head, row, _, first, last = streaming_place(view, place, ROWS, COLUMNS)
    rows = row + tl.arange(0, ROWS)
    x_view = open_view(view, head, ACC, LAYOUT)
    m_view = open_view(view + FIELDS, head, FIRST, LAYOUT)
    v_view = open_view(view + 2 * FIELDS, head, SECOND, LAYOUT)
    for step in tl.range(first, last):
        x_at, mask = tile(x_view, rows, step, LAYOUT, COLUMNS)
        m_at = tile(m_view, rows, step, LAYOUT, COLUMNS)[0]
        m = tl.load(m_at, mask=mask, other=0.0).to(ACC)
        v = m
        if BASE == 0:
            v_at = tile(v_view, rows, step, LAYOUT, COLUMNS)[0]
            v = tl.load(v_at, mask=mask, other=0.0).to(ACC)
        u, m, v = _map(tl.load(x_at, mask=mask, other=0.0), m, v, numbers, ACC, BASE)
        tl.store(x_at, u, mask=mask)
        tl.store(m_at, m.to(FIRST), mask=mask)
        if BASE == 0:
            tl.store(v_at, v.to(SECOND), mask=mask)


@triton.jit
def map_kernel(views, programs, numbers, FIRST: tl.constexpr, SECOND: tl.constexpr, ACC: tl.constexpr,
               BASE: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    program = programs + 2 * tl.program_id(0).to(tl.int64)
    # Three rows of the table per entry: turned gradient, which becomes U, first moment, second moment.
    view = views + 3 * FIELDS * tl.load(program)
    place = tl.load(program + 1).to(tl.int32)
    layout = tl.load(view + 9)
    if layout == ALIGNED_COLUMNS:
        _map_tiles(view, place, numbers, FIRST, SECOND, ACC, ALIGNED_COLUMNS, BASE, 8, TILE // 8)
    elif layout == ANY_COLUMNS:
        _map_tiles(view, place, numbers, FIRST, SECOND, ACC, ANY_COLUMNS, BASE, 128, TILE // 128)
    elif layout == ALIGNED_ROWS:
        _map_tiles(view, place, numbers, FIRST, SECOND, ACC, ALIGNED_ROWS, BASE, 64, TILE // 64)
    else:
        _map_tiles(view, place, numbers, FIRST, SECOND, ACC, ANY_ROWS, BASE, 64, TILE // 64)


@torch.no_grad()
def rotate_step_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    base: int,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    """Step a bucket in its bases and back, in place on parameters and moments; see `ops.rotate_step`."""
    if not parameters or not parameters[0].numel():
        return
    adam = base == ADAM
    rate = lr / (1 - beta1 ** (step + nesterov)) if adam else lr
    ahead = (beta1, 1 - beta1) if nesterov else (1.0, 0.0)
    values = (1 - lr * weight_decay, rate, eps, beta1, 1 - beta1, beta2, 1 - beta2, (1 - beta2**step) ** 0.5, *ahead)
    entries = list(zip(parameters, gradients, first_moments, second_moments if adam else first_moments, strict=True))
    whole = [_one_sided(entry, bool(right)) for entry in entries] if bool(left) != bool(right) else [None]
    if base == ROW_NORM or None in whole or (left or right)[0].shape[-1] > max(TUNED[parameters[0].dtype.itemsize]):
        _apart(entries, left, right, base, values)
        return
    numbers = [_bits(value) for value in values]
    turns = [basis.expand(parameters[0].shape[0], -1, -1) for basis in (left or right)]
    kinds = [tuple(tensor.dtype for tensor in entry) for entry in entries]
    for kind in dict.fromkeys(kinds):
        mine = [(w, b) for w, b, k in zip(whole, turns, kinds, strict=True) if k == kind]
        _launch(mine, kind, base, numbers)  # type: ignore[arg-type]


def _one_sided(entry: Sequence[Tensor], right: bool) -> list[Tensor] | None:
    """An entry as (heads, rows to turn, columns), or None where columns to turn have two strides."""
    if not right:
        return list(entry)
    try:
        return [tensor.view(*tensor.shape[:2], -1).mT for tensor in entry]
    except RuntimeError:
        return None


def _described(tensors: Sequence[Tensor], *extra: int) -> list[list[int]]:
    """Rows of the table for views of one shape that share the loop over tiles."""
    rows = [describe(tensor, *extra) for tensor in tensors]
    if len({tuple(row[1:5]) for row in rows}) > 1:
        rows = [_flat(tensor, *extra) for tensor in tensors]
    elif len({row[9] for row in rows}) == 1:
        return rows
    for row in rows:
        row[9] = ANY_COLUMNS.value
    return rows


def _launch(
    work: Sequence[tuple[Sequence[Tensor], Tensor]], kind: Sequence[torch.dtype], base: int, numbers: list[int]
) -> None:
    acc = accumulator(kind[0])
    first = work[0][0][0]
    h = first.shape[1]
    width = padded(h)
    columns, warps = TUNED[kind[0].itemsize][width]
    rows = [_described(tensors, matrix.data_ptr(), *matrix.stride()) for tensors, matrix in work]
    steps = [described[0][3] * -(-described[0][4] // columns) for described in rows]
    entry_bytes = sum(dtype.itemsize for dtype in kind)
    fewest = int(h * acc.itemsize / (entry_bytes * columns * MATRIX_SHARE)) + 1
    tiles = max(fewest, first.shape[0] * sum(steps) // PROGRAMS)
    programs = [first.shape[0] * -(-count // tiles) for count in steps]
    table = [row for described in rows for row in described]
    views, places, constants, grid = tables(table, programs, first.device, numbers)
    aligned = all(row[9] in (ALIGNED_COLUMNS.value, ALIGNED_ROWS.value) for row in table)
    types = [TRITON_TYPES[dtype] for dtype in (*kind, acc)]
    with launches_on(first.device):
        rotate_kernel[(grid,)](views, places, constants, tiles, *types, aligned, base, width, columns, num_warps=warps)


def _apart(entries: Sequence[Sequence[Tensor]], left: Sequence[Tensor], right: Sequence[Tensor], base: int,
           values: Sequence[float]) -> None:  # fmt: skip
    """Torch's products, and one launch for the pointwise part between them."""
    keep, rate, eps, _, rest1, *_, old, fresh = values
    acc = accumulator(entries[0][0].dtype)
    turned = []
    for i, (_, g, m, _) in enumerate(entries):
        x = g.flatten(2).to(acc)
        x = left[i] @ x if left else x
        x = x @ right[i].mT if right else x
        x = x.clone() if x.data_ptr() == g.data_ptr() else x.contiguous()
        if base == ROW_NORM:
            moment = m.flatten(2).to(acc).lerp(x, rest1)
            m.copy_(moment.view(m.shape))
            moment = moment * old + x * fresh
            x = moment / (moment.square().mean(-1, keepdim=True).sqrt() + eps)
        turned.append(x.view(g.shape))
    if base != ROW_NORM:
        _map_apart(turned, entries, base, [_bits(value) for value in values])
    for i, (p, *_) in enumerate(entries):
        u = turned[i].flatten(2)
        u = u @ right[i] if right else u
        u = left[i].mT @ u if left else u
        p.copy_((p.to(acc) * keep).sub_(u.view(p.shape), alpha=rate))


def _map_apart(turned: Sequence[Tensor], entries: Sequence[Sequence[Tensor]], base: int, numbers: list[int]) -> None:
    kinds = [(m.dtype, v.dtype) for _, _, m, v in entries]
    for kind in dict.fromkeys(kinds):
        rows = [_described((x, m, v)) for x, (_, _, m, v), k in zip(turned, entries, kinds, strict=True) if k == kind]
        counts = [streaming_steps(described[0], POINTWISE) for described in rows]
        tiles = max(TILES, sum(blocks * steps for blocks, steps in counts) // PROGRAMS)
        programs = [blocks * splits for blocks, splits in (split_stream(d[0], POINTWISE, tiles) for d in rows)]
        table = [row for described in rows for row in described]
        views, places, constants, grid = tables(table, programs, turned[0].device, numbers)
        types = [TRITON_TYPES[dtype] for dtype in (*kind, turned[0].dtype)]
        with launches_on(turned[0].device):
            map_kernel[(grid,)](views, places, constants, *types, base, POINTWISE, num_warps=WARPS)


def shipped() -> Iterator[Configuration]:
    """Adam's configurations with gradients of the parameters' type and moments of the accumulator's: the largest."""
    pointers = dict.fromkeys(("views", "programs", "numbers"), "*i64")
    for dtype, name in TYPE_NAMES.items():
        kind, acc = TRITON_TYPES[dtype], TRITON_TYPES[accumulator(dtype)]
        types = {"PARAMETER": kind, "GRADIENT": kind, "FIRST": acc, "SECOND": acc, "ACC": acc}
        for width, (columns, warps) in TUNED[dtype.itemsize].items():
            # Adam holds one more tile than the sign does.
            for aligned in (True, False):
                label = f"rotate_step_ {name} h≤{width}{'' if aligned else ' unaligned'}"
                constants = {**types, "ALIGNED": aligned, "BASE": ADAM, "H": width, "K": columns}
                yield Configuration(label, rotate_kernel, {**pointers, "tiles": "i32"}, constants, warps)
        if dtype == accumulator(dtype):
            constants = {"FIRST": acc, "SECOND": acc, "ACC": acc, "BASE": ADAM, "TILE": POINTWISE}
            yield Configuration(f"rotate_step_ map {name}", map_kernel, pointers, constants, WARPS)
