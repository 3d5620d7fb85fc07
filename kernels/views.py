"""Many strided views in one launch: the int64 table that a kernel reads them from, and the tiles it cuts them into.

A view is (heads, h, outer, inner). Its row in the table is `FIELDS` integers: address, heads, h, outer, inner, the four
strides, its layout, and what the op adds. A second table gives every program its view and its place in the view, so
views of any sizes share a grid without idle programs. Both travel in one copy.

The layout is found on the host and decides which axis lies along the threads: weights that write a joint have
contiguous columns, weights that read it have contiguous rows, and only one of the two orders is coalesced for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

FIELDS = tl.constexpr(16)
EXTRA = 10  # first of the fields that an op fills itself

# Layouts. "Aligned" means 16-byte vectors along the contiguous axis; the others read element by element.
ALIGNED_COLUMNS = tl.constexpr(0)
ALIGNED_ROWS = tl.constexpr(1)
ANY_COLUMNS = tl.constexpr(2)
ANY_ROWS = tl.constexpr(3)

# Rows of a streaming tile by layout: columns along the threads want long rows; rows along the threads fill 128 bytes or
# more with 64 of them; the short tile serves what has few columns a piece (a 3×3 convolution read along its inputs).
TILE_ROWS = (8, 64, 128, 64)

TRITON_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
TYPE_NAMES = {dtype: str(name) for dtype, name in TRITON_TYPES.items()}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every other storage type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def describe(tensor: Tensor, *extra: int) -> list[int]:
    """One row of the table for a view (heads, h, …): trailing axes merge into at most two column strides."""
    if tensor.dtype not in TRITON_TYPES:
        raise TypeError(f"tensors must be float32, float64, float16 or bfloat16, got {tensor.dtype}; cast them first")
    if tensor.dim() < 2:
        raise ValueError(f"a view must be (heads, h, ...), got shape {tuple(tensor.shape)}; add the missing axes")
    columns: list[tuple[int, int]] = []
    for size, stride in zip(tensor.shape[2:], tensor.stride()[2:], strict=True):
        if size == 1:
            continue
        if columns and columns[-1][1] == size * stride:
            columns[-1] = (columns[-1][0] * size, stride)
        else:
            columns.append((size, stride))
    if len(columns) > 2:
        raise ValueError(
            f"a view may have two column strides, got shape {tuple(tensor.shape)} and strides {tensor.stride()}; "
            f"make it contiguous"
        )
    (outer, outer_stride), (inner, inner_stride) = [(1, 1)] * (2 - len(columns)) + columns
    heads, h = tensor.shape[:2]
    head_stride, row_stride = tensor.stride()[:2]
    if tensor.numel() == 0:
        outer = inner = 0
    vector = 16 // tensor.element_size()
    aligned = tensor.data_ptr() % 16 == 0 and (heads == 1 or head_stride % vector == 0)
    aligned = aligned and (outer == 1 or outer_stride % vector == 0)
    if inner > 1 and inner_stride == 1:
        aligned = aligned and inner % vector == 0 and (h == 1 or row_stride % vector == 0)
        layout = ALIGNED_COLUMNS if aligned else ANY_COLUMNS
    elif row_stride == 1 or (h == 1 and inner == 1):
        aligned = aligned and h % vector == 0 and (inner == 1 or inner_stride % vector == 0)
        layout = ALIGNED_ROWS if aligned else ANY_ROWS
    else:
        layout = ANY_COLUMNS
    row = [tensor.data_ptr(), heads, h, outer, inner, head_stride, row_stride, outer_stride, inner_stride, layout.value]
    return row + list(extra) + [0] * (FIELDS.value - len(row) - len(extra))


# Pinned tables that CUDA graphs copy from at each replay, a few KB a captured call: kept as long as the process.
_CAPTURED: list[Tensor] = []


def tables(
    rows: Sequence[Sequence[int]], programs: Sequence[int], device: torch.device, tail: Sequence[int] = ()
) -> tuple[Tensor, Tensor, Tensor, int]:
    """(views, programs, tail, grid): the rows, (view, place in it) for each of sum(programs) programs, `tail`."""
    counts = torch.tensor(programs, dtype=torch.int64)
    grid = int(counts.sum())
    view = torch.repeat_interleave(torch.arange(len(programs)), counts)
    place = torch.arange(grid) - (counts.cumsum(0) - counts)[view]
    described = torch.tensor(rows, dtype=torch.int64).flatten()
    parts = [described, torch.stack([view, place], dim=1).flatten(), torch.tensor(tail, dtype=torch.int64)]
    everything = torch.cat(parts)
    if device.type == "cuda":
        # Pinned, so that the copy neither blocks the host nor outlives its source: the allocator keeps the event.
        pinned = everything.pin_memory()
        if torch.cuda.is_current_stream_capturing():
            _CAPTURED.append(pinned)
        everything = pinned.to(device, non_blocking=True)
    described, program, end = everything.split([part.numel() for part in parts])
    return described, program, end, grid


def in_order(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the views in waves: views whose address ranges meet are in different ones, in the list's order."""
    spans = []
    for tensor in tensors:
        reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        first = tensor.data_ptr()
        spans.append((first, first + (reach + 1) * tensor.element_size() if tensor.numel() else first))
    ordered = sorted(spans)
    if all(a[1] <= b[0] for a, b in pairwise(ordered)):
        return [list(range(len(tensors)))]
    waves: list[list[int]] = []
    for index, (first, last) in enumerate(spans):
        after = [n + 1 for n, wave in enumerate(waves) if any(first < spans[i][1] and spans[i][0] < last for i in wave)]
        position = max(after, default=0)
        if position == len(waves):
            waves.append([])
        waves[position].append(index)
    return waves


