"""covariance_: C ← β C + (1 − β) Σ G Gᵀ / ‖G‖² over a joint's views; gradients are read once, norms stay on the device.

Computes what docs/mathematics.md keeps per joint; ‖G‖² is over all heads of a view. Moves every gradient entry once, C in
and out once, and every view's Grams out and in (8% at most, kernels/gram.py, plus one h × h Gram per view and head).
Launch: one program per (view, head, run of columns) makes Grams; a second launch, one program per (joint, head, entries
of C), takes each view's norm from the traces and adds the weighted Grams in order. h > 128 goes to BLAS (the residual
stream's d × d is one large SYRK per tensor); so does a bucket of mixed storage types.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from teleport_fast.kernels.configuration import Configuration
from teleport_fast.kernels.gram import fits, grams, padded
from teleport_fast.kernels.views import launches_on

# Entries of C per program of the second launch: unmeasured.
BLOCK = 256


@triton.jit
def update_kernel(partial, traces, records, C, decay, heads, views_each, h, head_stride, row_stride, column_stride,
                  H: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entries < h * h
    row, column = (entries // h).to(tl.int64), (entries % h).to(tl.int64)
    place = row * H + column
    joint, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    pointers = C + tl.program_id(1).to(tl.int64) * head_stride + row * row_stride + column * column_stride
    beta = tl.load(decay)
    total = tl.load(pointers, mask=inside, other=0.0) * beta
    for view in tl.range(joint * views_each, (joint + 1) * views_each):
        first, splits = tl.load(records + 4 * view + 2), tl.load(records + 4 * view + 3)
        norm = tl.load(traces + first)
        for slot in tl.range(first + 1, first + heads * splits):
            norm += tl.load(traces + slot)
        gram = tl.zeros((BLOCK,), C.dtype.element_ty)
        for slot in tl.range(first + head * splits, first + (head + 1) * splits):
            gram += tl.load(partial + slot * H * H + place, mask=inside, other=0.0)
        # A zero gradient has an infinite weight, one that is not finite none: neither may touch C.
        weight = (1.0 - beta) / norm
        usable = (weight > 0.0) & (weight < float("inf"))
        total += tl.where(usable, gram * weight, 0.0)
    tl.store(pointers, total, mask=inside)


@torch.no_grad()
def covariance_(covariance: Tensor, tensors: Sequence[Tensor], decay: float, joints: int = 1) -> None:
    """C ← β C + (1 − β) Σ G Gᵀ / ‖G‖² in place, C (joints·heads, h, h) float32 or float64; see `ops.covariance`."""
    if len(tensors) % joints:
        raise ValueError(f"tensors must be {joints} equal runs, got {len(tensors)} tensors; pass one run per joint")
    acc, h = covariance.dtype, covariance.shape[-1]
    kinds = {t.dtype for t in tensors}
    # A float64 gradient is rounded to a float32 covariance before it is multiplied, which only the plain route does.
    narrows = acc != torch.float64 and torch.float64 in kinds
    if len(kinds) != 1 or narrows or not fits(h, acc) or covariance.numel() == 0:
        _by_blas(covariance, tensors, decay, joints)
        return
    heads = len(covariance) // joints
    found = grams([[(tensor, 1)] for tensor in tensors], acc)
    beta = torch.full((1,), decay, dtype=acc, device=covariance.device)
    with launches_on(covariance.device):
        update_kernel[(triton.cdiv(h * h, BLOCK), joints * heads)](
            found.partial, found.traces, found.records, covariance, beta, heads, len(tensors) // joints, h,
            *covariance.stride(), padded(h), BLOCK,
        )  # fmt: skip


def _by_blas(covariance: Tensor, tensors: Sequence[Tensor], decay: float, joints: int) -> None:
    covariance.mul_(decay)
    run, heads = len(tensors) // joints, len(covariance) // joints
    for index, tensor in enumerate(tensors):
        rows = tensor.flatten(2).to(covariance.dtype)
        weight = (1 - decay) / rows.square().sum()
        usable = weight.isfinite() & (weight > 0)
        # Rows are scaled and not the Gram: n·h products instead of h·h more entries to move, and 0 keeps NaN out.
        scaled = torch.where(usable, rows * weight.sqrt(), 0.0)
        joint = index // run
        covariance[joint * heads : (joint + 1) * heads].baddbmm_(scaled, scaled.mT)


def shipped() -> Iterator[Configuration]:
    """The second launch; the first is kernels/gram.py's."""
    for name in ("fp32", "fp64"):
        types = {n: f"*{name}" for n in ("partial", "traces", "C", "decay")} | {"records": "*i64"}
        numbers = ("heads", "views_each", "h", "head_stride", "row_stride", "column_stride")
        types |= dict.fromkeys(numbers, "i32")
        yield Configuration(f"covariance_ update {name}", update_kernel, types, {"H": 64, "BLOCK": BLOCK})
