"""The arms of a comparison: an optimizer alone, or a base optimizer with a teleport attached."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import teleport_fast as tf
from teleport_fast.experiments.joints import Watched
from teleport_fast.experiments.muon import muon
from teleport_fast.objectives import OBJECTIVES as MAKERS
from teleport_fast.optimizer import attach_as
from teleport_fast.state import SECOND_MOMENTS


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
    moment's decay, Adam's beta1 or the momentum of SGD and Muon. `settings` are arguments of the objective and the
    second-moment policy of the teleport, or arguments of an optimizer alone, in the order of their names.
    """

    name: str
    base: str
    objective: str | None = None
    every: int = 0
    beta2: float | None = None
    radius: float | None = None
    direction: str | None = None
    momentum: float | None = None
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """How tables, pictures and recorded sweeps call this arm: its name, and what is not as usual."""
        usual = self.usual
        own = [(key, getattr(self, key)) for key in FIELDS if getattr(self, key) != getattr(usual, key)]
        name = self.base if self.objective is None else f"{self.base} + {self.name}"
        return ", ".join([name, *(f"{key} {_shown(value)}" for key, value in (*own, *self.settings))])

    @property
    def usual(self) -> Arm:
        """The arm of this name and base with nothing changed."""
        return replace(_TELEPORTS[self.name], base=self.base) if self.name in _TELEPORTS else Arm(self.name, self.base)


_TELEPORTS = {
    "rotations": Arm("rotations", "adamw", "eigenbasis", every=3, beta2=0.98),
    "random": Arm("random", "adamw", "random", every=10),
    "grad_norm": Arm("grad_norm", "adamw", "grad_norm", every=50),
    "grad_l1": Arm("grad_l1", "adamw", "grad_l1", every=50),
    "balance": Arm("balance", "adamw", "balance", every=50),
}
OBJECTIVES = (*_TELEPORTS,)
ARMS = (*BASES, *OBJECTIVES)
FIELDS = ("every", "beta2", "radius", "direction", "momentum")
# Decided by the harness: rates by the sweep, the rest by fields of the arm.
RESERVED = ("params", "groups", "lr", "betas", "momentum", "symmetries", "table_lr", "sides", "basis_dtype")


def arm_named(name: str, base: str = "adamw", **changes: Any) -> Arm:
    """The arm called `name`: an optimizer's name runs it alone, any other of `ARMS` attaches a teleport to `base`.

    Settings follow the name after colons, "rotations:every=1:decay=0.8": the fields of an arm, arguments of its objective or
    its optimizer (`settable` lists them), and second_moments. `changes` replace fields (`every`, `radius`, `direction`,
    `momentum`) that the name leaves open; None leaves a field as it is. "eigenbasis" is another name for "rotations".
    Raises ValueError for an unknown name, base or setting, and for a value that is out of range.

    >>> arm_named("rotations").every, arm_named("sgd").label, arm_named("random", base="sgd").label
    (3, 'sgd', 'sgd + random')
    >>> arm_named("rotations:every=1:decay=0.8").label
    'adamw + rotations, every 1, decay 0.8'
    """
    name, *given = name.split(":")
    name = {"eigenbasis": "rotations"}.get(name, name)
    if base not in TELEPORTED:
        raise ValueError(f"base must be one of {', '.join(TELEPORTED)}, got {base!r}; pass one of these names")
    if name not in ARMS:
        raise ValueError(f"arm must be one of {', '.join(ARMS)}, got {name!r}; pass one of these names")
    arm = Arm(name, name) if name in BASES else replace(_TELEPORTS[name], base=base)
    own = dict(_setting(arm, pair) for pair in given)
    allowed = ("beta2", "momentum") if name in BASES else FIELDS
    open_ = {key: value for key, value in changes.items() if value is not None and key in allowed}
    fields = {**open_, **{key: value for key, value in own.items() if key in allowed}}
    _check(fields)
    settings = tuple(sorted((key, value) for key, value in own.items() if key not in allowed))
    arm = replace(arm, **fields, settings=settings)
    _try(arm)
    return arm


