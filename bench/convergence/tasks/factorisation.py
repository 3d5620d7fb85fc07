"""Matrix factorisation: M = U Vᵀ of known rank from a random start, κ = 1, 10, 100, the factors' scales balanced or not.

Judged by the steps to a relative error of 1e-6. Gradients are exact and the rate is constant: a decay would only slow what
converges linearly. All rates and seeds of a choice are one stack, whose symmetry is a joint with a head for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import teleport_fast as tf
from bench.convergence.interface import Result, Space, Task, Trial
from bench.convergence.optimizers import BETAS, one
from bench.convergence.stacked import step_
from teleport_fast.peers import level_set_teleport
from teleport_fast.symmetry.groups import GeneralLinear
from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.symmetries import Symmetries
from teleport_fast.symmetry.view import View

TOLERANCE = 1e-6
# e^N(0, SPREAD) per column in a random basis, on top of a factor of SCALE
SPREAD, SCALE = 1.5, 10.0
CHECK_EVERY = 5


@dataclass(frozen=True)
class Problem:
    """Sizes, the condition number of M (singular values from 1 to 1/κ, log-spaced), and how many steps there are."""

    condition: float
    balanced: bool
    steps: int
    rows: int = 40
    columns: int = 30
    rank: int = 5


class Factors(nn.Module):
    """U (networks, rows, rank) and V (networks, columns, rank) with their targets."""

    def __init__(self, U: Tensor, V: Tensor, M: Tensor) -> None:
        super().__init__()
        self.U, self.V, self.M = nn.Parameter(U), nn.Parameter(V), M

    def losses(self) -> Tensor:
        """½‖UVᵀ − M‖² by network."""
        return 0.5 * (self.U @ self.V.mT - self.M).square().sum((1, 2))

    @torch.no_grad()
    def errors(self) -> Tensor:
        """‖UVᵀ − M‖ / ‖M‖ by network."""
        return torch.linalg.matrix_norm(self.U @ self.V.mT - self.M) / torch.linalg.matrix_norm(self.M)

    def symmetries(self) -> Symmetries:
        """One joint of GL(rank) with a head per network."""
        heads, _, rank = self.U.shape
        plus, minus = (View(name, axis=2, heads=heads, width=rank, head_axis=0) for name in ("U", "V"))
        return Symmetries((Joint("factors", "linear", GeneralLinear(rank), heads, rank, (plus,), (minus,)),), model=self)


def start(problem: Problem, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U, V, M) of a seed; unbalanced: U → U g, V → V g⁻ᵀ, so that U Vᵀ is the balanced start's."""
    generator = torch.Generator().manual_seed(31_000 + seed)
    draw: Callable[..., Tensor] = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    left, right = (torch.linalg.qr(draw(size, problem.rank))[0] for size in (problem.rows, problem.columns))
    values = torch.logspace(0, -math.log10(problem.condition), problem.rank, dtype=torch.float64)
    M = (left * values) @ right.mT
    U, V = draw(problem.rows, problem.rank) / problem.rows**0.5, draw(problem.columns, problem.rank) / problem.columns**0.5
    basis, spread = torch.linalg.qr(draw(problem.rank, problem.rank))[0], (SPREAD * draw(problem.rank)).exp() * SCALE
    if not problem.balanced:
        U, V = U @ (basis * spread) @ basis.mT, V @ (basis / spread) @ basis.mT
    return U, V, M


@torch.no_grad()
def _scaled(factors: Factors, damping: float) -> None:
    """G_U → G_U (VᵀV + δI)⁻¹ and its mirror, from the same weights."""
    U, V = factors.U, factors.V
    assert U.grad is not None and V.grad is not None
    eye = damping * torch.eye(U.shape[-1], dtype=U.dtype)
    U.grad.copy_(torch.linalg.solve(V.mT @ V + eye, U.grad, left=False))
    V.grad.copy_(torch.linalg.solve(U.mT @ U + eye, V.grad, left=False))


Begin = Callable[[Factors, Optimizer, Mapping[str, Any]], None]


