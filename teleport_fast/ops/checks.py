"""The checks of arguments that ops share: lists of a joint's views that must agree in shape, device and dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STORAGE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def as_list(tensors: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """A lone tensor is a list of one."""
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for float32, bfloat16 and float16."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_views(
    op: str, plus: Sequence[Tensor], minus: Sequence[Tensor], names: tuple[str, str], joints: int
) -> Tensor:
    """The first view, once all are (heads, h, n) or (heads, h, outer, inner), in `joints` equal runs, on one device.

    float64 goes with float64 only. Errors: TypeError for what is no floating tensor, ValueError for all else, naming
    both shapes.

    >>> check_views("op", [torch.ones(2, 3, 4)], [torch.ones(2, 3, 0)], ("plus", "minus"), 1).shape
    torch.Size([2, 3, 4])
    """
    if joints < 1 or len(plus) % joints or len(minus) % joints:
        raise ValueError(
            f"{op}: joints must divide both lists, got joints={joints} for {len(plus)} and {len(minus)} tensors "
            f"in {names[0]} and {names[1]}; pass the lists joint-major, one equal run per joint"
        )
    if not plus and not minus:
        raise ValueError(f"{op}: {names[0]} and {names[1]} are both empty; pass at least one tensor")
    first = plus[0] if plus else minus[0]
    device, is_double = first.device, first.dtype == torch.float64
    heads, h = first.shape[:2] if first.dim() > 1 else (-1, -1)
    for tensor in (*plus, *minus):
        shape, dtype = tensor.shape, tensor.dtype
        if (
            not 3 <= len(shape) <= 4
            or shape[0] != heads
            or shape[1] != h
            or dtype not in STORAGE
            or (dtype == torch.float64) != is_double
            or tensor.device != device
        ):
            raise _explain(op, first, tensor, plus, minus, names)
    return first


def check_matrix(op: str, name: str, matrix: Tensor, first: Tensor, joints: int) -> None:
    """One (h, h) matrix per head of all joints, on the views' device. Errors: ValueError naming both shapes."""
    heads, h = first.shape[0] * joints, first.shape[1]
    if matrix.shape != (heads, h, h):
        raise ValueError(
            f"{op}: {name} must be {(heads, h, h)} for {joints} joint(s) of tensors of shape {tuple(first.shape)}, "
            f"got {tuple(matrix.shape)}; pass one (h, h) matrix per head"
        )
    if matrix.device != first.device:
        raise ValueError(f"{op}: {name} is on {matrix.device}, the tensors are on {first.device}; move one of them")
    if not matrix.is_floating_point():
        raise TypeError(f"{op}: {name} must be a floating tensor, got {matrix.dtype}; pass {name}.float()")


def _explain(
    op: str, first: Tensor, tensor: Tensor, plus: Sequence[Tensor], minus: Sequence[Tensor], names: tuple[str, str]
) -> Exception:
    def label(wanted: Tensor) -> str:
        for name, tensors in zip(names, (plus, minus), strict=True):
            for index, other in enumerate(tensors):
                if other is wanted:
                    return f"{name}[{index}]"
        raise AssertionError

    if tensor.dtype not in STORAGE:
        return TypeError(
            f"{op}: {label(tensor)} must be float32, float64, bfloat16 or float16, got {tensor.dtype}; convert it first"
        )
    if not 3 <= tensor.dim() <= 4:
        return ValueError(
            f"{op}: {label(tensor)} must be (heads, h, n) or (heads, h, outer, inner), "
            f"got shape {tuple(tensor.shape)}; pass the joint's view of the tensor"
        )
    if tensor.shape[:2] != first.shape[:2]:
        return ValueError(
            f"{op}: {label(first)} of shape {tuple(first.shape)} and {label(tensor)} of shape {tuple(tensor.shape)} "
            f"must agree in (heads, h); pass views of joints of one shape"
        )
    if tensor.device != first.device:
        return ValueError(
            f"{op}: {label(first)} is on {first.device} and {label(tensor)} on {tensor.device}; move one of them"
        )
    return ValueError(
        f"{op}: {label(first)} is {first.dtype} and {label(tensor)} is {tensor.dtype}; "
        f"float64 goes with float64 only: convert one of them or call twice"
    )
