"""Grams of runs of strided views, Σ X Xᵀ per head, each entry read once: the first half of every op that needs Grams.

Moves every entry once; the columns of a run are split over programs only so far that partial Grams, written and read
again, stay under 8% of the entries' bytes. Launch: one program per (run, head, split), h ≤ 128 (64 in float64) so that
a whole Gram stays in registers; h is padded to a power of two, 16 at least, which partial Grams pay for too.
float32 uses CUDA cores ("ieee", no tf32) and is bound by them from h = 32 on; half types use tensor cores. Wide h loses
to BLAS, so launchers send it there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

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
    FIELDS,
    TRITON_TYPES,
    TYPE_NAMES,
    accumulator,
    describe,
    launches_on,
    open_view,
    tables,
    tile,
)

# Columns of a tile, warps and pipeline stages, by bytes of an entry and padded width. Chosen so that nothing spills on
# any target (bench/resources.md); speed unmeasured, no GPU was at hand.
TUNED = {
    2: {16: (128, 4, 3), 32: (128, 4, 3), 64: (64, 4, 3), 128: (32, 8, 3)},
    4: {16: (128, 4, 3), 32: (64, 4, 3), 64: (32, 8, 3), 128: (32, 8, 1)},
    8: {16: (64, 4, 1), 32: (16, 4, 3), 64: (16, 8, 3)},
}
# Share of the traffic that partial Grams may have, and programs to aim at: unmeasured.
PARTIAL_SHARE, PROGRAMS = 0.08, 264
# Entries of a Gram per program of the launch that adds partial ones: unmeasured.
BLOCK = 256


class Grams(NamedTuple):
    """Partial Grams (slots, H, H), h padded to H, and traces (slots,).

    `records` (runs, 4) on the device: first view, one past the last, first slot, splits. Head k of a run owns the
    `splits` slots from first slot + k · splits on. `final` says that nothing is left to add up or to cut off.
    """

    partial: Tensor
    traces: Tensor
    records: Tensor
    final: bool


def fits(h: int, acc: torch.dtype) -> bool:
    """Whether a whole h × h Gram fits a program's registers."""
    return h <= max(TUNED[acc.itemsize])


def padded(h: int) -> int:
    """The power of two, at least 16, that a matrix unit works on."""
    return max(16, triton.next_power_of_2(h))


@triton.jit
def _add_grams(view, head, start, stop, acc, DTYPE: tl.constexpr, LAYOUT: tl.constexpr, H: tl.constexpr,
               K: tl.constexpr):  # fmt: skip
    opened = open_view(view, head, DTYPE, LAYOUT)
    rows = tl.arange(0, H)
    for step in tl.range(start, stop):
        pointers, mask = tile(opened, rows, step, LAYOUT, K)
        x = tl.load(pointers, mask=mask, other=0.0)
        if acc.dtype == tl.float64:
            x = x.to(tl.float64)
        acc = tl.dot(x, tl.trans(x), acc, input_precision="ieee", out_dtype=acc.dtype)
    return acc


@triton.jit
def _trace(matrix, H: tl.constexpr):
    diagonal = tl.arange(0, H)[:, None] == tl.arange(0, H)[None, :]
    return tl.sum(tl.sum(tl.where(diagonal, matrix, 0.0), 1), 0)


