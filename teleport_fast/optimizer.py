"""The two front doors: attach() puts teleportation around an optimizer you have, Teleport wraps one as an Optimizer."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.optim import Optimizer

from teleport_fast.bases import check_base
from teleport_fast.distributed.layout import as_dtensor
from teleport_fast.objectives import Objective, make_objective
from teleport_fast.record import TeleportRecord
from teleport_fast.schedule import Schedule
from teleport_fast.search import check_radius
from teleport_fast.soundness import check_bound
from teleport_fast.state import SECOND_MOMENTS
from teleport_fast.symmetry.symmetries import Symmetries
from teleport_fast.teleporter import Teleporter

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Engine = TypeVar("Engine", bound=Teleporter)
FRAMES = ("stay", "return")
_attached: weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[Teleporter]] = weakref.WeakKeyDictionary()


def attach(
    optimizer: Optimizer,
    symmetries: Symmetries,
    objective: str | Objective = "grad_norm",
    schedule: Schedule | None = None,
    radius: float | None = None,
    frame: str = "stay",
    direction: str | None = None,
    second_moments: str = "keep",
    on_teleport: Callable[[TeleportRecord], object] | None = None,
    seed: int = 0,
    max_norm: float | None = None,
    group: ProcessGroup | None = None,
    max_condition: float | None = None,
) -> Teleporter:
    """Teleport the optimizer's parameters before the steps at which `schedule` fires; returns the Teleporter.

    optimizer: torch's SGD, Adam, AdamW, Adagrad, RMSprop or Muon, schedulefree's (any whose state has their names), called with
    gradients.
    objective: "eigenbasis" (rotations), "random" (rotations, the control), "grad_norm", "grad_l1", "balance", "ratio" (one
    scale per joint), "scaled" (P from the weights, frame "return"), or an Objective. schedule: when; Every(100) by
    default, once for "ratio", at every step for "scaled". radius: how far each factor of the group may go, 0.5 where the
    objective has no optimum, infinite for balance downwards. direction: "ascend" or "descend", the objective's own by
    default. frame: "stay" keeps g·w, "return" comes back with g⁻¹ after the step. second_moments: what happens to them
    under a dense g, "keep", "reset" (the whole state of the moved parameters starts anew) or "project" (v → (g∘g) v);
    diagonals and permutations carry them exactly. on_teleport: called with each TeleportRecord. seed: for random moves.
    max_norm: after a teleport, which may raise it, the norm of all gradients is clipped to this; clip what comes from backward
    before the step, as ever. group: the process group whose ranks hold the same plain weights (DistributedDataParallel): its first
    rank's elements, and decisions of schedules that may differ, hold for all. DTensors (fully_shard, tensor parallelism) need
    none: see docs/distributed.md.
    max_condition: a dense g whose condition number is above this is not used, with a warning that names the joint, and descents
    stop there. 1/√eps by default, 2896 in float32 and 6.7e7 in float64 (docs/training.md); rotations have 1, ascents by a radius
    r at most exp(√2 r), frames of "scaled" the bound of its `ridge`.
    A move is whole or was not begun, whatever raises in it; a signal's handler runs after it (docs/adr/0005).
    A step that would teleport on a non-finite gradient is skipped whole, with a warning that names the parameter.
    Errors: ValueError for an unknown objective, direction, frame or policy, a radius that is not positive, a joint
    whose parameter is not in the optimizer or does not fit; TypeError for what is no Optimizer, has no step hooks, evaluates its
    closure again (LBFGS), keeps weights of its own, or turns its own bases.
    Source: [NeurIPS22] algorithm 1, [ICLR24] section 3, docs/mathematics.md; tests/test_optimizer.py.

    >>> from teleport_fast.experiments.gpt import GPT, GPTConfig
    >>> import teleport_fast as tf
    >>> model = GPT(GPTConfig(d_model=16, layers=1, heads=2))
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    >>> teleporter = tf.attach(optimizer, tf.find_symmetries(model), objective="eigenbasis", schedule=tf.Every(3))
    """
    return attach_as(
        Teleporter,
        optimizer,
        symmetries,
        objective,
        schedule,
        radius,
        frame,
        direction,
        second_moments,
        on_teleport,
        seed,
        max_norm,
        group,
        max_condition,
    )


def attach_as(
    engine: type[Engine],
    optimizer: Optimizer,
    symmetries: Symmetries,
    objective: str | Objective = "grad_norm",
    schedule: Schedule | None = None,
    radius: float | None = None,
    frame: str = "stay",
    direction: str | None = None,
    second_moments: str = "keep",
    on_teleport: Callable[[TeleportRecord], object] | None = None,
    seed: int = 0,
    max_norm: float | None = None,
    group: ProcessGroup | None = None,
    max_condition: float | None = None,
) -> Engine:
    """`attach` with an engine of another class than Teleporter."""
    check_base(optimizer)
    if not isinstance(symmetries, Symmetries):
        raise TypeError(
            f"symmetries must be a Symmetries, got {type(symmetries).__name__}; "
            f"pass tf.find_symmetries(model), or tf.Symmetries(joints, model=model) for joints made by hand"
        )
    if isinstance(optimizer, Teleport):
        optimizer = optimizer.base
    chosen = make_objective(objective)
    direction = chosen.directions[0] if direction is None else direction
    if direction not in chosen.directions:
        names = ", ".join(chosen.directions)
        raise ValueError(f"direction must be one of {names} for objective {chosen.name!r}, got {direction!r}")
    if frame not in FRAMES:
        raise ValueError(f"frame must be one of {', '.join(FRAMES)}, got {frame!r}")
    if frame not in chosen.frames:
        raise ValueError(
            f"frame must be {' or '.join(map(repr, chosen.frames))} for objective {chosen.name!r}, got {frame!r}: the point "
            f"that it steps at is not on the network's orbit; pass frame={chosen.frames[0]!r}"
        )
    if second_moments not in SECOND_MOMENTS:
        raise ValueError(f"second_moments must be one of {', '.join(SECOND_MOMENTS)}, got {second_moments!r}")
    if frame == "return" and second_moments == "project":
        raise ValueError("second_moments='project' cannot be undone on the way back; use 'keep' with frame='return'")
    radius = chosen.default_radius(direction) if radius is None else radius
    if isinstance(radius, bool) or not isinstance(radius, (int, float)):
        raise TypeError(f"radius must be a number or None, got {radius!r}; 0.5 is the usual choice")
    check_radius(radius, finite=direction not in chosen.closed_form)
    schedule = chosen.default_schedule() if schedule is None else schedule
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"schedule must be a Schedule, got {type(schedule).__name__}; pass tf.Every(100), or tf.When(a_function)"
        )
    if on_teleport is not None and not callable(on_teleport):
        raise TypeError(f"on_teleport must be callable or None, got {on_teleport!r}; pass a function of the record")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {seed!r}; 0 is the default")
    if max_norm is not None and (isinstance(max_norm, bool) or not isinstance(max_norm, (int, float)) or not max_norm > 0):
        raise ValueError(f"max_norm must be a positive number or None, got {max_norm!r}; 1.0 is usual")
    if group is not None and not hasattr(group, "size"):
        raise TypeError(f"group must be a ProcessGroup or None, got {group!r}; torch.distributed.group.WORLD has all ranks")
    if group is None and not schedule.agrees and _lies_on_replicas(optimizer):
        warnings.warn(
            f"teleport_fast: {schedule!r} may say another thing on every rank; where ranks hold the same weights (DDP) pass "
            f"group=torch.distributed.group.WORLD, so that the first one's word holds (sharded weights need no group)",
            RuntimeWarning,
            stacklevel=3,
        )
    check_bound(max_condition)
    live = _attached.setdefault(optimizer, weakref.WeakSet())
    taken = {teleporter._counter for teleporter in live if teleporter._handles}
    counter = next(key for i in range(len(taken) + 1) if (key := f"teleport_step{i or ''}") not in taken)
    teleporter = engine(
        optimizer,
        symmetries,
        chosen,
        schedule,
        radius,
        frame,
        direction == "descend",
        second_moments,
        counter,
        seed,
        max_norm,
        group,
        max_condition,
    )
    if on_teleport is not None:
        teleporter.after_move.append(on_teleport)
    live.add(teleporter)
    return teleporter


def _lies_on_replicas(optimizer: Optimizer) -> bool:
    """Whether other ranks run, and every parameter is plain: they may hold the same ones."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return False
    return all(as_dtensor(parameter) is None for group in optimizer.param_groups for parameter in group["params"])