def _attached(objective: str, schedule: Any, frame: str = "stay") -> Begin:
    def begin(factors: Factors, optimizer: Optimizer, _: Mapping[str, Any]) -> None:
        tf.attach(optimizer, factors.symmetries(), objective=objective, schedule=schedule(), frame=frame)

    return begin


def _preconditioned(factors: Factors, optimizer: Optimizer, options: Mapping[str, Any]) -> None:
    """ScaledGD (Tong, Ma, Chi, arXiv 2005.08898) over SGD, ScaledAdam (arXiv 2402.02347, algorithm 2) over AdamW."""
    optimizer.register_step_pre_hook(lambda *_: _scaled(factors, options.get("damping", 0.0)))


def _level_set(factors: Factors, _: Optimizer, options: Mapping[str, Any]) -> None:
    """Ten steps to a larger gradient on each network's level set, before the first step."""
    for place in range(len(factors.U)):
        U, V = (p.detach()[place].clone().requires_grad_() for p in (factors.U, factors.V))

        def loss(U: Tensor = U, V: Tensor = V, M: Tensor = factors.M[place]) -> Tensor:
            return 0.5 * (U @ V.mT - M).square().sum()

        square = sum(float(g.square().sum()) for g in torch.autograd.grad(loss(), (U, V)))
        level_set_teleport(loss, [U, V], steps=10, cap=options["cap"] * square)
        with torch.no_grad():
            factors.U[place], factors.V[place] = U, V


SGD: Callable[..., Optimizer] = lambda named, **o: torch.optim.SGD(named, lr=1.0, momentum=o.get("momentum", 0.0))  # noqa: E731
ADAMW: Callable[..., Optimizer] = lambda named, **o: torch.optim.AdamW(  # noqa: E731
    named, lr=1.0, weight_decay=0.0, betas=(o["beta1"], o["beta2"])
)
MOMENTA = one("momentum", 0.9, 0.95, 0.8)
DAMPED = tuple({**BETAS[0], "damping": damping} for damping in (0.0, 1e-6, 1e-3))
ONCE, EVERY = _attached("balance", lambda: tf.Once(step=0)), _attached("balance", lambda: tf.When(lambda _: True))
INVARIANT = _attached("scaled", lambda: None, frame="return")
# optimizer, the third of the six first rates, choices, what is put around it
ARMS: dict[str, tuple[Callable[..., Optimizer], float, tuple[Mapping[str, Any], ...], Begin | None]] = {
    "gd": (SGD, 0.2, ({},), None),
    "gd+balance-once": (SGD, 0.2, ({},), ONCE),
    "gd+balance-every": (SGD, 0.2, ({},), EVERY),
    "gd+invariant": (SGD, 0.2, ({},), INVARIANT),
    "scaledgd": (SGD, 0.2, ({},), _preconditioned),
    "gd+level-set": (SGD, 0.2, ({"cap": 4.0}, {"cap": 100.0}), _level_set),
    "momentum": (SGD, 0.05, MOMENTA, None),
    "momentum+balance-once": (SGD, 0.05, MOMENTA, ONCE),
    "adamw": (ADAMW, 0.01, BETAS, None),
    "adamw+balance-once": (ADAMW, 0.01, BETAS, ONCE),
    "adamw+invariant": (ADAMW, 0.01, BETAS, INVARIANT),
    "scaledadam": (ADAMW, 0.01, DAMPED, _preconditioned),
}


