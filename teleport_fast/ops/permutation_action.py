"""permutation_action_: the rows of many strided views are reordered in place, all in one call and without a second copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teleport_fast.ops.backend import Op, direct
from teleport_fast.ops.checks import as_list, check_views
from teleport_fast.ops.resume import unwritten
from teleport_fast.ops.runs import check_in_place, check_rows, check_runs, written


def permutation_action_(tensors: Tensor | Sequence[Tensor], index: Tensor, joints: int = 1) -> None:
    """Move many tensors by a permutation, in place: A'[head, row, …] = A[head, index[head, row], …].

    tensors: a view or a joint-major list of strided views, each (heads, h, n) or (heads, h, outer, inner), float32,
    float64, bfloat16 or float16; parameters, gradients and moments of both sides move alike. index: int64
    (joints·heads, h), each row a permutation of 0 … h − 1. Views of the same memory move in the list's order.
    Errors: TypeError and ValueError naming both shapes; ValueError for a view whose own entries overlap, and on the CPU
    for an index that is no permutation; RuntimeError if gradients are being recorded. Source: docs/mathematics.md.

    >>> A = torch.tensor([[[1.0], [2.0], [3.0]]])
    >>> permutation_action_(A, torch.tensor([[2, 0, 1]]))
    >>> A.flatten().tolist()
    [3.0, 1.0, 2.0]
    """
    tensors = as_list(tensors)
    check_runs("permutation_action_", tensors, joints)
    first = check_views("permutation_action_", tensors, [], ("tensors", "tensors"), joints)
    check_rows("permutation_action_", "index", index, first, joints)
    if index.dtype != torch.int64:
        raise TypeError(f"permutation_action_: index must be int64, got {index.dtype}; pass index.long()")
    check_in_place("permutation_action_", tensors)
    if direct(tensors):
        written(tensors)
        _run_(tensors, index, joints)
    else:
        torch.ops.teleport_fast.permutation_action_(tensors, index, joints)


def reference_(tensors: Sequence[Tensor], index: Tensor, joints: int) -> None:
    """The formula, in plain torch."""
    for position, tensor in unwritten([*enumerate(tensors)]):
        heads, joint = tensor.shape[0], position * joints // len(tensors)
        rows = index[joint * heads : (joint + 1) * heads]
        tensor.copy_(torch.take_along_dim(tensor, rows.reshape(*rows.shape, *[1] * (tensor.dim() - 2)), 1))


_OP = Op("permutation_action_", reference_)


def _run_(tensors: Sequence[Tensor], index: Tensor, joints: int) -> None:
    # On other devices the check would wait for the device.
    if index.device.type == "cpu" and not bool((index.sort(1).values == torch.arange(index.shape[1])).all()):
        raise ValueError("permutation_action_: each row of index must be a permutation of 0 … h − 1; pass a permutation")
    _OP.choose(tensors, size=index.shape[1])(tensors, index.contiguous(), joints)


@torch.library.custom_op(
    "teleport_fast::permutation_action_",
    mutates_args=("tensors",),
    schema="(Tensor(a!)[] tensors, Tensor index, int joints) -> ()",
)
def _op_(tensors: Sequence[Tensor], index: Tensor, joints: int) -> None:
    _run_(tensors, index, joints)


@_op_.register_fake
def _(tensors: Sequence[Tensor], index: Tensor, joints: int) -> None:
    return None