def settable(arm: Arm) -> list[str]:
    """The settings that may follow this arm's name.

    >>> settable(arm_named("rotations"))  # doctest: +NORMALIZE_WHITESPACE
    ['beta2', 'decay', 'direction', 'every', 'iterations', 'momentum', 'normalise', 'parts', 'radius',
     'second_moments', 'takes']
    """
    if arm.objective is not None:
        known = inspect.signature(MAKERS[arm.objective]).parameters
        return sorted({*known, *FIELDS, "second_moments"})
    known = inspect.signature(BASES[arm.base].make).parameters
    return sorted({*known, "beta2", "momentum"} - {*RESERVED} | {"beta2", "momentum"})


def _setting(arm: Arm, pair: str) -> tuple[str, Any]:
    """Key and value of "key=value": a number, true or false where it is one, else a word."""
    key, equals, text = pair.partition("=")
    if not equals or key not in settable(arm):
        raise ValueError(
            f"a setting of {arm.name} must be key=value with a key of {', '.join(settable(arm))}, got {pair!r}; "
            f"for example {arm.name}:momentum=0.8"
        )
    words = {"true": True, "false": False}
    for kind in (int, float):
        try:
            return key, kind(text)
        except ValueError:
            continue
    return key, words.get(text.lower(), text)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _check(fields: dict[str, Any]) -> None:
    momentum, beta2 = fields.get("momentum"), fields.get("beta2")
    every, radius = fields.get("every", 1), fields.get("radius", 1.0)
    for key, value, example in (("momentum", momentum, 0.9), ("beta2", beta2, 0.98)):
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"{key} must be in [0, 1), got {value}; pass a decay such as {example}")
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}; pass the number of steps between teleports")
    if not radius > 0:
        raise ValueError(f"radius must be positive, got {radius}; pass the largest distance of one move, such as 0.5")


def _try(arm: Arm) -> None:
    """Make once what the settings go to, so that a value out of range is named before anything is trained."""
    settings = dict(arm.settings)
    if arm.objective is not None:
        policy = settings.pop("second_moments", "keep")
        if policy not in SECOND_MOMENTS:
            raise ValueError(f"second_moments must be one of {', '.join(SECOND_MOMENTS)}, got {policy!r}; 'keep' is usual")
        directions = MAKERS[arm.objective](**settings).directions
        if arm.direction is not None and arm.direction not in directions:
            raise ValueError(f"direction must be one of {', '.join(directions)} for {arm.name}, got {arm.direction!r}; or leave it out")
    elif settings:
        base = BASES[arm.base]
        base.make([{"params": [("up.weight", nn.Parameter(torch.ones(2, 2)))]}], lr=base.rate, **{**base.options, **settings})


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
    if not (rate > 0 and table_rate > 0):
        raise ValueError(
            f"rate must be positive, got {min(rate, table_rate)}; pass a learning rate such as {base.rate}"
        )
    options = {**base.options, **(dict(arm.settings) if arm.objective is None else {})}
    if base.wants_symmetries:
        options["symmetries"] = tf.find_symmetries(model)
    if "betas" in options:
        own = options["betas"]
        options["betas"] = (
            own[0] if arm.momentum is None else arm.momentum,
            own[1] if arm.beta2 is None else arm.beta2,
        )
    else:
        for name, value in (("momentum", arm.momentum), ("beta2", arm.beta2)):
            if value is not None and name not in options and value != getattr(arm.usual, name):
                raise ValueError(f"{name} means nothing to {arm.base}, got {value}; leave it out")
        if arm.momentum is not None:
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
    settings = dict(arm.settings)
    policy = settings.pop("second_moments", None)
    options: dict[str, Any] = {"radius": arm.radius, "direction": arm.direction, "second_moments": policy, "seed": seed}
    given = {name: value for name, value in options.items() if value is not None}
    objective = MAKERS[arm.objective](**settings)
    return attach_as(Watched, optimizer, symmetries, objective=objective, schedule=tf.Every(arm.every), **given)
