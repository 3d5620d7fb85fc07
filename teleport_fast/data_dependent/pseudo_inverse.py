"""The pseudo-inverse of a layer's inputs, factored once by the cheapest decomposition that its conditioning allows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The Gram matrix squares the condition number: a product with its inverse is off by about eps * cond(Gram). Under these
# limits that stays at 1e-12 (float64) and 1e-4 (float32); beyond, QR, whose error is eps * cond(H).
GRAM_LIMIT = {torch.float64: 4e3, torch.float32: 8e2}


@dataclass(frozen=True)
class PseudoInverse:
    """H⁺ = first @ second for H (k, B); `rank`, and `kind`: "cholesky", "qr" or "svd", by conditioning.

    >>> H = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]], dtype=torch.float64)
    >>> inverse = factor(H)
    >>> inverse.kind, inverse.rank, inverse.full_columns
    ('cholesky', 2, False)
    """

    first: Tensor
    second: Tensor
    rank: int
    kind: str

    @property
    def full_columns(self) -> bool:
        """Whether H⁺H is the identity: every sample can be moved alone."""
        return self.rank == self.first.shape[0]

    @property
    def full_rows(self) -> bool:
        """Whether HH⁺ is the identity: the batch sees the whole space."""
        return self.rank == self.second.shape[1]

    def right(self, A: Tensor) -> Tensor:
        """A H⁺, (n, B) -> (n, k)."""
        return (A @ self.first) @ self.second

    def right_transposed(self, K: Tensor) -> Tensor:
        """K H⁺ᵀ, (n, k) -> (n, B)."""
        return (K @ self.second.mT) @ self.first.mT

    def dense(self) -> Tensor:
        """H⁺ itself, (B, k)."""
        return self.first @ self.second


def factor(H: Tensor, gram: Tensor | None = None) -> PseudoInverse:
    """PseudoInverse of H (k, B), float32 or float64; singular values under max(k, B) * eps of the largest are 0; `gram`: HᵀH if at hand.

    >>> factor(torch.ones(2, 3, dtype=torch.float64)).kind
    'svd'
    """
    k, B = H.shape
    wide = k <= B
    gram = H @ H.mT if wide else (H.mT @ H if gram is None else gram)
    lower, failed = torch.linalg.cholesky_ex(gram)
    if not failed:
        inverse = torch.cholesky_inverse(lower)
        if _condition(gram, inverse) <= GRAM_LIMIT[H.dtype]:
            first, second = (H.mT, inverse) if wide else (inverse, H.mT)
            return PseudoInverse(first, second, min(k, B), "cholesky")
    Q, R = torch.linalg.qr(H.mT if wide else H)
    if bool((R.diagonal() != 0).all()):
        inverse = torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=H.dtype, device=H.device), upper=True)
        # One decade short of the rank cut, because the Frobenius norm overstates the condition number by up to the size.
        if _condition(R, inverse) <= 0.1 / (max(k, B) * torch.finfo(H.dtype).eps):
            first, second = (Q, inverse.mT) if wide else (inverse, Q.mT)
            return PseudoInverse(first, second, min(k, B), "qr")
    U, S, Vh = torch.linalg.svd(H, full_matrices=False)
    rank = int((max(k, B) * torch.finfo(H.dtype).eps * S[0] < S).sum())
    return PseudoInverse(Vh[:rank].mT, (U[:, :rank] / S[:rank]).mT, rank, "svd")


def _condition(matrix: Tensor, inverse: Tensor) -> float:
    """The condition number in the Frobenius norm, at most k times the true one; infinite where anything overflowed."""
    value = float(torch.linalg.vector_norm(matrix) * torch.linalg.vector_norm(inverse))
    return value if value == value else float("inf")
