"""Stochastic losses with a known β and σ², and SGD that teleports to the highest gradient of the orbit before every step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

RUNS = 400
EIGENVALUES = torch.tensor([1.0, 0.5, 0.2, 0.05], dtype=torch.float64)


@dataclass(frozen=True)
class Stochastic:
    """L(w, ξ) of w (runs, d): the loss less its minimum, a sample's gradient, the orbit's largest ‖∇L‖², and where it is taken.

    beta: every L(·, ξ) is β-smooth. sigma2 = L(w*) − E inf L(·, ξ).
    """

    name: str
    beta: float
    sigma2: float
    start: Tensor
    excess: Callable[[Tensor], Tensor]
    sample: Callable[[Tensor, torch.Generator], Tensor]
    highest: Callable[[Tensor], Tensor]
    teleport: Callable[[Tensor], Tensor]

    def bound(self, T: int) -> float:
        """2β/√(T − 1) (L(w₀) − L*) + βσ²/√(T − 1): Theorem 3.1's right side."""
        return (2 * self.beta * float(self.excess(self.start[:1])[0]) + self.beta * self.sigma2) / math.sqrt(T - 1)

    def sharper(self, T: int) -> float:
        """The same with e/(e − 1) for 2 (docs/theory.md)."""
        lead = math.e / (math.e - 1)
        return (lead * self.beta * float(self.excess(self.start[:1])[0]) + self.beta * self.sigma2) / math.sqrt(T - 1)

    def descend(self, T: int, seed: int, teleport: bool = True) -> float:
        """min over t < T of the mean over runs of max_g ‖∇L(g·w_t)‖², with η = 1/(β√(T − 1)); inf where it left the numbers."""
        if T < 2:
            raise ValueError(f"T must be at least 2, got {T}; η = 1/(β√(T − 1))")
        generator, rate, w = torch.Generator().manual_seed(seed), 1 / (self.beta * math.sqrt(T - 1)), self.start.clone()
        lowest = math.inf
        for _ in range(T):
            mean = float(self.highest(w).mean())
            lowest = min(lowest, mean) if math.isfinite(mean) else lowest
            w = self.teleport(w) if teleport else w
            w = w - rate * self.sample(w, generator)
        return lowest


def _quadratic(w: Tensor) -> Tensor:
    return 0.5 * (w.square() * EIGENVALUES).sum(1)


def _to_the_top(w: Tensor) -> Tensor:
    """The point of the ellipsoid wᵀAw where ‖Aw‖ is largest: the top eigenvector's end, on the side where w is."""
    there = torch.zeros_like(w)
    there[:, 0] = (2 * _quadratic(w) / EIGENVALUES[0]).sqrt() * torch.where(w[:, 0] < 0, -1.0, 1.0).to(w)
    return there


def shifted(spread: float = 0.3, runs: int = RUNS) -> Stochastic:
    """½(w − ξ)ᵀA(w − ξ), ξ normal with sd `spread`: β = λ₁, σ² = ½ spread² tr A; A^{-1/2} O(d) A^{1/2} leaves the mean loss alone."""

    def sample(w: Tensor, generator: torch.Generator) -> Tensor:
        return EIGENVALUES * (w - spread * torch.randn(w.shape, generator=generator, dtype=w.dtype))

    return Stochastic(
        "quadratics with shifted minima", float(EIGENVALUES[0]), 0.5 * spread**2 * float(EIGENVALUES.sum()), _start(runs),
        _quadratic, sample, lambda w: 2 * EIGENVALUES[0] * _quadratic(w), _to_the_top,
    )


def saturating(swing: float = 0.5, runs: int = RUNS) -> Stochastic:
    """(1 ± swing) q/(1 + q), q = ½wᵀAw: not convex, σ² = 0, β = (1 + swing) λ₁, since |eigenvalues of the Hessian| ≤ λ₁."""

    def sample(w: Tensor, generator: torch.Generator) -> Tensor:
        sign = torch.randint(0, 2, (len(w), 1), generator=generator) * 2 - 1
        return (1 + swing * sign) * EIGENVALUES * w / (1 + _quadratic(w)).square().unsqueeze(1)

    def highest(w: Tensor) -> Tensor:
        q = _quadratic(w)
        return 2 * EIGENVALUES[0] * q / (1 + q) ** 4

    return Stochastic(
        "saturating, not convex", (1 + swing) * float(EIGENVALUES[0]), 0.0, _start(runs),
        lambda w: _quadratic(w) / (1 + _quadratic(w)), sample, highest, _to_the_top,
    )


def product(radius: float = 2.0) -> Stochastic:
    """Outside: ½(uv − 1)² under (u, v) → (su, v/s), |log s| ≤ radius, with the β of the start: no β holds on the orbit."""

    def highest(w: Tensor) -> Tensor:
        scale = math.exp(2 * radius)
        u, v = w[:, 0].square(), w[:, 1].square()
        return (w.prod(1) - 1).square() * torch.maximum(u * scale + v / scale, u / scale + v * scale)

    def teleport(w: Tensor) -> Tensor:
        scale = math.exp(radius)
        up = torch.stack([w[:, 0] * scale, w[:, 1] / scale], 1)
        down = torch.stack([w[:, 0] / scale, w[:, 1] * scale], 1)
        return torch.where((w[:, :1].abs() >= w[:, 1:].abs()), up, down)

    start = torch.tensor([[1.5, 1.0]], dtype=torch.float64)
    (u, v), cross = start[0].tolist(), 2 * float(start.prod()) - 1
    hessian = torch.tensor([[v * v, cross], [cross, u * u]], dtype=torch.float64)
    return Stochastic(
        "½(uv − 1)², no β on the orbit", float(torch.linalg.eigvalsh(hessian)[-1]), 0.0, start,
        lambda w: 0.5 * (w.prod(1) - 1).square(), lambda w, _: (w.prod(1, keepdim=True) - 1) * w.flip(1), highest, teleport,
    )


def _start(runs: int) -> Tensor:
    return torch.tensor([[1.0, -1.0, 2.0, 3.0]], dtype=torch.float64).expand(runs, -1)
