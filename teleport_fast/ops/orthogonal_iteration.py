"""orthogonal_iteration_: bases take one step towards the eigenvectors of their covariances, and the turn that takes them there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teleport_fast.ops.backend import Op, direct
from teleport_fast.ops.checks import as_list
from teleport_fast.ops.runs import written


@torch.no_grad()
def orthogonal_iteration_(bases: Tensor | Sequence[Tensor], covariances: Tensor | Sequence[Tensor]) -> Tensor:
    """Each basis R becomes Q of C Rᵀ = Qᵀ U with diag U > 0, in place; the turns Q Rᵀ, (Σ heads, h, h), are returned.

    bases: orthogonal (heads, h, h), rows are the basis vectors; covariances: one per basis, symmetric, of its shape; all
    float32 or all float64. Fixed points are eigenbases; g = turn takes what is held in a basis to the new one. C gets a
    shift of 100 eps of its mean eigenvalue, so that directions without gradients stay near where they are. A basis whose
    image is not finite stays, and its turn is the identity. Records no gradients; nothing is read back but by torch's QR.
    Errors: TypeError and ValueError naming argument and value. Source: orthogonal iteration, Golub and Van Loan, 8.2.4;
    checked by tests/ops/test_orthogonal_iteration.py.

    >>> R = torch.eye(2).unsqueeze(0)
    >>> orthogonal_iteration_(R, torch.tensor([[[3.0, 4.0], [4.0, 3.0]]]))
    tensor([[[ 0.6000,  0.8000],
             [ 0.8000, -0.6000]]])
    """
    bases, covariances = as_list(bases), as_list(covariances)
    _check(bases, covariances)
    count = sum(len(basis) for basis in bases)
    turns = bases[0].new_empty((count, *bases[0].shape[1:]))
    if direct((*bases, *covariances)):
        written(bases)
        _run_(bases, covariances, turns)
    else:
        torch.ops.teleport_fast.orthogonal_iteration_(bases, covariances, turns)
    return turns


def _check(bases: Sequence[Tensor], covariances: Sequence[Tensor]) -> None:
    name = "orthogonal_iteration_"
    if not bases or len(bases) != len(covariances):
        raise ValueError(
            f"{name}: there must be one covariance per basis, got {len(covariances)} for {len(bases)}; pass equal lists"
        )
    first = bases[0]
    for what, tensors in (("bases", bases), ("covariances", covariances)):
        for index, (tensor, basis) in enumerate(zip(tensors, bases, strict=True)):
            if tensor.dtype not in (torch.float32, torch.float64) or tensor.dtype != first.dtype:
                raise TypeError(
                    f"{name}: {what}[{index}] is {tensor.dtype}, bases[0] {first.dtype}; pass all in float32 or float64"
                )
            if tensor.dim() != 3 or tensor.shape[1:] != (first.shape[-1], first.shape[-1]) or tensor.shape != basis.shape:
                raise ValueError(
                    f"{name}: {what}[{index}] is {tuple(tensor.shape)} beside bases[0] of {tuple(first.shape)} and its basis "
                    f"of {tuple(basis.shape)}; pass (heads, h, h) of one h, a covariance of its basis' shape"
                )
            if tensor.device != first.device:
                raise ValueError(f"{name}: {what}[{index}] is on {tensor.device}, bases[0] on {first.device}; move one")


def images(covariance: Tensor, basis: Tensor) -> Tensor:
    """R C, up to a shift; both (batch, h, h), rows of `basis` are the basis vectors.

    The shift, 100 eps of C's mean eigenvalue, keeps directions that no gradient has seen near where they are, instead of
    letting rounding choose them; with C = 0 the basis is its own image.
    """
    info = torch.finfo(basis.dtype)
    mean = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return torch.baddbmm(basis * (100 * info.eps * mean + info.tiny / info.eps), basis, covariance)


def householder(rows: Tensor) -> Tensor:
    """Orthonormal rows that span what the rows before span, each on the side of its row; (batch, h, h).

    >>> found = householder(torch.tensor([[[2.0, 0.0], [1.0, -3.0]]]))
    >>> torch.allclose(found, torch.tensor([[[1.0, 0.0], [0.0, -1.0]]]), atol=1e-6)
    True
    """
    q: Tensor
    q, r = torch.linalg.qr(rows.mT)
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    return q.mul_(signs.unsqueeze(-2)).mT


def reference_(bases: Sequence[Tensor], covariances: Sequence[Tensor], turns: Tensor) -> None:
    """The formula, in plain torch."""
    before = torch.cat([*bases])
    rows = images(torch.cat([*covariances]), before)
    # an entry that is not finite makes its image's sum so
    wrong = ~rows.sum((-1, -2), keepdim=True).isfinite()
    after = torch.where(wrong, before, householder(torch.where(wrong, before, rows)))
    torch.matmul(after, before.mT, out=turns)
    turns.copy_(torch.where(wrong, torch.eye(turns.shape[-1], dtype=turns.dtype, device=turns.device), turns))
    for basis, found in zip(bases, after.split([len(basis) for basis in bases]), strict=True):
        basis.copy_(found)


_OP = Op("orthogonal_iteration_", reference_)


def _run_(bases: Sequence[Tensor], covariances: Sequence[Tensor], turns: Tensor) -> None:
    dense = [basis.contiguous() for basis in bases]
    _OP.choose(bases, size=turns.shape[-1])(dense, [covariance.contiguous() for covariance in covariances], turns)
    for basis, contiguous in zip(bases, dense, strict=True):
        if contiguous is not basis:
            basis.copy_(contiguous)


_op_ = torch.library.custom_op(
    "teleport_fast::orthogonal_iteration_",
    _run_,
    mutates_args=("bases", "turns"),
    schema="(Tensor(a!)[] bases, Tensor[] covariances, Tensor(b!) turns) -> ()",
)


@_op_.register_fake
def _(*arguments: object) -> None:
    return None
