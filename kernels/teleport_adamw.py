"""teleport_adamw_: a diagonal move and AdamW's step in one pass over parameters, gradients and both moments.

Computes p ← (p + c) f − c, g ← g f', m ← m f', v ← v f'² by rows (docs/mathematics.md), then AdamW's update of p, m, v;
the gradient is only read. Moves 4 entries in and 3 out per parameter, what AdamW alone moves; teleporting apart would
add 3 in and 3 out. Launch: one program per (entry, head, block of rows, run of column tiles), one grid per storage type.
Loses to torch's fused AdamW where few, small tensors are all there is: building and moving the table costs more.
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

# Entries of a tile and warps, by bytes of an entry. Chosen so that nothing spills on any target
# (bench/resources.md); speed unmeasured, no GPU was at hand.
TUNED = {2: (1024, 8), 4: (1024, 8), 8: (1024, 8)}
# Tiles per program, and programs to aim at: unmeasured.
FEWEST_TILES, MOST_TILES, PROGRAMS = 8, 32, 2048


@triton.jit
def _number(place, ACC: tl.constexpr):
    """A float64 that travels as its bits in an int64 table: as an argument it would arrive as float32."""
    return tl.load(place).to(tl.float64, bitcast=True).to(ACC)


@triton.jit
def _step_tiles(view, place, numbers, DTYPE: tl.constexpr, ACC: tl.constexpr, LAYOUT: tl.constexpr,
                ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    head, row, _, first, last = streaming_place(view, place, ROWS, COLUMNS)
    rows = row + tl.arange(0, ROWS)
    p_view = open_view(view, head, DTYPE, LAYOUT)
    g_view = open_view(view + FIELDS, head, DTYPE, LAYOUT)
    m_view = open_view(view + 2 * FIELDS, head, DTYPE, LAYOUT)
    v_view = open_view(view + 3 * FIELDS, head, DTYPE, LAYOUT)
    # The extra fields: addresses of the parameter's and the gradient's factors (heads, h), and the bits of the shift.
    h = tl.load(view + 2)
    f_parameter = tl.load(view + 10).to(tl.pointer_type(ACC)) + head * h + rows
    f_gradient = tl.load(view + 11).to(tl.pointer_type(ACC)) + head * h + rows
    f = tl.load(f_parameter, mask=rows < h, other=0.0)[:, None]
    f_g = tl.load(f_gradient, mask=rows < h, other=0.0)[:, None]
    shift = _number(view + 12, ACC)
    keep, rate, eps = _number(numbers, ACC), _number(numbers + 1, ACC), _number(numbers + 2, ACC)
    beta1, rest1 = _number(numbers + 3, ACC), _number(numbers + 4, ACC)
    beta2, rest2 = _number(numbers + 5, ACC), _number(numbers + 6, ACC)
    root = _number(numbers + 7, ACC)
    for step in tl.range(first, last):
        p_at, mask = tile(p_view, rows, step, LAYOUT, COLUMNS)
        g_at = tile(g_view, rows, step, LAYOUT, COLUMNS)[0]
        m_at = tile(m_view, rows, step, LAYOUT, COLUMNS)[0]
        v_at = tile(v_view, rows, step, LAYOUT, COLUMNS)[0]
        g = tl.load(g_at, mask=mask, other=0.0).to(ACC) * f_g
        m = tl.load(m_at, mask=mask, other=0.0).to(ACC) * (f_g * beta1) + rest1 * g
        v = tl.load(v_at, mask=mask, other=0.0).to(ACC) * (f_g * f_g * beta2) + rest2 * g * g
        p = (tl.load(p_at, mask=mask, other=0.0).to(ACC) + shift) * f - shift
        p = p * keep - rate * m / (tl.sqrt(v) / root + eps)
        tl.store(p_at, p.to(DTYPE), mask=mask)
        tl.store(m_at, m.to(DTYPE), mask=mask)
        tl.store(v_at, v.to(DTYPE), mask=mask)


@triton.jit
def step_kernel(views, programs, numbers, DTYPE: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr):
    place = programs + 2 * tl.program_id(0).to(tl.int64)
    # Four rows of the table per entry: parameter, gradient, first moment, second moment.
    view = views + 4 * FIELDS * tl.load(place)
    place = tl.load(place + 1).to(tl.int32)
    layout = tl.load(view + 9)
    if layout == ALIGNED_COLUMNS:
        _step_tiles(view, place, numbers, DTYPE, ACC, ALIGNED_COLUMNS, 8, TILE // 8)
    elif layout == ALIGNED_ROWS:
        _step_tiles(view, place, numbers, DTYPE, ACC, ALIGNED_ROWS, 64, TILE // 64)
    elif layout == ANY_COLUMNS:
        _step_tiles(view, place, numbers, DTYPE, ACC, ANY_COLUMNS, 128, TILE // 128)
    else:
        _step_tiles(view, place, numbers, DTYPE, ACC, ANY_ROWS, 64, TILE // 64)


def teleport_adamw_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    factors: Tensor,
    which: Sequence[int],
    shifts: Sequence[float],
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    joints: int = 1,
) -> None:
    """Move entry i by kind which[i] of factors (kinds, joints·heads, h), its gradient and moments by which[count + i],
    then step; in place on parameters and moments. No two views may share an entry. See `ops.teleport_adamw`."""
    count, heads = len(parameters), factors.shape[1] // joints
    if not count or not factors.numel():
        return
    values = (1 - lr * weight_decay, lr / (1 - beta1**step), eps, beta1, 1 - beta1, beta2, 1 - beta2)
    numbers = [_bits(value) for value in (*values, (1 - beta2**step) ** 0.5)]
    entries = list(zip(parameters, gradients, first_moments, second_moments, strict=True))
    for dtype in dict.fromkeys(p.dtype for p in parameters):
        acc = accumulator(dtype)
        scales = factors.to(acc).contiguous()
        size, warps = TUNED[dtype.itemsize]
        rows, blocks = [], []
        for i, tensors in enumerate(entries):
            if parameters[i].dtype != dtype:
                continue
            first = i * joints // count * heads
            places = [scales[which[k], first].data_ptr() for k in (i, count + i)]
            described = [describe(tensor, *places, _bits(shifts[i])) for tensor in tensors]
            shapes, layouts = ({tuple(row[a:b]) for row in described} for a, b in ((1, 5), (9, 10)))
            if len(shapes) > 1:
                described = [_flat(tensor, *places, _bits(shifts[i])) for tensor in tensors]
            if len(shapes) > 1 or len(layouts) > 1:
                # Tensors that lie differently in memory share the loop that promises nothing about strides.
                for row in described:
                    row[9] = ANY_COLUMNS.value
            rows.append(described)
            blocks.append(streaming_steps(described[0], size))
        tiles = min(max(sum(r * steps for r, steps in blocks) // PROGRAMS, FEWEST_TILES), MOST_TILES)
        programs = [r * splits for r, splits in (split_stream(described[0], size, tiles) for described in rows)]
        table = [row for described in rows for row in described]
        views, places_of, constants, grid = tables(table, programs, parameters[0].device, numbers)
        if grid:
            with launches_on(parameters[0].device):
                step_kernel[(grid,)](
                    views, places_of, constants, TRITON_TYPES[dtype], TRITON_TYPES[acc], size, num_warps=warps
                )


def _bits(value: float) -> int:
    """The bits of a float64, as the int64 that the table holds."""
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits


def _flat(tensor: Tensor, *extra: int) -> list[int]:
    """A described view whose trailing axes are kept as they are, so that views of one shape agree on their columns."""
    outer, inner = tensor.shape[2:] if tensor.dim() == 4 else (1, tensor.shape[2])
    outer_stride, inner_stride = tensor.stride()[2:] if tensor.dim() == 4 else (0, tensor.stride(2))
    row = describe(tensor, *extra)
    row[3:5] = outer, inner
    row[7:9] = outer_stride, inner_stride
    return row


def shipped() -> Iterator[Configuration]:
    """Every configuration that `teleport_adamw_` launches."""
    for dtype, name in TYPE_NAMES.items():
        size, warps = TUNED[dtype.itemsize]
        types = dict.fromkeys(("views", "programs", "numbers"), "*i64")
        constants = {"DTYPE": TRITON_TYPES[dtype], "ACC": TRITON_TYPES[accumulator(dtype)], "TILE": size}
        yield Configuration(f"teleport_adamw_ {name}", step_kernel, types, constants, warps)