def streaming_steps(row: Sequence[int], entries: int) -> tuple[int, int]:
    """(row blocks of all heads, column blocks) of a described view when a tile holds `entries` entries."""
    heads, h, outer, inner, layout = row[1], row[2], row[3], row[4], row[9]
    rows = TILE_ROWS[layout]
    return heads * -(-h // rows), outer * -(-inner // (entries // rows))


def split_stream(row: list[int], entries: int, tiles: int) -> tuple[int, int]:
    """(row blocks of all heads, runs of column tiles) of a view; notes in its row how many tiles a program takes.

    A program takes `tiles` full tiles' worth of columns: more of those that a short inner axis leaves half empty.
    """
    blocks, steps = streaming_steps(row, entries)
    columns = entries // TILE_ROWS[row[9]]
    row[15] = max(1, tiles * columns // max(1, min(row[4], columns)))
    return blocks, -(-steps // row[15])


def launches_on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensors' own."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@triton.jit
def program_view(views, programs):
    """(row of the table, place in the view) of this program."""
    place = programs + 2 * tl.program_id(0).to(tl.int64)
    return views + tl.load(place) * FIELDS, tl.load(place + 1).to(tl.int32)


@triton.jit
def streaming_place(view, place, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(head, first row, split, first step, one past the last step) of a program that streams a run of tiles."""
    tiles = tl.load(view + 15).to(tl.int32)
    row_blocks = tl.cdiv(tl.load(view + 2), ROWS).to(tl.int32)
    steps = (tl.load(view + 3) * tl.cdiv(tl.load(view + 4), COLUMNS)).to(tl.int32)
    splits = tl.cdiv(steps, tiles)
    split = place % splits
    block = place // splits
    row = (block % row_blocks).to(tl.int64) * ROWS
    return (block // row_blocks).to(tl.int64), row, split, split * tiles, tl.minimum(steps, (split + 1) * tiles)


@triton.jit
def open_view(view, head, DTYPE: tl.constexpr, LAYOUT: tl.constexpr):
    """(address of the head, h, outer, inner, strides of row, outer, inner), with what LAYOUT promises about them."""
    base = tl.load(view).to(tl.pointer_type(DTYPE)) + head * tl.load(view + 5)
    h = tl.load(view + 2)
    inner = tl.load(view + 4)
    row_stride = tl.load(view + 6)
    outer_stride = tl.load(view + 7)
    inner_stride = tl.load(view + 8)
    # Only strides that are used are promised: the host leaves those of axes of size 1 unchecked, and they multiply 0.
    if LAYOUT == ALIGNED_COLUMNS:
        base = tl.multiple_of(base, 16)
        inner = tl.multiple_of(inner, 128 // DTYPE.primitive_bitwidth)
        row_stride = tl.multiple_of(row_stride, 128 // DTYPE.primitive_bitwidth)
        outer_stride = tl.multiple_of(outer_stride, 128 // DTYPE.primitive_bitwidth)
    if LAYOUT == ALIGNED_ROWS:
        base = tl.multiple_of(base, 16)
        h = tl.multiple_of(h, 128 // DTYPE.primitive_bitwidth)
        inner_stride = tl.multiple_of(inner_stride, 128 // DTYPE.primitive_bitwidth)
        outer_stride = tl.multiple_of(outer_stride, 128 // DTYPE.primitive_bitwidth)
    return base, h, tl.load(view + 3), inner, row_stride, outer_stride, inner_stride


@triton.jit
def tile(opened, rows, step, LAYOUT: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers and mask of the step-th block of columns (outer-major) for `rows`; the unit stride is a constant."""
    base, h, _, inner, row_stride, outer_stride, inner_stride = opened
    # Counts of blocks fit 32 bits, in which a division takes a third of the instructions; addresses are 64 bits wide.
    blocks = tl.cdiv(inner, COLUMNS).to(tl.int32)
    columns = (step % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    base += (step // blocks).to(tl.int64) * outer_stride
    if LAYOUT == ALIGNED_COLUMNS:
        pointers = base + rows[:, None] * row_stride + columns[None, :]
    elif LAYOUT == ANY_COLUMNS:
        pointers = base + rows[:, None] * row_stride + columns[None, :] * inner_stride
    else:
        pointers = base + rows[:, None] + columns[None, :] * inner_stride
    return pointers, (rows < h)[:, None] & (columns < inner)[None, :]