def attached_to(optimizer: Optimizer) -> list[Teleporter]:
    """The teleporters that are attached to this very optimizer and not detached, first to last."""
    live = [teleporter for teleporter in _attached.get(optimizer, ()) if teleporter._handles]
    return sorted(live, key=lambda teleporter: int(teleporter._counter.removeprefix("teleport_step") or 0))


class Teleport(Optimizer):
    """An optimizer that teleports: `Teleport(torch.optim.AdamW(model.parameters()), symmetries, ...)`.

    Takes the arguments of `attach` after the base optimizer. State, parameter groups, defaults, hooks and state_dict
    are the base's own, so schedulers and checkpoints see what they would see without it; `.teleporter` is the engine.
    """

    def __init__(self, base: Optimizer, symmetries: Symmetries, *args: Any, **kwargs: Any) -> None:
        # Optimizer.__init__ would build groups and state of its own next to the base's: it is left out on purpose
        self.base = base
        self.teleporter = attach(base, symmetries, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ("base", "teleporter"):
            raise AttributeError(name)
        return getattr(self.base, name)

    @property
    def state(self) -> Any:
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base.state = value

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base.param_groups = value

    @property
    def defaults(self) -> dict[str, Any]:
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base.defaults = value

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One teleported step of the base optimizer; the closure, if any, runs once, before the move."""
        return self.base.step() if closure is None else self.base.step(closure)

    # a scaler must unscale by itself: it would leave the scale on this object, where the base cannot see it
    _step_supports_amp_scaling = False

    step.hooked = True  # type: ignore[attr-defined]  # hooks belong to the base: they must not run twice

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.base.add_param_group(param_group)

    def register_step_pre_hook(self, hook: Any) -> Any:
        return self.base.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        return self.base.register_step_post_hook(hook)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a Teleport cannot be copied or pickled; copy its base and attach again, or save state_dict()")

    def __repr__(self) -> str:
        return f"Teleport({self.base!r}, objective={self.teleporter.objective.name!r})"
