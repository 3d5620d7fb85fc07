"""covariance_: the running gradient covariance of a joint, C ← β C + (1 − β) Σ G Gᵀ / ‖G‖²."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teleport_fast.ops.backend import Op, direct
from teleport_fast.ops.checks import accumulation_dtype, as_list, check_matrix, check_views
from teleport_fast.ops.gram_difference import gram_difference

NORMALISE = ("tensor", "joint", "none")


@torch.no_grad()
def covariance_(
    covariance: Tensor, tensors: Tensor | Sequence[Tensor], decay: float, joints: int = 1, normalise: str = "tensor"
) -> None:
    """Update `covariance` in place from the gradients' views, C ← β C + (1 − β) Σ G Gᵀ / ‖G‖².

    covariance: (joints·heads, h, h), symmetric, float32 or float64. tensors: a joint-major list of (heads, h, n) or
    (heads, h, outer, inner) views, any strides, float32, float64, bfloat16 or float16, computed in covariance's dtype;
    ‖G‖² is taken over a whole view; with normalise="joint" over all views of a joint, with "none" it is left out. A view
    (or joint) whose gradient is zero or not finite adds nothing; nothing is read back. Records no gradients.
    Errors: TypeError and ValueError naming both shapes, ValueError for an unknown normalise; RuntimeError if the backend
    asked for cannot be used. Source: docs/mathematics.md (own), checked by tests/ops/test_covariance.py.

    >>> C = torch.zeros(1, 2, 2)
    >>> covariance_(C, torch.tensor([[[3.0], [4.0]]]), decay=0.5)
    >>> C
    tensor([[[0.1800, 0.2400],
             [0.2400, 0.3200]]])
    """
    tensors = as_list(tensors)
    if not tensors:
        covariance.mul_(decay)
        return
    first = check_views("covariance_", tensors, [], ("tensors", "tensors"), joints)
    check_matrix("covariance_", "covariance", covariance, first, joints)
    if covariance.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"covariance_: covariance must be float32 or float64, got {covariance.dtype}; keep it in float32")
    if normalise not in NORMALISE:
        raise ValueError(f"normalise must be one of {', '.join(NORMALISE)}, got {normalise!r}; 'tensor' is the default")
    if normalise != "tensor":
        _update_whole_(covariance, tensors, decay, joints, normalise)
    elif direct((covariance, *tensors)):
        _run_(covariance, tensors, decay, joints)
        if not covariance.is_inference():
            torch.autograd.graph.increment_version(covariance)
    else:
        torch.ops.teleport_fast.covariance_(covariance, tensors, decay, joints)


def _update_whole_(covariance: Tensor, tensors: Sequence[Tensor], decay: float, joints: int, normalise: str) -> None:
    """One factor for all tensors of a joint, from the joint's own Gram."""
    wide = [tensor.to(covariance.dtype) for tensor in tensors]
    gram = gram_difference([], wide, joints)[0].unflatten(0, (joints, -1))
    size = gram.diagonal(dim1=-2, dim2=-1).sum((1, 2))[:, None, None, None]
    usable = size.isfinite() & (size > 0)
    gram = gram / size if normalise == "joint" else gram
    covariance.mul_(decay).add_(torch.where(usable, gram, 0.0).flatten(0, 1), alpha=1 - decay)


def reference_(covariance: Tensor, tensors: Sequence[Tensor], decay: float, joints: int) -> None:
    """The formula, in plain torch."""
    covariance.mul_(decay)
    run, heads = len(tensors) // joints, len(covariance) // joints
    for index, tensor in enumerate(tensors):
        rows = tensor.flatten(2).to(covariance.dtype)
        gram = rows @ rows.mT
        weight = (1 - decay) / gram.diagonal(dim1=-2, dim2=-1).sum()
        joint = index // run
        # 1/‖G‖² is inf for a zero gradient and nan for a non-finite one: both leave C as it is
        usable = weight.isfinite() & (weight > 0)
        covariance[joint * heads : (joint + 1) * heads].add_(torch.where(usable, gram * weight, 0.0))


_OP = Op("covariance_", reference_)


def _run_(covariance: Tensor, tensors: Sequence[Tensor], decay: float, joints: int) -> None:
    if accumulation_dtype(tensors[0].dtype) != covariance.dtype:
        tensors = [tensor.to(covariance.dtype) for tensor in tensors]
    contiguous = covariance.contiguous()
    _OP.choose(tensors, size=covariance.shape[1])(contiguous, tensors, decay, joints)
    if contiguous is not covariance:
        covariance.copy_(contiguous)


@torch.library.custom_op(
    "teleport_fast::covariance_",
    mutates_args=("covariance",),
    schema="(Tensor(a!) covariance, Tensor[] tensors, float decay, int joints) -> ()",
)
def _op_(covariance: Tensor, tensors: Sequence[Tensor], decay: float, joints: int) -> None:
    _run_(covariance, tensors, decay, joints)


@_op_.register_fake
def _(covariance: Tensor, tensors: Sequence[Tensor], decay: float, joints: int) -> None:
    return None
