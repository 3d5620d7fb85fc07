"""The optimizers that tasks with a network compare, by name: how each is made, and what of it is tuned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import teleport_fast as tf
from bench.convergence.interface import Space
from bench.convergence.peers.shampoo import Shampoo
from teleport_fast.experiments.muon import muon

Named = list[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class Base:
    """`make(named parameters, rate, symmetries, **options)`; `rate`: where six rates begin (the third); the choices tuned.

    `first_order`: an elementwise rule, whose state a teleport can carry. `steps_by`: who evaluates the loss a second time
    ("closure", SAM), or needs to be told when weights are read ("modes", schedule-free).
    """

    make: Callable[..., Optimizer]
    rate: float
    choices: tuple[Mapping[str, Any], ...]
    first_order: bool = False
    steps_by: str = ""


def one(name: str, *values: Any) -> tuple[dict[str, Any], ...]:
    """Choices that differ in one option, the usual value first.

    >>> one("momentum", 0.9, 0.8)
    ({'momentum': 0.9}, {'momentum': 0.8})
    """
    return tuple({name: value} for value in values)


def _betas(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"betas": (options["beta1"], options["beta2"])}


def _tensors(named: Named) -> list[nn.Parameter]:
    return [parameter for _, parameter in named]


def _adamw(named: Named, rate: float, _: Any, **options: Any) -> Optimizer:
    return torch.optim.AdamW(_tensors(named), lr=rate, weight_decay=0.0, **_betas(options))


def _muon(named: Named, rate: float, _: Any, momentum: float, rest: float) -> Optimizer:
    """torch's Muon for matrices but the head, which its authors leave to AdamW with all else; `rest`: that one's rate as a share."""
    blocks = [(name, p) for name, p in named if not name.startswith("head")]
    head = [(name, p) for name, p in named if name.startswith("head")]
    return muon([{"params": blocks}, {"params": head, "lr": rate * rest}], lr=rate, momentum=momentum)


def _soap(named: Named, rate: float, _: Any, **options: Any) -> Optimizer:
    return _package().SOAP(_tensors(named), lr=rate, weight_decay=0.0, precondition_frequency=options["every"], betas=(options["beta1"], 0.95))


def _sam(named: Named, rate: float, _: Any, rho: float, beta1: float) -> Optimizer:
    options = {"lr": rate, "weight_decay": 0.0, "betas": (beta1, 0.99)}
    return _package().SAM(_tensors(named), torch.optim.AdamW, rho=rho, **options)


def _schedule_free(named: Named, rate: float, _: Any, **options: Any) -> Optimizer:
    try:
        from schedulefree import AdamWScheduleFree
    except ModuleNotFoundError as error:
        remedy = "pip install schedulefree==1.4.1"
        raise ModuleNotFoundError(f"schedule-free AdamW comes from schedulefree; {remedy}", name="schedulefree") from error
    made: Optimizer = AdamWScheduleFree(_tensors(named), lr=rate, weight_decay=0.0, **_betas(options))
    return made


def _rotated(named: Named, rate: float, symmetries: Any, beta1: float, hidden: bool | None = None, **options: Any) -> Optimizer:
    # without a residual stream (an MLP, a convolutional net) every side of a matrix is turned
    streams = symmetries is not None and any(joint.group.form == "dense" for joint in symmetries)
    given: dict[str, Any] = {"symmetries": symmetries} if streams else {"sides": {"*": ("whole", "whole")}}
    if hidden is not None:
        given["hidden"] = hidden
    return tf.optim.Rotated(named, lr=rate, betas=(beta1, options["beta2"]), **given)


def _package() -> Any:
    try:
        import pytorch_optimizer
    except ModuleNotFoundError as error:
        remedy = "pip install pytorch_optimizer==4.1.0"
        raise ModuleNotFoundError(f"SOAP and SAM come from pytorch_optimizer; {remedy}", name="pytorch_optimizer") from error
    return pytorch_optimizer


BETAS = ({"beta1": 0.9, "beta2": 0.95}, {"beta1": 0.8, "beta2": 0.95}, {"beta1": 0.9, "beta2": 0.99})
TURNED = ({"beta1": 0.9, "beta2": 0.98}, {"beta1": 0.8, "beta2": 0.98}, {"beta1": 0.9, "beta2": 0.95})
BASES: dict[str, Base] = {
    "adamw": Base(_adamw, 0.004, BETAS, first_order=True),
    "sgd": Base(lambda named, rate, _: torch.optim.SGD(_tensors(named), lr=rate), 0.2, ({},), first_order=True),
    "momentum": Base(
        lambda named, rate, _, **o: torch.optim.SGD(_tensors(named), lr=rate, **o), 0.05,
        one("momentum", 0.9, 0.95, 0.8), first_order=True,
    ),
    "adagrad": Base(
        lambda named, rate, _, **o: torch.optim.Adagrad(_tensors(named), lr=rate, **o), 0.02,
        one("initial_accumulator_value", 0.0, 1e-4, 1e-2), first_order=True,
    ),
    "rmsprop": Base(
        lambda named, rate, _, **o: torch.optim.RMSprop(_tensors(named), lr=rate, **o), 0.002,
        ({"alpha": 0.95, "momentum": 0.0}, {"alpha": 0.95, "momentum": 0.8}, {"alpha": 0.99, "momentum": 0.0}), first_order=True,
    ),
    "muon": Base(_muon, 0.02, ({"momentum": 0.95, "rest": 0.3}, {"momentum": 0.9, "rest": 0.3}, {"momentum": 0.9, "rest": 0.1})),
    "soap": Base(_soap, 0.004, ({"beta1": 0.95, "every": 10}, {"beta1": 0.9, "every": 10}, {"beta1": 0.9, "every": 1})),
    "shampoo": Base(lambda named, rate, _, **o: Shampoo(_tensors(named), lr=rate, **_betas(o)), 0.004, BETAS),
    "sam": Base(_sam, 0.004, ({"rho": 0.05, "beta1": 0.9}, {"rho": 0.01, "beta1": 0.9}, {"rho": 0.2, "beta1": 0.9}), steps_by="closure"),
    "schedule-free": Base(_schedule_free, 0.008, BETAS, steps_by="modes"),
    "rotated": Base(_rotated, 0.004, TURNED),
    "rotated-hidden": Base(
        lambda named, rate, symmetries, **o: _rotated(named, rate, symmetries, hidden=True, **o), 0.004,
        TURNED,
    ),
}
FIRST_ORDER = tuple(name for name, base in BASES.items() if base.first_order)


def base_named(name: str) -> Base:
    """The optimizer of that name; ValueError for an unknown one."""
    if name not in BASES:
        raise ValueError(f"optimizer must be one of {', '.join(BASES)}, got {name!r}; pass one of these names")
    return BASES[name]


def base_space(name: str) -> Space:
    """The rates and choices of an optimizer without additions."""
    base = base_named(name)
    return Space.around(base.rate, base.choices)