@triton.jit
def gram_kernel(views, programs, runs, partial, traces, steps_each, DTYPE: tl.constexpr, ACC: tl.constexpr,
                ALIGNED: tl.constexpr, H: tl.constexpr, K: tl.constexpr):  # fmt: skip
    place = programs + 2 * tl.program_id(0).to(tl.int64)
    run = runs + 4 * tl.load(place)
    place = tl.load(place + 1).to(tl.int32)
    # A run's record: its first view, one past its last, its first slot, its splits.
    splits = tl.load(run + 3).to(tl.int32)
    head, split = (place // splits).to(tl.int64), place % splits
    slot = tl.load(run + 2) + place
    acc = tl.zeros((H, H), ACC)
    trace = tl.sum(tl.zeros((H,), ACC), 0)
    begin = split * steps_each
    for index in tl.range(tl.load(run), tl.load(run + 1)):
        view = views + index * FIELDS
        steps = (tl.load(view + 3) * tl.cdiv(tl.load(view + 4), K)).to(tl.int32)
        # Each program takes the part of [split · steps_each, (split + 1) · steps_each) that falls into this view.
        start = tl.minimum(tl.maximum(begin, 0), steps)
        stop = tl.minimum(tl.maximum(begin + steps_each, 0), steps)
        begin -= steps
        # Where the sign changes (plus views to minus views) what was summed so far is negated, which is exact.
        acc *= tl.load(view + 10).to(ACC)
        before = _trace(acc, H)
        layout = tl.load(view + 9)
        if (layout == ALIGNED_COLUMNS) | (layout == ANY_COLUMNS):
            acc = _add_grams(view, head, start, stop, acc, DTYPE, ALIGNED_COLUMNS if ALIGNED else ANY_COLUMNS, H, K)
        else:
            acc = _add_grams(view, head, start, stop, acc, DTYPE, ALIGNED_ROWS if ALIGNED else ANY_ROWS, H, K)
        trace += _trace(acc, H) - before
    i, j = tl.arange(0, H)[:, None], tl.arange(0, H)[None, :]
    # One triangle, mirrored: symmetric to the bit whatever order the matrix unit adds in.
    acc = tl.where(i <= j, acc, tl.trans(acc))
    tl.store(partial + slot * H * H + i * H + j, acc)
    tl.store(traces + slot, trace)


@triton.jit
def total_kernel(partial, traces, runs, out, traces_out, heads, h, H: tl.constexpr, BLOCK: tl.constexpr):
    """out[run, head] and traces_out[run, head]: the sums of the partial ones, in order."""
    run = runs + 4 * (tl.program_id(1) // heads)
    splits = tl.load(run + 3)
    slot = tl.load(run + 2) + tl.program_id(1) % heads * splits
    joint = tl.program_id(1).to(tl.int64)
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entries < h * h
    place = entries // h * H + entries % h
    summed = tl.zeros((BLOCK,), out.dtype.element_ty)
    trace = tl.load(traces + slot)
    for index in tl.range(slot, slot + splits):
        summed += tl.load(partial + index * H * H + place, mask=inside, other=0.0)
    for index in tl.range(slot + 1, slot + splits):
        trace += tl.load(traces + index)
    tl.store(out + joint * h * h + entries, summed, mask=inside)
    tl.store(traces_out + joint, trace)


def grams(runs: Sequence[Sequence[tuple[Tensor, int]]], acc: torch.dtype) -> Grams:
    """Grams of each run's views (heads, h, …), accumulated in `acc`; a view's sign says whether it is added to what
    the views before it gave (1) or to the negative of that (−1)."""
    tensors = [tensor for run in runs for tensor, _ in run]
    heads, h = tensors[0].shape[:2]
    if any(t.shape[:2] != (heads, h) for t in tensors):
        raise ValueError(f"all views must be ({heads}, {h}, ...), got {[tuple(t.shape) for t in tensors]}")
    dtype, device = tensors[0].dtype, tensors[0].device
    if any(t.dtype != dtype for t in tensors):
        raise ValueError(f"all views must have one dtype, got {sorted({str(t.dtype) for t in tensors})}; cast them")
    width = padded(h)
    columns, warps, stages = TUNED[8 if acc == torch.float64 else dtype.itemsize][width]
    described = [[describe(tensor, sign) for tensor, sign in run] for run in runs]
    rows = [row for run in described for row in run]
    steps = [sum(row[3] * -(-row[4] // columns) for row in run) for run in described]
    fewest = int(2 * h * acc.itemsize / (PARTIAL_SHARE * columns * dtype.itemsize)) + 1
    each = max(fewest, -(-sum(steps) * heads // PROGRAMS), 1)
    splits = [max(1, count // each) for count in steps]
    each = max(-(-count // parts) for count, parts in zip(steps, splits, strict=True))
    splits = [max(1, -(-count // each)) for count in steps]
    records, slots, seen = [], 0, 0
    for run, parts in zip(described, splits, strict=True):
        records += [seen, seen + len(run), slots, parts]
        seen, slots = seen + len(run), slots + heads * parts
    partial = torch.empty((slots, width, width), dtype=acc, device=device)
    traces = torch.empty((slots,), dtype=acc, device=device)
    views, programs, tail, grid = tables(rows, [heads * parts for parts in splits], device, records)
    aligned = all(row[9] in (ALIGNED_COLUMNS.value, ALIGNED_ROWS.value) for row in rows if row[4])
    if grid and h:
        with launches_on(device):
            gram_kernel[(grid,)](
                views, programs, tail, partial, traces, each, TRITON_TYPES[dtype], TRITON_TYPES[acc],
                aligned, width, columns, num_warps=warps, num_stages=stages,
            )  # fmt: skip
    return Grams(partial, traces, tail, width == h and max(splits) == 1)


def total(found: Grams, count: int, h: int) -> tuple[Tensor, Tensor]:
    """Grams (count, h, h) and traces (count,) of all runs' heads, the partial ones added in order."""
    if found.final:
        return found.partial, found.traces
    out = torch.empty((count, h, h), dtype=found.partial.dtype, device=found.partial.device)
    traces = torch.empty((count,), dtype=out.dtype, device=out.device)
    if out.numel():
        with launches_on(out.device):
            total_kernel[(triton.cdiv(h * h, BLOCK), count)](
                found.partial, found.traces, found.records, out, traces, count * 4 // found.records.numel(), h,
                padded(h), BLOCK,
            )  # fmt: skip
    return out, traces


def widest_accumulator(tensors: Sequence[Tensor]) -> torch.dtype:
    """float64 if any tensor is float64, else float32."""
    return torch.float64 if any(accumulator(t.dtype) == torch.float64 for t in tensors) else torch.float32


def shipped() -> Iterator[Configuration]:
    """Every configuration that `grams` launches, without the mixed one (a float64 sum over narrower storage)."""
    pointers = {"views": "*i64", "programs": "*i64", "runs": "*i64"}
    for dtype, name in TYPE_NAMES.items():
        acc = accumulator(dtype)
        types = pointers | {"partial": f"*{TYPE_NAMES[acc]}", "traces": f"*{TYPE_NAMES[acc]}"}
        for width, (columns, warps, stages) in TUNED[dtype.itemsize].items():
            for aligned in (True, False):
                constants = {"DTYPE": TRITON_TYPES[dtype], "ACC": TRITON_TYPES[acc], "ALIGNED": aligned}
                yield Configuration(
                    f"gram {name} h≤{width}{'' if aligned else ' unaligned'}", gram_kernel,
                    types | {"steps_each": "i32"}, constants | {"H": width, "K": columns}, warps, stages,
                )  # fmt: skip
    for name in ("fp32", "fp64"):
        results = {n: f"*{name}" for n in ("partial", "traces", "out", "traces_out")}
        types = results | {"runs": "*i64", "heads": "i32", "h": "i32"}
        yield Configuration(f"gram total {name}", total_kernel, types, {"H": 64, "BLOCK": BLOCK})
