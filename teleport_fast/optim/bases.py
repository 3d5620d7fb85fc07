"""The bases of `Rotated` off the CPU: one warm step of orthogonal iteration, by the Cholesky factor's or Householder's QR."""

from __future__ import annotations

import torch
from torch import Tensor

from teleport_fast.ops.orthogonal_iteration import householder, images

# ‖Q Qᵀ − I‖ after the first of two Cholesky passes above which the second is not trusted to finish the work.
WELL_CONDITIONED = 0.1


def cholesky_qr(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The same by two Cholesky passes, and which of the batch came out wrong, (batch,) bool; nothing is read back.

    Rows are brought to unit length first (own), which changes no direction of the result. A warm basis' images are nearly
    orthogonal, and each pass squares what is missing. Source: CholeskyQR2, Fukaya et al., arXiv 1401.1669;
    tests/optim/test_bases.py.
    """
    eye = torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)
    # twice, so that the squares of tiny entries do not underflow
    rows = rows / rows.abs().amax(-1, keepdim=True)
    rows = rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    factor, info = torch.linalg.cholesky_ex(rows @ rows.mT)
    rows = torch.linalg.solve_triangular(factor, rows, upper=False)
    gram = rows @ rows.mT
    missing = (gram - eye).abs().sum(-1).amax(-1)
    factor, second = torch.linalg.cholesky_ex(gram)
    rows = torch.linalg.solve_triangular(factor, rows, upper=False)
    wrong = (info != 0) | (second != 0) | ~(missing < WELL_CONDITIONED) | ~rows.isfinite().all(-1).all(-1)
    return rows, wrong


def next_basis(covariance: Tensor, basis: Tensor, by_householder: bool) -> tuple[Tensor, Tensor]:
    """One step of orthogonal iteration from `basis`, Q R = qr(C Rᵀ), and which of the batch it could not do, (batch,) bool.

    covariance, basis: (batch, h, h). Fixed points are C's eigenbases. By Householder all that is finite can be done; by
    Cholesky-QR what is well enough conditioned. The rest stays where it is. Nothing is read back in either case, though
    torch's Householder may wait for a device on its own.
    """
    rows = images(covariance, basis)
    # an entry that is not finite makes its image's sum so
    wrong = ~rows.sum((-1, -2)).isfinite()
    if by_householder:
        found = householder(torch.where(wrong[:, None, None], basis, rows))
    else:
        found, ill = cholesky_qr(rows)
        wrong = wrong | ill
    return torch.where(wrong[:, None, None], basis, found), wrong
