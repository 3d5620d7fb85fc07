"""Tuning many equal networks as one: parameters stacked along a first axis, a rate each; for optimizers that act entry by entry.

torch's own optimizer steps the stack at rate 1, and each network keeps its rate's share of the way: p ← p + rate (p' − p). That
is its step at that rate, since none of SGD, Adagrad, RMSprop and AdamW without weight decay puts the rate into its state.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from bench.convergence.additions import ADDITIONS, Context, base_options, begin, parse
from bench.convergence.interface import Result
from bench.convergence.optimizers import base_named
from teleport_fast.experiments.train import rate_scale
from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.symmetries import Symmetries
from teleport_fast.symmetry.view import View


def stackable(arm: str, joints: Sequence[Joint]) -> bool:
    """Whether an arm's networks can be one stack: an elementwise optimizer, additions that are, joints of one head where they move."""
    base, added = parse(arm)
    moves = any(ADDITIONS[name].moves for name in added)
    return (
        base_named(base).first_order
        and all(ADDITIONS[name].stacks for name in added)
        and (not moves or all(joint.heads == 1 and all(view.head_axis is None for view in joint.views()) for joint in _stretching(joints)))
    )


def _stretching(joints: Sequence[Joint]) -> list[Joint]:
    return [joint for joint in joints if joint.group.form == "diagonal"]


def stacked_joint(joint: Joint, networks: int) -> Joint:
    """The joint with a head per network, which lies along a new first axis."""

    def stacked(view: View) -> View:
        return replace(view, axis=view.axis + 1, heads=networks, head_axis=0, head_start=0, head_stride=1, head_size=1)

    return replace(joint, heads=networks, plus=tuple(map(stacked, joint.plus)), minus=tuple(map(stacked, joint.minus)))


def stack(models: Sequence[nn.Module]) -> nn.Module:
    """A module with the models' parameter names, each holding all of theirs along a first axis."""
    held = copy.deepcopy(models[0])
    for name, parameter in list(held.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        together = torch.stack([model.get_parameter(name).detach() for model in models])
        setattr(held.get_submodule(owner), leaf, nn.Parameter(together, requires_grad=parameter.requires_grad))
    return held


def train_stacked(
    arm: str,
    options: Mapping[str, Any],
    networks: Sequence[tuple[float, int]],
    models: Sequence[nn.Module],
    joints: Sequence[Joint],
    data: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    rows_of: Callable[[int], Any],
    steps: int,
    points: int,
) -> list[Result]:
    """One result per (rate, seed), the curve of `points` points; `data`: training and test; `rows_of(seed)` yields mini-batches.

    A network whose loss is not finite has diverged: its weights go back to where they began, so that no other one waits for it.
    """
    (X, labels), (Y, answers) = data
    base, held = base_named(parse(arm)[0]), stack(models)
    named = list(held.named_parameters())
    begun = [p.detach().clone() for _, p in named]
    optimizer = base.make(named, 1.0, None, **base_options(arm, options))
    symmetries = Symmetries(tuple(stacked_joint(joint, len(networks)) for joint in _stretching(joints)), model=held)
    before, _ = begin(arm, Context(held, optimizer, symmetries, steps, 0, lambda: X.sum(), len(networks)), options)
    rates = torch.tensor([rate for rate, _ in networks])
    dead = torch.zeros(len(networks), dtype=torch.bool)
    template, seeds = models[0], sorted({seed for _, seed in networks})
    places = torch.tensor([seeds.index(seed) for _, seed in networks])
    streams = [itertools.islice(rows_of(seed), steps) for seed in seeds]

    def losses(parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(template, parameters, (inputs,)), targets)

    each, all_alike = torch.vmap(losses, in_dims=(0, 0, 0)), torch.vmap(losses, in_dims=(0, None, None))
    curves: list[tuple[int, list[float]]] = []
    for step, rows in enumerate(zip(*streams, strict=True)):
        chosen = torch.stack(rows)[places]
        optimizer.zero_grad()
        values = each(dict(held.named_parameters()), X[chosen], labels[chosen])
        values.sum().backward()
        with torch.no_grad():
            dead |= ~values.isfinite()
            for (_, p), first in zip(named, begun, strict=True):
                if p.grad is not None and bool(dead.any()):
                    shape = (-1, *[1] * (p.ndim - 1))
                    p.copy_(torch.where(dead.view(shape), first, p))
                    p.grad.copy_(torch.where(dead.view(shape), torch.zeros_like(p), p.grad))
        for action in before:
            action(step)
        step_(optimizer, [p for _, p in named], rates * rate_scale(step, steps))
        if (step + 1) * points // steps > step * points // steps:
            with torch.no_grad():
                values = all_alike({name: p.detach() for name, p in named}, X, labels)
            curves.append((step + 1, values.masked_fill(dead | ~values.isfinite(), math.inf).tolist()))
    with torch.no_grad():
        weights = {name: p.detach() for name, p in named}
        outputs = torch.vmap(lambda parameters: functional_call(template, parameters, (Y,)))(weights)
        test = all_alike(weights, Y, answers).tolist()
        right = (outputs.argmax(-1) == answers).double().mean(1).tolist()
    results = []
    for place, (_, seed) in enumerate(networks):
        curve = [(step, values[place]) for step, values in curves]
        measures = {"test loss": test[place], "test accuracy": right[place]}
        results.append(Result(seed, curve[-1][1], curve, {} if dead[place] else measures))
    return results


@torch.no_grad()
def step_(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], rates: Tensor, returns: bool = False) -> None:
    """The optimizer's step at a rate for each network. A teleport before it is kept whole; one that `returns` leaves nothing to keep."""
    begun: list[Tensor] = [p.detach().clone() for p in parameters] if returns else []
    # last of the hooks: after the teleport's
    handle = optimizer.register_step_pre_hook(lambda *_: None if returns else begun.extend(p.detach().clone() for p in parameters))
    try:
        optimizer.step()
    finally:
        handle.remove()
    for p, start in zip(parameters, begun, strict=True):
        p.sub_(start).mul_(rates.view(-1, *[1] * (p.ndim - 1))).add_(start)
