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
    """H⁺ = first @ second for H (k, B), second None for the identity; `rank`; `kind`: "cholesky", "lu" (square), "qr" or "svd".

    >>> H = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]], dtype=torch.float64)
    >>> inverse = factor(H)
    >>> inverse.kind, inverse.rank, inverse.full_columns
    ('cholesky', 2, False)
    """

    first: Tensor
    second: Tensor | None
    rank: int
    kind: str

    @property
    def full_columns(self) -> bool:
        """Whether H⁺H is the identity: every sample can be moved alone."""
        return self.rank == self.first.shape[0]

    @property
    def full_rows(self) -> bool:
        """Whether HH⁺ is the identity: the batch sees the whole space."""
        return self.rank == (self.first if self.second is None else self.second).shape[1]

    def right(self, A: Tensor) -> Tensor:
        """A H⁺, (..., n, B) -> (..., n, k)."""
        half = A @ self.first
        return half if self.second is None else half @ self.second

    def half(self, K: Tensor) -> Tensor:
        """K secondᵀ, (n, k) -> (n, r): K H⁺ᵀ up to its last factor firstᵀ."""
        return K if self.second is None else K @ self.second.t()

    def right_transposed(self, K: Tensor) -> Tensor:
        """K H⁺ᵀ, (n, k) -> (n, B)."""
        return self.half(K) @ self.first.t()

    def remainder(self, R: Tensor, K: Tensor) -> Tensor:
        """R − K H⁺ᵀ, R (n, B)."""
        return torch.addmm(R, self.half(K), self.first.t(), alpha=-1)

    def dense(self) -> Tensor:
        """H⁺ itself, (B, k)."""
        return self.first if self.second is None else self.first @ self.second


def factor(H: Tensor, gram: Tensor | None = None) -> PseudoInverse:
    """PseudoInverse of H (k, B), float32 or float64; singular values under max(k, B) * eps of the largest are 0; `gram`: HᵀH if at hand.

    >>> factor(torch.ones(2, 3, dtype=torch.float64)).kind
    'svd'
    """
    k, B = H.shape
    if k == B:
        # Costs what the Gram matrix's inverse would, without squaring the condition number.
        inverse, singular = torch.linalg.inv_ex(H)
        if not singular and _condition(H, inverse) <= 0.1 / (k * torch.finfo(H.dtype).eps):
            return PseudoInverse(inverse, None, k, "lu")
    wide = k <= B
    gram = H @ H.mT if wide else (H.mT @ H if gram is None else gram)
    lower, failed = torch.linalg.cholesky_ex(gram)
    # cond(Gram) is at least the square of the factor's largest over its smallest diagonal entry: no inverse where that is
    # too much, which is looked at where an inverse costs more than four calls.
    if not failed and (len(gram) < 64 or _diagonal_spread(lower) ** 2 <= GRAM_LIMIT[H.dtype]):
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


def _diagonal_spread(lower: Tensor) -> float:
    """The largest over the smallest diagonal entry of a triangular matrix, a lower bound of its condition number."""
    smallest, largest = lower.diagonal().aminmax()
    return float(largest) / float(smallest)


def _condition(matrix: Tensor, inverse: Tensor) -> float:
    """The condition number in the Frobenius norm, at most k times the true one; infinite where anything overflowed."""
    value = float(torch.linalg.vector_norm(matrix) * torch.linalg.vector_norm(inverse))
    return value if value == value else float("inf")
