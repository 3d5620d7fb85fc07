"""The arms of a comparison: an optimizer alone, or a base optimizer with a teleport attached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import teleport_fast as tf
from teleport_fast.experiments.muon import muon


@dataclass(frozen=True)
class Base:
    """An optimizer and its options; `table_rate=None` gives embeddings and head the blocks' rate.

    `teleports`: whether a teleport can be attached to it; `wants_symmetries`: whether `make` takes the model's.
    """

    make: Callable[..., Optimizer]
    options: dict[str, Any]
    rate: float
    table_rate: float | None
    teleports: bool = True
    wants_symmetries: bool = False


BASES = {
    "adamw": Base(torch.optim.AdamW, {"betas": (0.9, 0.95), "weight_decay": 0.0}, 0.003, 0.01),
    "adam": Base(torch.optim.Adam, {"betas": (0.9, 0.95)}, 0.003, 0.01),
    "sgd": Base(torch.optim.SGD, {"momentum": 0.9}, 0.3, None),
    "adagrad": Base(torch.optim.Adagrad, {}, 0.01, 0.03),
    "rmsprop": Base(torch.optim.RMSprop, {"alpha": 0.95}, 0.001, 0.003),
    "muon": Base(muon, {"momentum": 0.95}, 0.02, 0.01, teleports=False),
    "rotated": Base(tf.optim.Rotated, {"betas": (0.9, 0.98)}, 0.006, 0.01, teleports=False, wants_symmetries=True),
    "rotated-hidden": Base(
        tf.optim.Rotated, {"betas": (0.9, 0.98), "hidden": True}, 0.006, 0.01, teleports=False, wants_symmetries=True
    ),
}
TELEPORTED = tuple(name for name, base in BASES.items() if base.teleports)


@dataclass(frozen=True)
class Arm:
    """What one curve of the comparison runs: an optimizer and, unless `objective` is None, a teleport.

    Every `every` steps there is a teleport. `beta2` replaces the second moment's decay of an Adam base: in a turning
    basis a longer memory is the better one (0.98 against 0.95, each arm at its own best). `momentum` replaces the first
    moment's decay, Adam's beta1 or the momentum of SGD and Muon.
    """

    name: str
    base: str
    objective: str | None = None
    every: int = 0
    beta2: float | None = None
    radius: float | None = None
    direction: str | None = None
    momentum: float | None = None

    @property
    def label(self) -> str:
        """How tables, pictures and recorded sweeps call this arm."""
        name = self.base if self.objective is None else f"{self.base} + {self.name}"
        return name if self.momentum is None else f"{name}, momentum {self.momentum:g}"


_TELEPORTS = {
    "rotations": Arm("rotations", "adamw", "eigenbasis", every=3, beta2=0.98),
    "random": Arm("random", "adamw", "random", every=10),
    "grad_norm": Arm("grad_norm", "adamw", "grad_norm", every=50),
    "grad_l1": Arm("grad_l1", "adamw", "grad_l1", every=50),
    "balance": Arm("balance", "adamw", "balance", every=50),
}
OBJECTIVES = (*_TELEPORTS,)
ARMS = (*BASES, *OBJECTIVES)


def arm_named(name: str, base: str = "adamw", **changes: Any) -> Arm:
    """The arm called `name`: an optimizer's name runs it alone, any other of `ARMS` attaches a teleport to `base`.

    `changes` replace fields (`every`, `radius`, `direction`, `momentum`); None leaves a field as it is. "eigenbasis" is
    another name for "rotations". Raises ValueError for an unknown name or base, and for a field that is out of range.

    >>> arm_named("rotations").every, arm_named("sgd").label, arm_named("random", base="sgd").label
    (3, 'sgd', 'sgd + random')
    """
    name = {"eigenbasis": "rotations"}.get(name, name)
    if base not in TELEPORTED:
        raise ValueError(f"base must be one of {', '.join(TELEPORTED)}, got {base!r}; pass one of these names")
    given = {field: value for field, value in changes.items() if value is not None}
    momentum = given.get("momentum")
    if momentum is not None and not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}; pass a decay such as 0.9")
    if name in BASES:
        return Arm(name, name, momentum=momentum)
    if name not in _TELEPORTS:
        raise ValueError(f"arm must be one of {', '.join(ARMS)}, got {name!r}; pass one of these names")
    every, radius = given.get("every", 1), given.get("radius", 1.0)
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}; pass the number of steps between teleports")
    if radius <= 0:
        raise ValueError(f"radius must be positive, got {radius}; pass the largest distance of one move, such as 0.5")
    return replace(_TELEPORTS[name], base=base, **given)


def make_optimizer(arm: Arm, model: nn.Module, rate: float, table_rate: float | None = None) -> Optimizer:
    """The arm's optimizer over the blocks at `rate`, and over embeddings and head at `table_rate`.

    Frozen parameters are left out. Raises ValueError for a rate that is not positive.

    >>> from teleport_fast.experiments.gpt import GPT, GPTConfig
    >>> model = GPT(GPTConfig(d_model=32, layers=1))
    >>> [group["lr"] for group in make_optimizer(arm_named("adamw"), model, rate=0.002).param_groups]
    [0.002, 0.01]
    """
    base = BASES[arm.base]
    table_rate = table_rate or base.table_rate or rate
    if rate <= 0 or table_rate <= 0:
        raise ValueError(
            f"rate must be positive, got {min(rate, table_rate)}; pass a learning rate such as {base.rate}"
        )
    options = dict(base.options)
    if base.wants_symmetries:
        options["symmetries"] = tf.find_symmetries(model)
    if "betas" in options:
        own = options["betas"]
        options["betas"] = (
            own[0] if arm.momentum is None else arm.momentum,
            own[1] if arm.beta2 is None else arm.beta2,
        )
    elif arm.momentum is not None:
        if "momentum" not in options:
            raise ValueError(f"momentum means nothing to {arm.base}, got {arm.momentum}; leave it out")
        options["momentum"] = arm.momentum
    tables = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or (name == "head" and isinstance(module, nn.Linear))
    ]
    held = {id(weight) for weight in tables}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    blocks = [(name, p) for name, p in trained if id(p) not in held]
    unique = [(name, p) for name, p in trained if id(p) in held]
    return base.make([{"params": blocks, "lr": rate}, {"params": unique, "lr": table_rate}], lr=rate, **options)


def attach(arm: Arm, optimizer: Optimizer, model: nn.Module, example: torch.Tensor, seed: int) -> Any:
    """Attaches the arm's teleport to `optimizer`; the Teleporter, or None where the arm has no teleport."""
    if arm.objective is None:
        return None
    symmetries = tf.find_symmetries(model, (example,))
    options: dict[str, Any] = {"radius": arm.radius, "direction": arm.direction, "seed": seed}
    given = {name: value for name, value in options.items() if value is not None}
    return tf.attach(optimizer, symmetries, objective=arm.objective, schedule=tf.Every(arm.every), **given)