class Factorisation(Task):
    """Steps to a relative error of 1e-6."""

    loss = "steps to 1e-6"
    compared_by, failed = "ratio", "not reached"
    # at a constant rate Adam ends at its rate's own noise, so that its arms, which can be asked for, are no defaults
    arms = tuple(arm for arm in ARMS if "adam" not in arm)
    # at the edge of stability two seeds say little about a third; in a stack they cost nothing
    tuning_seeds, seeds = tuple(range(100, 108)), tuple(range(8))

    def __init__(self, problem: Problem) -> None:
        self.problem, self.steps = problem, problem.steps
        self.name = f"factorisation-k{problem.condition:g}-{'balanced' if problem.balanced else 'unbalanced'}"

    def setting(self) -> dict[str, Any]:
        return {**asdict(self.problem), "spread": SPREAD, "scale": SCALE, "tolerance": TOLERANCE}

    def space(self, arm: str) -> Space:
        if arm not in ARMS:
            raise ValueError(f"arm must be one of {', '.join(ARMS)}, got {arm!r}; pass one of these names")
        _, rate, choices, _ = ARMS[arm]
        return Space.around(rate, choices)

    def references(self, arm: str) -> tuple[str, ...]:
        own = (arm.split("+")[0], *(("scaledgd",) if arm.startswith("gd+") else ()))
        return tuple(other for other in own if other != arm)

    def score(self, results: Sequence[Result]) -> float:
        """The mean logarithm of the steps; where the error did not get there, of all the steps and what is left of it."""
        logs = [
            math.log(result.final) if not result.diverged else math.log(self.steps * result.measures["relative error"] / TOLERANCE)
            for result in results
        ]
        return sum(logs) / len(logs)

    def train(self, trial: Trial, seeds: Sequence[int]) -> Iterator[Result]:
        yield from (result for _, result in self._stack([trial], seeds, tuning=False))

    def tune(self, trials: Sequence[Trial], seeds: Sequence[int]) -> Iterator[tuple[Trial, Result]]:
        for options in {repr(trial.options): trial.options for trial in trials}.values():
            yield from self._stack([trial for trial in trials if trial.options == options], seeds, tuning=True)

    def _stack(self, trials: Sequence[Trial], seeds: Sequence[int], tuning: bool) -> Iterator[tuple[Trial, Result]]:
        """All trials (of equal options) on all seeds; tuning ends once one of them is there on every seed: the rest are slower."""
        pairs = [(trial, seed) for trial in trials for seed in seeds]
        factors = Factors(*map(torch.stack, zip(*(start(self.problem, seed) for _, seed in pairs), strict=True)))
        make, _, _, begin = ARMS[trials[0].arm]
        optimizer = make([factors.U, factors.V], **trials[0].options)
        if begin is not None:
            begin(factors, optimizer, trials[0].options)
        first = [p.detach().clone() for p in factors.parameters()]
        rates = torch.tensor([trial.rate for trial, _ in pairs], dtype=torch.float64)
        reached, dead = torch.full_like(rates, math.inf), torch.zeros_like(rates, dtype=torch.bool)
        errors = factors.errors()
        for step in range(max(1, round(trials[0].share * self.steps))):
            optimizer.zero_grad()
            factors.losses().sum().backward()
            _restart_(list(factors.parameters()), first, dead | (reached < math.inf))
            step_(optimizer, list(factors.parameters()), rates, returns=begin is INVARIANT)
            now = factors.errors()
            dead |= ~(now < 1e6)
            errors = torch.where(reached < math.inf, errors, torch.where(dead, math.inf, now))
            reached = torch.where((errors <= TOLERANCE) & (reached == math.inf), step + 1.0, reached)
            if step % CHECK_EVERY == 0:
                ended = (reached < math.inf) | dead
                there = (reached < math.inf).view(len(trials), len(seeds)).all(1)
                if bool(ended.all()) or (tuning and bool(there.any())):
                    break
        for (trial, seed), steps, error in zip(pairs, reached.tolist(), errors.tolist(), strict=True):
            yield trial, Result(seed, steps, measures={"relative error": error})


@torch.no_grad()
def _restart_(parameters: Sequence[Tensor], first: Sequence[Tensor], ended: Tensor) -> None:
    """Networks that have ended go back to where they began, without a gradient: they must not overflow, nor hold the others up."""
    if not bool(ended.any()):
        return
    for p, begun in zip(parameters, first, strict=True):
        assert p.grad is not None
        p.copy_(torch.where(ended.view(-1, 1, 1), begun, p))
        p.grad.copy_(torch.where(ended.view(-1, 1, 1), torch.zeros_like(p), p.grad))


def variants(quick: bool) -> tuple[Factorisation, ...]:
    """κ = 1, 10, 100, from a balanced and from an unbalanced start."""
    lengths = {1.0: 300, 10.0: 500, 100.0: 2000}
    pairs = [(condition, balanced) for condition in lengths for balanced in (True, False)]
    return tuple(Factorisation(Problem(condition, balanced, 60 if quick else lengths[condition])) for condition, balanced in pairs)
