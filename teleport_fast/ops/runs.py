"""The checks of ops that stream over one joint-major list of views, and of those that write to it in place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def check_runs(op: str, tensors: Sequence[Tensor], joints: int, name: str = "tensors") -> None:
    """At least one tensor, in `joints` equal runs.

    Errors: ValueError.

    >>> check_runs("op", [torch.ones(1, 2, 3)] * 4, 2)
    """
    if not tensors or joints < 1 or len(tensors) % joints:
        raise ValueError(
            f"{op}: {name} must be {joints} equal run(s), got {len(tensors)} tensors; pass one run per joint, joint-major"
        )


def check_rows(op: str, name: str, rows: Tensor, first: Tensor, joints: int) -> None:
    """One entry per row of all joints, (joints·heads, h), on the views' device. Errors: ValueError naming both shapes."""
    heads, h = first.shape[0] * joints, first.shape[1]
    if rows.shape != (heads, h):
        raise ValueError(
            f"{op}: {name} must be {(heads, h)} for {joints} joint(s) of tensors of shape {tuple(first.shape)}, "
            f"got {tuple(rows.shape)}; pass one entry per row"
        )
    if rows.device != first.device:
        raise ValueError(f"{op}: {name} is on {rows.device}, the tensors are on {first.device}; move one of them")


def per_tensor(op: str, name: str, values: Sequence[float] | None, tensors: int, joints: int) -> list[float]:
    """One value per tensor, from one per tensor or one per tensor of a run; None is 0 for all. Errors: ValueError.

    >>> per_tensor("op", "exponents", [1.0, -1.0], tensors=4, joints=2)
    [1.0, -1.0, 1.0, -1.0]
    """
    if values is None:
        return [0.0] * tensors
    if len(values) == tensors:
        return [float(value) for value in values]
    if len(values) * joints == tensors:
        return [float(value) for value in values] * joints
    raise ValueError(
        f"{op}: {name} must be {tensors} values, one per tensor, or {tensors // joints}, one per tensor of a joint's run, "
        f"got {len(values)}"
    )


def check_in_place(op: str, tensors: Sequence[Tensor]) -> None:
    """Views whose entries are distinct, for which no gradients are being recorded. Errors: ValueError, RuntimeError."""
    for tensor in tensors:
        if not tensor.is_contiguous() and overlaps_itself(tensor.shape, tensor.stride()):
            raise ValueError(
                f"{op}: entries of a view of shape {tuple(tensor.shape)} and strides {tensor.stride()} share memory; "
                f"pass a view whose entries are distinct"
            )
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(f"{op}: a tensor requires grad; call under torch.no_grad()")


@lru_cache(maxsize=4096)
def overlaps_itself(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """False only if every entry is distinct for certain: each stride clears what the smaller ones reach.

    >>> overlaps_itself((3, 4), (1, 3)), overlaps_itself((3, 4), (1, 2))
    (False, True)
    """
    reach = 0
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size == 0:
            return False
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def written(tensors: Sequence[Tensor]) -> None:
    """Tells autograd that a kernel called without the dispatcher has changed these tensors."""
    torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])
