"""Level-set teleportation (Mishkin, Bietti, Gower, arXiv 2403.03362): the gradient norm's maximum on a level set, no symmetry asked."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from teleport_fast.minima.point import Closure
from teleport_fast.peers.oracle import Oracle, PeerResult, Step, check_search

# Newton's method on the loss along its own gradient: three steps usually reach rounding.
CORRECTIONS = 20
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


@dataclass(frozen=True)
class LevelSetResult(PeerResult):
    """PeerResult with `kkt`: the share of ∇ log‖∇L‖ that lies in the level set where the last step began, 0 at a stationary point."""

    kkt: float = math.nan


@dataclass
class _Step:
    """d = ρ q⊥ − (c/‖g‖²) g of the linearised problem, with the merit function's slope along it."""

    q: Tensor
    tangent: Tensor
    kkt: float
    penalty: float

    @classmethod
    def at(cls, oracle: Oracle, penalty: float) -> _Step:
        g = oracle.gradient
        q = oracle.hvp(g) / oracle.square
        multiplier = float(torch.dot(q, g)) / oracle.square
        tangent = q - multiplier * g
        norm = float(torch.linalg.vector_norm(q))
        kkt = float(torch.linalg.vector_norm(tangent)) / norm if norm > 0 else 0.0
        # Twice the multiplier: the loss's violation then costs more than all that the objective can gain by it.
        return cls(q, tangent, kkt, max(penalty, 2 * abs(multiplier)))


def level_set_teleport(
    loss_fn: Closure,
    params: Iterable[Tensor],
    steps: int = 10,
    *,
    step_size: float | None = None,
    armijo: float = 0.25,
    halvings: int = 25,
    cap: float = math.inf,
    tolerance: float | None = None,
    kkt: float = 1e-6,
) -> LevelSetResult:
    """Moves params in place to a larger ‖∇L‖ at the same loss_fn(); never to a smaller one, never past cap on ‖∇L‖².

    Each step solves max ⟨q, d⟩ − ‖d‖²/2ρ with L + ⟨∇L, d⟩ = L₀ and q = H∇L/‖∇L‖², the gradient of log‖∇L‖: one
    Hessian-vector product; ρ (step_size) is halved until the merit log‖∇L‖ − γ|L − L₀| has armijo of its predicted gain, and
    doubled after a full step. The end returns to |L − L₀| ≤ tolerance |L₀| by Newton steps along ∇L; kkt: stop where no more
    than this share of q is tangent. The log objective, the projection and the merit search are the authors'; γ, the first ρ
    and the way back are ours (tests/peers/test_level_set.py). float32 or float64. ValueError on bad arguments or a zero gradient.

    >>> w = torch.tensor([1.0, 1.0], dtype=torch.float64, requires_grad=True)
    >>> round(level_set_teleport(lambda: w[0] ** 2 + 4 * w[1] ** 2, [w], 50).gradient_norm_after / (4 * 5 ** 0.5), 6)
    1.0
    """
    check_search(steps, step_size, armijo, halvings, cap)
    if not 0 <= kkt < 1:
        raise ValueError(f"kkt must be at least 0 and under 1, got {kkt}; the default is 1e-6")
    oracle = Oracle(loss_fn, list(params))
    tolerance = TOLERANCE[oracle.params[0].dtype] if tolerance is None else tolerance
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}; the default is 1e-12 in float64 and 1e-6 in float32")
    start = oracle.flat()
    oracle.start()
    try:
        return _search(oracle, start, steps, step_size, armijo, halvings, cap, tolerance, kkt)
    except BaseException:
        oracle.place(start)
        raise


def _search(
    oracle: Oracle, start: Tensor, steps: int, rho: float | None, armijo: float, halvings: int, cap: float, tolerance: float, kkt: float
) -> LevelSetResult:
    level, square = oracle.loss, oracle.square
    reached, previous, w = 1.0, start, start
    penalty = 0.1 / abs(level) if level else 0.1
    records: list[Step] = []
    stopped = "all steps done"
    for _ in range(steps):
        loss, norm = oracle.loss, math.sqrt(oracle.square)
        step = _Step.at(oracle, penalty)
        penalty, reached = step.penalty, step.kkt
        length = float(torch.dot(step.tangent, step.tangent))
        violation = loss - level
        if step.kkt <= kkt:
            stopped = "stationary on the level set"
            break
        if rho is None:
            rho = 0.5 / length  # predicts a gain of half a log, whatever the scale of loss and weights
        back = -violation / norm**2 * oracle.gradient
        merit, flow = math.log(norm) - penalty * abs(violation), float(torch.dot(step.q, back)) + penalty * abs(violation)
        bound = max(cap, norm**2)

        def improves(
            rho: float, merit: float = merit, penalty: float = penalty, length: float = length, flow: float = flow, bound: float = bound
        ) -> bool:
            if not (oracle.finite and oracle.square <= bound):
                return False
            gained = 0.5 * math.log(oracle.square) - penalty * abs(oracle.loss - level) - merit
            return gained >= armijo * (rho * length + flow)

        trial, rho, halved = oracle.backtrack(w + back, step.tangent, rho, halvings, improves)
        if trial is None:
            stopped = f"no step of {halvings} halvings improves the merit function within the cap"
            oracle.place(w)
            oracle.evaluate()
            break
        records.append(Step(loss, norm, rho, halved))
        previous, w = w, trial
        rho = 2 * rho if halved == 0 else rho
    for candidate in (w, previous):
        if _corrected(oracle, candidate, level, tolerance) and square <= oracle.square <= max(cap, square):
            break
    else:
        stopped = f"undone: no point of the path is on the level set with a larger gradient; {stopped}"
        oracle.place(start)
        oracle.evaluate()
    return LevelSetResult(
        level, oracle.loss, math.sqrt(square), math.sqrt(oracle.square), oracle.gradients, oracle.hvps, stopped, tuple(records), reached
    )


def _corrected(oracle: Oracle, w: Tensor, level: float, tolerance: float) -> bool:
    """w ← w − (L − L₀)/‖∇L‖² ∇L until |L − L₀| ≤ tolerance |L₀|, each step halved while it does not come nearer."""
    if not torch.equal(w, oracle.flat()):
        oracle.place(w)
        oracle.evaluate()
    bound = max(tolerance * abs(level), 4 * torch.finfo(w.dtype).eps * abs(level), 1e-300)
    for _ in range(CORRECTIONS):
        miss = oracle.loss - level
        if not oracle.finite or abs(miss) <= bound:
            break
        move = -miss / oracle.square * oracle.gradient
        for _ in range(8):
            oracle.place(w + move)
            oracle.evaluate()
            if abs(oracle.loss - level) < abs(miss):
                w = w + move
                break
            move = move / 2
        else:
            oracle.place(w)
            oracle.evaluate()
            break
    return oracle.finite and abs(oracle.loss - level) <= bound
