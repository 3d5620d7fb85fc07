"""Null-space teleportation (Wu, Dong, Aloui, Tarokh, arXiv 2502.11362): weights move where a batch's layer inputs do not see it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from teleport_fast.minima.point import Closure
from teleport_fast.peers.inputs import Collected, collecting, input_basis, movable, project
from teleport_fast.peers.oracle import Oracle, PeerResult, Step, check_search

# What an exact move may change the loss by in one step, relative: beyond it the weights are too large for the dtype.
LOSS_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
# The tangent share under which nothing but rounding is left of the projected gradient.
IDLE = {torch.float64: 1e-10, torch.float32: 1e-4}


@dataclass(frozen=True)
class NullSpaceResult(PeerResult):
    """PeerResult with `free`: by layer, the input directions that the batch leaves unseen; `skipped`: why a layer stays."""

    free: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def null_space_teleport(
    loss_fn: Closure,
    model: nn.Module,
    steps: int = 10,
    *,
    step_size: float | None = None,
    armijo: float = 0.25,
    halvings: int = 25,
    cap: float = math.inf,
    layers: Iterable[str] | None = None,
    rank_tolerance: float | None = None,
    energy: float = 1.0,
) -> NullSpaceResult:
    """Moves the model's Linear weights in place, ΔW h = 0 for all their inputs h in loss_fn(), to a larger ‖∇L‖.

    Steps ρ times the projection of H∇L/‖∇L‖², the gradient of log‖∇L‖ over all trained parameters, on the null space of each
    layer's inputs (a bias being one more input of ones), from one Hessian-vector product; inputs do not move, so one factorisation
    a layer serves all steps. ρ is halved until log‖∇L‖ gains armijo of the prediction and doubled after a full step, where the
    authors fix it. Exact to 1e-12 (float64), 1e-5 (float32) of the loss; a step that moves it by more is refused. rank_tolerance:
    singular values of the inputs under it times the largest are 0, default max(samples, n) eps; energy under 1: the authors'
    threshold, not exact. The first layer of a chain has nothing to gain: its null space moves no activation, so no gradient.
    ValueError on bad arguments, models without a Linear, a zero gradient. Source: the paper's algorithm; search our own.

    >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    >>> X = torch.randn(4, 3, dtype=torch.float64)
    >>> result = null_space_teleport(lambda: model(X).square().mean(), model, 2)
    >>> result.free, result.loss_change < 1e-12, result.gain > 1
    ({'0': 0, '2': 5}, True, True)
    """
    check_search(steps, step_size, armijo, halvings, cap)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module whose layers loss_fn calls, got {type(model).__name__}")
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be over 0 and at most 1, got {energy}; 1 is exact")
    if rank_tolerance is not None and not 0 <= rank_tolerance < 1:
        raise ValueError(f"rank_tolerance must be at least 0 and under 1, got {rank_tolerance}; leave it out for max(samples, n) eps")
    found, skipped = movable(model, layers)
    if not found:
        raise ValueError(f"model must have a trained torch.nn.Linear to move, got none; skipped: {skipped}")
    oracle = Oracle(loss_fn, [p for p in model.parameters() if p.requires_grad])
    with collecting(model, found):
        oracle.start()
    space = _Space(oracle, found, rank_tolerance, energy)
    skipped |= {layer.name: "loss_fn does not call it" for layer in found if layer.name not in space.free}
    start = oracle.flat()
    try:
        return _search(oracle, space, skipped, start, steps, step_size, armijo, halvings, cap, energy == 1)
    except BaseException:
        oracle.place(start)
        raise


class _Space:
    """The moves of all layers at once, as vectors of all parameters."""

    def __init__(self, oracle: Oracle, layers: list[Collected], tolerance: float | None, energy: float) -> None:
        at = {id(p): index for index, p in enumerate(oracle.params)}
        self.oracle, self.bases = oracle, []
        self.free: dict[str, int] = {}
        for layer in layers:
            if not layer.inputs:
                continue
            Q = input_basis(torch.cat(layer.inputs).to(layer.linear.weight), tolerance, energy)
            self.free[layer.name] = len(Q) - Q.shape[1]
            if self.free[layer.name]:
                self.bases.append(([at[id(p)] for p in layer.moved], layer.linear.weight.shape, Q))
            layer.inputs.clear()

    def project(self, v: Tensor) -> Tensor:
        """v (P,) in the null spaces: 0 for every parameter that has none."""
        parts, moved = v.split(self.oracle.sizes), torch.zeros_like(v)
        out = moved.split(self.oracle.sizes)
        for indices, shape, Q in self.bases:
            A = parts[indices[0]].reshape(shape)
            wide = torch.cat([A, parts[indices[1]].unsqueeze(1)], 1) if len(indices) > 1 else A
            wide = project(wide, Q)
            out[indices[0]].copy_(wide[:, : shape[1]].flatten())
            if len(indices) > 1:
                out[indices[1]].copy_(wide[:, -1])
        return moved


def _search(
    oracle: Oracle,
    space: _Space,
    skipped: dict[str, str],
    start: Tensor,
    steps: int,
    rho: float | None,
    armijo: float,
    halvings: int,
    cap: float,
    exact: bool,
) -> NullSpaceResult:
    level, square, w = oracle.loss, oracle.square, start
    allowed = LOSS_TOLERANCE[w.dtype] * abs(level) if exact else math.inf
    records: list[Step] = []
    stopped = "all steps done" if space.bases else "no layer has a null space on this batch: take a batch smaller than the widths"
    for _ in range(steps if space.bases else 0):
        loss, norm = oracle.loss, math.sqrt(oracle.square)
        q = oracle.hvp(oracle.gradient) / oracle.square
        d = space.project(q)
        length = float(torch.dot(d, d))
        if math.sqrt(length) <= IDLE[w.dtype] * float(torch.linalg.vector_norm(q)):
            stopped = "no null-space move changes the gradient (a first layer's never does)"
            break
        rho = 0.5 / length if rho is None else rho

        def improves(rho: float, norm: float = norm, length: float = length) -> bool:
            gained = 0.5 * math.log(oracle.square) - math.log(norm) if oracle.finite else -math.inf
            return gained >= armijo * rho * length and oracle.square <= cap and abs(oracle.loss - level) <= allowed

        trial, rho, halved = oracle.backtrack(w, d, rho, halvings, improves)
        if trial is None:
            stopped = f"no step of {halvings} halvings gains within the cap and keeps the loss"
            oracle.place(w)
            oracle.evaluate()
            break
        records.append(Step(loss, norm, rho, halved))
        w = trial
        rho = 2 * rho if halved == 0 else rho
    return NullSpaceResult(
        level, oracle.loss, math.sqrt(square), math.sqrt(oracle.square), oracle.gradients, oracle.hvps, stopped, tuple(records),
        space.free, skipped,
    )
