"""What an arm adds to its optimizer: `adamw+rotations`, `momentum+balance-once`, `adamw+clip`; teleports, peers and controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import teleport_fast as tf
from bench.convergence.interface import RATES, TRIALS, Space
from bench.convergence.optimizers import base_named, base_space
from teleport_fast.peers import level_set_teleport
from teleport_fast.symmetry.symmetries import Symmetries

# How many teleports a run has where they are rare, as the papers have them.
RARE = 10
LEVEL_SET_TELEPORTS = 3
CLIP = 1.0
RADII = ({"radius": 0.2}, {"radius": 0.05})


@dataclass(frozen=True)
class Context:
    """What an addition may need: the model, its optimizer, its joints, the run's length and seed, the loss on all training data.

    `networks`: how many lie in the model along a first axis of every parameter; 1: the model is one.
    """

    model: nn.Module
    optimizer: Optimizer
    symmetries: Symmetries
    steps: int
    seed: int
    full_loss: Callable[[], Tensor]
    networks: int = 1


# Called before each step with its number, gradients in place.
BeforeStep = Callable[[int], None]


@dataclass(frozen=True)
class Addition:
    """`begin(context, **options)` puts it in place and may return what is called before steps; `choices` are its own tuned options.

    `dense`: it needs rotations, which only a model with a residual stream or heads has. `second_gradient`: what it does before a
    step changes the weights, so that the gradient is computed again. `stacks`: it treats each network of a stack alike; `moves`: along
    joints that stretch.
    """

    begin: Callable[..., BeforeStep | None]
    choices: tuple[Mapping[str, Any], ...] = ({},)
    dense: bool = False
    second_gradient: bool = False
    stacks: bool = True
    moves: bool = False


def _teleport(objective: str, schedule: Callable[[int], Any]) -> Callable[..., None]:
    def begin(context: Context, **options: Any) -> None:
        tf.attach(
            context.optimizer, context.symmetries, objective=objective, schedule=schedule(context.steps), seed=context.seed, **options
        )

    return begin


def _rarely(steps: int) -> int:
    return max(1, steps // RARE)


def _reset(context: Context) -> BeforeStep:
    def before(step: int) -> None:
        if step and step % _rarely(context.steps) == 0:
            context.optimizer.state.clear()

    return before


def _clip(context: Context) -> BeforeStep:
    parameters = list(context.model.parameters())

    def before(_: int) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        if context.networks == 1:
            nn.utils.clip_grads_with_norm_(parameters, CLIP, nn.utils.get_total_norm(gradients))
            return
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
        factor = (CLIP / (norms + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor.view(-1, *[1] * (gradient.ndim - 1)))

    return before


def _level_set(context: Context, cap: float) -> BeforeStep:
    """Ten steps on the level set of the whole training loss, at the first of a run's tenths; `cap`: on the growth of ‖∇L‖²."""
    every = _rarely(context.steps)
    parameters = [p for p in context.model.parameters() if p.requires_grad]

    def before(step: int) -> None:
        if step % every == 0 and step < LEVEL_SET_TELEPORTS * every:
            held = [p.grad for p in parameters]
            loss = context.full_loss()
            loss.backward()
            square = sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None)
            for p, gradient in zip(parameters, held, strict=True):
                p.grad = gradient
            level_set_teleport(context.full_loss, parameters, steps=10, cap=cap * square)

    return before


ADDITIONS: dict[str, Addition] = {
    "balance-once": Addition(_teleport("balance", lambda _: tf.Once(step=0)), moves=True),
    "balance-every": Addition(_teleport("balance", lambda _: tf.When(lambda _: True)), moves=True),
    "rotations": Addition(_teleport("eigenbasis", lambda _: tf.Every(3)), dense=True, stacks=False),
    "random": Addition(_teleport("random", lambda _: tf.Every(10)), dense=True, stacks=False),
    "grad-norm": Addition(_teleport("grad_norm", lambda steps: tf.Every(_rarely(steps))), RADII, moves=True),
    "grad-l1": Addition(_teleport("grad_l1", lambda steps: tf.Every(_rarely(steps))), RADII, moves=True),
    "level-set": Addition(_level_set, choices=({"cap": 4.0}, {"cap": 100.0}), second_gradient=True, stacks=False),
    "reset": Addition(_reset),
    "clip": Addition(_clip),
    # the task reads it: the start that its own is a bad version of
    "good-start": Addition(lambda _: None),
}


def parse(arm: str) -> tuple[str, tuple[str, ...]]:
    """(optimizer, additions) of an arm's name; ValueError for what is unknown.

    >>> parse("adamw+rotations+clip")
    ('adamw', ('rotations', 'clip'))
    """
    base, *added = arm.split("+")
    base_named(base)
    for name in added:
        if name not in ADDITIONS:
            raise ValueError(f"addition must be one of {', '.join(ADDITIONS)}, got {name!r} in {arm!r}; pass one of these names")
    return base, tuple(added)


def arm_space(arm: str) -> Space:
    """The optimizer's rates; its choices and those of what is added, each beside the others' first, as many as the budget holds."""
    base, added = parse(arm)
    choices: list[Mapping[str, Any]] = [{}]
    for name in added:
        choices = [{**one, **other} for one in choices for other in ADDITIONS[name].choices]
    space = base_space(base)
    star = [{**space.choices[0], **other} for other in choices] + [{**mine, **choices[0]} for mine in space.choices[1:]]
    return Space(space.rates, tuple(star[: TRIALS // RATES]))


def begin(arm: str, context: Context, options: Mapping[str, Any]) -> tuple[list[BeforeStep], bool]:
    """Puts an arm's additions in place; what is to be called before each step, and whether the gradient is then computed again."""
    found, again = [], False
    for name in parse(arm)[1]:
        addition = ADDITIONS[name]
        own = {key: options[key] for key in addition.choices[0]}
        before = addition.begin(context, **own)
        if before is not None:
            found.append(before)
        again = again or addition.second_gradient
    return found, again


def base_options(arm: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are the optimizer's, not an addition's."""
    taken = {key for name in parse(arm)[1] for key in ADDITIONS[name].choices[0]}
    return {key: value for key, value in options.items() if key not in taken}
