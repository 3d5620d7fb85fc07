"""Cholesky factors whose conditioning is looked at once, after all of them: nothing in a loop then waits for a number."""

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

    def half(self, K: Tensor) -> Tensor: ...

    @property
    def last(self) -> Tensor: ...


@dataclass(frozen=True)
class CholeskyFactor:
    """H⁺ = Hᵀ(LLᵀ)⁻¹, H (k, B), L (k, k)."""

    H: Tensor
    lower: Tensor

    @property
    def last(self) -> Tensor:
        """H, (k, B): K H⁺ᵀ = half(K) last."""
        return self.H

    def half(self, K: Tensor) -> Tensor:
        """K(LLᵀ)⁻¹, (n, k) -> (n, k)."""
        return torch.cholesky_solve(K.t(), self.lower).t()

    def right(self, A: Tensor) -> Tensor:
        """A H⁺, (n, B) -> (n, k)."""
        return torch.cholesky_solve(torch.mm(self.H, A.t()), self.lower).t()


class Factors:
    """factor(H) for full row rank: checked at once, or `deferred` to `sound()`, which must hold before any result is used.

    >>> factors = Factors(deferred=True)
    >>> inverse = factors(torch.eye(2, 3, dtype=torch.float64))
    >>> factors.sound()
    True
    """

    def __init__(self, deferred: bool) -> None:
        self.deferred, self.full_rank = deferred, True
        self._pending: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)

    def __call__(self, H: Tensor) -> RightInverse:
        if not self.deferred:
            checked = factor(H)
            self.full_rank = self.full_rank and checked.full_rows
            return checked
        gram = torch.mm(H, H.t())
        lower, info = torch.linalg.cholesky_ex(gram)
        self._pending[len(H)].append((gram, lower, info))
        return CholeskyFactor(H, lower)

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
    assert isinstance(inverse, CholeskyFactor)
    return PseudoInverse(inverse.H.t(), torch.cholesky_inverse(inverse.lower), len(inverse.lower), "cholesky")
