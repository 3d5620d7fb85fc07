"""Loss, gradient and Hessian-vector products at the present parameters, each counted, and the report that every peer gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from teleport_fast.minima.point import Closure, check_graph, checked_loss, checked_parameters


@dataclass(frozen=True)
class Step:
    """One accepted step: loss and ‖∇L‖ before it, its size in the objective's gradient, how often that was halved."""

    loss: float
    gradient_norm: float
    step_size: float
    halvings: int


@dataclass(frozen=True)
class PeerResult:
    """What a teleport did and what it cost: `gradients` are forward and backward passes, `hvps` Hessian-vector products.

    >>> PeerResult(2.0, 2.0, 1.0, 3.0, 4, 2, "all steps done").gain
    3.0
    """

    loss_before: float
    loss_after: float
    gradient_norm_before: float
    gradient_norm_after: float
    gradients: int
    hvps: int
    stopped: str
    steps: tuple[Step, ...] = ()

    @property
    def loss_change(self) -> float:
        """|L' − L| / |L|."""
        return abs(self.loss_after - self.loss_before) / max(abs(self.loss_before), 1e-300)

    @property
    def gain(self) -> float:
        """‖∇L‖ after over before."""
        return self.gradient_norm_after / max(self.gradient_norm_before, 1e-300)

    def __str__(self) -> str:
        return (f"gradient norm {self.gradient_norm_before:.6g} -> {self.gradient_norm_after:.6g}, loss moved by "
                f"{self.loss_change:.1e} of itself, {self.gradients} gradients, {self.hvps} Hessian-vector products; {self.stopped}")


class Oracle:
    """`evaluate()` takes loss and gradient (P,) at the parameters as they stand, `hvp(v)` is H v at the last such point.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> oracle = Oracle(lambda: (w ** 2).sum(), [w])
    >>> oracle.evaluate(); oracle.loss, oracle.gradient.tolist(), oracle.hvp(torch.ones(2)).tolist(), oracle.hvps
    (5.0, [2.0, 4.0], [2.0, 2.0], 1)
    """

    def __init__(self, loss_fn: Closure, params: list[Tensor]) -> None:
        if not callable(loss_fn):
            raise ValueError(f"loss_fn must be a function without arguments that returns the loss, got {type(loss_fn).__name__}")
        self.loss_fn, self.params = loss_fn, checked_parameters(params)
        if self.params[0].dtype not in (torch.float32, torch.float64):
            raise ValueError(f"params must be float32 or float64, got {self.params[0].dtype}; convert the model with .double()")
        self.sizes = [p.numel() for p in self.params]
        self.gradients = self.hvps = 0

    def evaluate(self) -> None:
        """One forward and one backward; the graph stays for hvp."""
        with torch.enable_grad():
            loss = checked_loss(self.loss_fn())
            check_graph(loss, self.params)
            self._parts = torch.autograd.grad(loss, self.params, create_graph=True, allow_unused=True)
        self.gradients += 1
        self.loss = float(loss.detach())
        self.gradient = self._flat(self._parts)
        self.square = float(torch.dot(self.gradient, self.gradient))

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are finite and the gradient is not 0."""
        return math.isfinite(self.loss) and math.isfinite(self.square) and self.square > 0

    def hvp(self, v: Tensor) -> Tensor:
        """H v, (P,); once per evaluate, which frees the graph."""
        self.hvps += 1
        kept = [i for i, g in enumerate(self._parts) if g is not None and g.requires_grad]
        if not kept:
            return torch.zeros_like(v)
        parts = v.split(self.sizes)
        found = torch.autograd.grad(
            [self._parts[i] for i in kept], self.params, [parts[i].reshape(self.params[i].shape) for i in kept], allow_unused=True
        )
        return self._flat(found)

    def start(self) -> None:
        """The first evaluate; ValueError where there is nothing to teleport from."""
        self.evaluate()
        if not (math.isfinite(self.loss) and math.isfinite(self.square)):
            raise ValueError(f"loss_fn must be finite at params, got loss {self.loss} and ‖∇L‖² {self.square}; check the data")
        if self.square == 0:
            raise ValueError("the gradient is 0 at params: a stationary point has no direction to go; take a step first")

    def flat(self) -> Tensor:
        """A copy of the parameters, (P,)."""
        return self._flat([p.detach() for p in self.params]).clone()

    @torch.no_grad()
    def place(self, w: Tensor) -> None:
        """Puts the parameters to w (P,), in place."""
        for p, part in zip(self.params, w.split(self.sizes), strict=True):
            p.copy_(part.reshape(p.shape))

    def backtrack(
        self, base: Tensor, direction: Tensor, rho: float, halvings: int, improves: Callable[[float], bool]
    ) -> tuple[Tensor | None, float, int]:
        """(base + ρ direction, ρ, how often ρ was halved) for the first ρ that `improves(ρ)`, asked at that point evaluated.

        None, with the parameters there, where no ρ of `halvings` does.
        """
        for halved in range(halvings):
            trial = torch.add(base, direction, alpha=rho)
            self.place(trial)
            self.evaluate()
            if improves(rho):
                return trial, rho, halved
            rho /= 2
        return None, rho, halvings

    def _flat(self, parts: tuple[Tensor | None, ...] | list[Tensor]) -> Tensor:
        return torch.cat([(torch.zeros_like(p) if x is None else x).detach().flatten() for p, x in zip(self.params, parts, strict=True)])


def check_search(steps: int, step_size: float | None, armijo: float, halvings: int, cap: float) -> None:
    """ValueError for arguments that both searches refuse."""
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    if step_size is not None and not (step_size > 0 and math.isfinite(step_size)):
        raise ValueError(f"step_size must be positive and finite, got {step_size}; leave it out for one that suits the start")
    if not 0 < armijo < 1:
        raise ValueError(f"armijo must be between 0 and 1, got {armijo}; the default is 0.25")
    if halvings < 1:
        raise ValueError(f"halvings must be at least 1, got {halvings}; the default is 25")
    if not cap > 0:
        raise ValueError(f"cap must be positive, got {cap}; it bounds ‖∇L‖², leave it out for none")
