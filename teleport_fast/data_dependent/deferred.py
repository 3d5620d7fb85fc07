"""Right inverses for a loop: Cholesky factors checked once, after all of them, and LU solves where the reader is narrow."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from teleport_fast.data_dependent.pseudo_inverse import GRAM_LIMIT, PseudoInverse, factor


class RightInverse(Protocol):
    """H⁺ of H (k, B) with full row rank, as V-exact uses it."""

    def right(self, A: Tensor) -> Tensor: ...

    def right_transposed(self, K: Tensor) -> Tensor: ...

    def remainder(self, R: Tensor, K: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class CholeskyFactor:
    """H⁺ = Hᵀ(LLᵀ)⁻¹, H (k, B), L (k, k), with the inverse where k is small: 3 µs a product there, 17 µs a solve."""

    H: Tensor
    lower: Tensor
    inverse: Tensor | None

    def _solved(self, A: Tensor) -> Tensor:
        """A(LLᵀ)⁻¹, (n, k)."""
        if self.inverse is None:
            return torch.cholesky_solve(A.t(), self.lower).t()
        return torch.mm(A, self.inverse)

    def right_transposed(self, K: Tensor) -> Tensor:
        """K H⁺ᵀ, (n, k) -> (n, B)."""
        return torch.mm(self._solved(K), self.H)

    def remainder(self, R: Tensor, K: Tensor) -> Tensor:
        """R − K H⁺ᵀ, R (n, B)."""
        return torch.addmm(R, self._solved(K), self.H, alpha=-1)

    def right(self, A: Tensor) -> Tensor:
        """A H⁺, (n, B) -> (n, k)."""
        return self._solved(torch.mm(A, self.H.t()))


@dataclass(frozen=True)
class SquareFactor:
    """H⁺ = H⁻¹ of a square H (k, k) by LU: a third of an inverse where only n << k rows are asked for."""

    H: Tensor
    lu: Tensor
    pivots: Tensor

    def right(self, A: Tensor) -> Tensor:
        """A H⁻¹, (n, k) -> (n, k)."""
        solved: Tensor = torch.linalg.lu_solve(self.lu, self.pivots, A, left=False)
        return solved

    def right_transposed(self, K: Tensor) -> Tensor:
        """K H⁻ᵀ, (n, k) -> (n, k)."""
        solved: Tensor = torch.linalg.lu_solve(self.lu, self.pivots, K.t())
        return solved.t()

    def remainder(self, R: Tensor, K: Tensor) -> Tensor:
        """R − K H⁻ᵀ, R (n, k)."""
        return R - self.right_transposed(K)


def square_factor(H: Tensor) -> SquareFactor | None:
    """LU of H (k, k); None unless eight probes put its condition number far inside the rank cut.

    ‖H⁻¹ω‖ of a Gaussian ω falls under ‖H⁻¹‖/100 with probability 0.8%, of all eight with 2e-17; the margin is 1,000.

    >>> square_factor(torch.ones(3, 3, dtype=torch.float64)) is None
    True
    """
    lu, pivots, info = torch.linalg.lu_factor_ex(H)
    if info:
        return None
    k = len(H)
    probes = torch.randn(k, 8, generator=torch.Generator().manual_seed(k), dtype=H.dtype).to(H.device)
    inverse_norm = float(torch.linalg.vector_norm(torch.linalg.lu_solve(lu, pivots, probes), dim=0).max())
    limit = 1e-3 / (k * torch.finfo(H.dtype).eps)
    return SquareFactor(H, lu, pivots) if float(torch.linalg.vector_norm(H)) * inverse_norm <= limit else None


class Factors:
    """factor(H) for full row rank: checked at once, or `deferred` to `sound()`, which must hold before any result is used.

    >>> factors = Factors(deferred=True)
    >>> inverse = factors(torch.eye(2, 3, dtype=torch.float64), rows=1)
    >>> factors.sound()
    True
    """

    def __init__(self, deferred: bool) -> None:
        self.deferred, self.full_rank = deferred, True
        self._pending: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)

    def __call__(self, H: Tensor, rows: int) -> RightInverse:
        """The factor of H (k, B) for matrices of `rows` rows."""
        if not self.deferred:
            square = square_factor(H) if H.shape[0] == H.shape[1] and 4 * rows <= H.shape[0] else None
            if square is not None:
                return square
            checked = factor(H)
            self.full_rank = self.full_rank and checked.full_rows
            return checked
        gram = torch.mm(H, H.t())
        lower, info = torch.linalg.cholesky_ex(gram)
        self._pending[len(H)].append((gram, lower, info))
        return CholeskyFactor(H, lower, torch.cholesky_inverse(lower) if len(H) <= 48 else None)

    def sound(self) -> bool:
        """Whether every deferred factor existed and was well enough conditioned, by factor's own rule, one batch a width."""
        for triples in self._pending.values():
            grams, lowers, infos = (torch.stack(column) for column in zip(*triples, strict=True))
            if bool(infos.any()):
                return False
            inverses = torch.cholesky_inverse(lowers)
            norms = torch.linalg.vector_norm(grams, dim=(1, 2)) * torch.linalg.vector_norm(inverses, dim=(1, 2))
            if not bool((norms <= GRAM_LIMIT[grams.dtype]).all()):
                return False
        return True


def full_rank_factor(inverse: RightInverse) -> PseudoInverse:
    """The factor as a PseudoInverse, for a report; a CholeskyFactor must be sound."""
    if isinstance(inverse, PseudoInverse):
        return inverse
    if isinstance(inverse, SquareFactor):
        return factor(inverse.H)
    assert isinstance(inverse, CholeskyFactor)
    return PseudoInverse(inverse.H.t(), torch.cholesky_inverse(inverse.lower), len(inverse.lower), "cholesky")
