"""The engine: gradients in, group elements out, parameters, gradients and optimizer state moved together."""

from __future__ import annotations

import math
import sys
import time
import warnings
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from teleport_fast.objectives import Move, Objective
from teleport_fast.plan import Plan
from teleport_fast.record import Pending, TeleportRecord
from teleport_fast.schedule import Schedule, StepInfo
from teleport_fast.state import NORMALISED, forget_, state_sources
from teleport_fast.symmetry.bucket import COVECTOR, PARAMETER, SQUARE, Bucket, Element
from teleport_fast.symmetry.symmetries import Symmetries

# optimizers whose present step a teleporter skips: another one on the same optimizer finds no gradient and stays quiet
_skipping: weakref.WeakSet[Optimizer] = weakref.WeakSet()


class Teleporter:
    """Teleports an optimizer's parameters around its steps; made by `attach`, which documents the arguments."""

    def __init__(
        self,
        optimizer: Optimizer,
        symmetries: Symmetries,
        objective: Objective,
        schedule: Schedule,
        radius: float,
        frame: str,
        descend: bool,
        second_moments: str,
        counter: str,
        seed: int,
    ) -> None:
        # the optimizer's hooks hold the teleporter: a strong reference back would keep the model until the next gc
        self._optimizer = weakref.ref(optimizer)
        self.symmetries, self.objective, self.schedule = symmetries, objective, schedule
        self.radius, self.frame, self.descend, self.second_moments = radius, frame, descend, second_moments
        self.plan = Plan(symmetries, optimizer, objective)
        self.before_move: list[Callable[[Teleporter], object]] = []
        self.after_move: list[Callable[[TeleportRecord], object]] = []
        self._counter, self._seed = counter, seed
        self._history: list[Pending] = []
        self._held: dict[int, Element] = {}
        self._away: list[tuple[int, Bucket, Element]] = []
        self._put_aside: list[tuple[Tensor, Tensor]] = []
        self._counts_this_step = False
        self._depth = 0
        self._warned: set[str] = set()
        self.step_count = int(optimizer.param_groups[0].get(counter, 0))
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        # last in, first out: of two teleporters the inner comes back first, and other hooks see weights that are back
        optimizer._optimizer_step_post_hooks.move_to_end(self._handles[1].id, last=False)  # type: ignore[attr-defined]

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer; ReferenceError once nobody else holds it."""
        optimizer = self._optimizer()
        if optimizer is None:
            raise ReferenceError("the teleporter's optimizer is gone; keep a reference to it as long as you step it")
        return optimizer

    @property
    def step_count(self) -> int:
        """Optimizer steps taken so far; kept in `param_groups`, so that every checkpoint carries it."""
        return int(self.optimizer.param_groups[0].get(self._counter, 0))

    @step_count.setter
    def step_count(self, value: int) -> None:
        self.optimizer.param_groups[0][self._counter] = value

    @property
    def history(self) -> list[TeleportRecord]:
        """One record per teleport, oldest first."""
        return [pending.read() for pending in self._history]

    def _last_record(self) -> TeleportRecord | None:
        return self._history[-1].read() if self._history else None

    def detach(self) -> None:
        """Leave the optimizer as it was before `attach`; weights stay where they are. Calling it twice does nothing."""
        optimizer = self._optimizer()
        if optimizer is not None and self._handles:
            self._undo_interrupted_step(optimizer)
            optimizer.param_groups[0].pop(self._counter, None)
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """The objective's tensors, the basis that the return frame holds, and the schedule's memory where it has one.

        The step counter is in the optimizer's.
        """
        held = {str(i): (e.form, e.g.clone(), e.g_inverse_t) for i, e in self._held.items()}
        memory = self.schedule.state_dict()
        return {"objective": self.objective.state_dict(), "held": held, **({"schedule": memory} if memory else {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.objective.load_state_dict(state["objective"])
        if "schedule" in state:
            self.schedule.load_state_dict(state["schedule"])
        self._held = {int(i): Element(*parts) for i, parts in state["held"].items()}
        self._away = []

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._depth and _is_nested(optimizer):
            self._depth += 1
            return None
        self._depth = 1
        self._undo_interrupted_step(optimizer)
        changed = _run_closure_once(args, kwargs)
        self._counts_this_step = False
        parameters, everything = self.plan.parameters(optimizer), self.plan.gradients(optimizer)
        gradients = {name: everything[name] for name in parameters if name in everything}
        if not gradients:
            if optimizer not in _skipping:
                self._warn("no parameter of the joints has a gradient, nothing is teleported; call backward() first")
            return changed
        if all(float(group["lr"]) == 0 for group in optimizer.param_groups) and not any(
            bool(g.any()) for g in gradients.values()
        ):
            return changed  # a checkpoint that initialises the optimizer's state steps like this: leave no trace
        self._counts_this_step = True
        with torch.no_grad():
            self._prepare(parameters, gradients, everything)
        return changed

    def _prepare(
        self, parameters: dict[str, Tensor], gradients: dict[str, Tensor], everything: dict[str, Tensor]
    ) -> None:
        serving = self.plan.serving(set(gradients))
        if len(serving) < len(self.plan.buckets):
            missing = next(name for name in parameters if name not in gradients)
            self._warn(f"parameter {missing!r} has no gradient: joints that need it are not teleported")
        norm = cache(lambda: float(_total_norm(everything)))
        fires = self.schedule.fires(StepInfo(self.step_count, self.optimizer, norm, self._last_record))
        # before anything turns: a turn would spread a non-finite entry over its column
        if fires and not math.isfinite(norm()) and self._skip_step(everything):
            return
        if self.frame == "return" and self.objective.holds:
            self._go(parameters, gradients, [(i, b, self._held[i]) for i, b in serving if i in self._held], "keep")
        for index, bucket in serving:
            self.objective.observe(index, bucket, gradients)
        if fires and norm() > 0:
            self._teleport(parameters, gradients, everything, serving)

    def _teleport(
        self,
        parameters: dict[str, Tensor],
        gradients: dict[str, Tensor],
        everything: dict[str, Tensor],
        serving: list[tuple[int, Bucket]],
    ) -> None:
        start = time.perf_counter()
        state_sources(self.optimizer, parameters)
        for hook in self.before_move:
            hook(self)
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + self.step_count) % 2**63)
        move = Move(parameters, gradients, self.radius, self.descend, generator)
        measured = Move(parameters, everything, self.radius, self.descend, generator)
        before, radius, moved = self.objective.value(measured), torch.zeros(()), 0
        for index, bucket in serving:
            found = self.objective.element(index, bucket, move)
            if found is None:
                continue
            element, used = found
            if element.g.is_floating_point() and not bool(torch.isfinite(element.g.sum())):
                self._warn(f"joint {bucket.joints[0].name!r}: the search gave a non-finite element, the joint stays")
                continue
            self._go(parameters, gradients, [(index, bucket, element)], self.second_moments)
            self._hold(index, element)
            radius, moved = torch.maximum(radius, used.detach().float().cpu()), moved + len(bucket.joints)
        after = self.objective.value(measured)
        self._history.append(Pending(self.step_count, before, after, radius, time.perf_counter() - start, moved))
        if self.after_move:
            record = self._history[-1].read()
            for report in self.after_move:
                report(record)

    def _hold(self, index: int, element: Element) -> None:
        if self.frame != "return" or not self.objective.holds:
            return
        held = self._held.get(index)
        if held is not None:
            assert held.g_inverse_t is not None and element.g_inverse_t is not None
            element = Element("dense", element.g @ held.g, element.g_inverse_t @ held.g_inverse_t)
        self._held[index] = element

    def _go(
        self,
        parameters: dict[str, Tensor],
        gradients: dict[str, Tensor],
        moves: list[tuple[int, Bucket, Element]],
        second_moments: str,
    ) -> None:
        self._move_all(parameters, gradients, moves, second_moments)
        if self.frame == "return":
            self._away += moves

    def _move_all(
        self,
        parameters: dict[str, Tensor],
        gradients: dict[str, Tensor],
        moves: list[tuple[int, Bucket, Element]],
        second_moments: str,
    ) -> None:
        """Parameters, gradients, first moments in one pass per bucket; second moments as `second_moments` says."""
        if not moves:
            return
        states = state_sources(self.optimizer, parameters)
        for _, bucket, element in moves:
            moving = [source for source in states if source[0] != NORMALISED]
            carried = [(PARAMETER, buffers)] if (buffers := self.plan.buffers(bucket)) else []
            bucket.move_(element, [(PARAMETER, parameters), (COVECTOR, gradients), *moving, *carried])
            normalised = [(COVECTOR, tensors) for kind, tensors in states if kind == NORMALISED]
            if normalised:
                signs = Element("diagonal", element.g.sign())
                bucket.move_(signs if element.form == "diagonal" else element, normalised)
            if element.form != "dense" or second_moments == "keep":
                continue
            if second_moments == "project":
                bucket.move_(element.squared(), [(COVECTOR, tensors) for kind, tensors in states if kind == SQUARE])
            else:
                forget_(self.optimizer, [parameters[name] for name in bucket.parameters()])
                states = state_sources(self.optimizer, parameters)

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth -= 1
        if self._depth:
            return
        if self._put_aside:
            self._give_gradients_back(optimizer)
        elif self._counts_this_step:
            self.step_count += 1
            self._come_back(optimizer)

    @torch.no_grad()
    def _come_back(self, optimizer: Optimizer) -> None:
        """Undo the moves of this step, the last one first; a basis that is held keeps the second moments made in it."""
        if not self._away:
            return
        parameters = self.plan.parameters(optimizer)
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        back = [(i, bucket, element.inverse(bucket.group)) for i, bucket, element in reversed(self._away)]
        self._away = []
        self._move_all(parameters, gradients, back, "keep" if self.objective.holds else self.second_moments)

    def _skip_step(self, everything: dict[str, Tensor]) -> bool:
        """A step that would teleport on a non-finite gradient is skipped whole: the base optimizer sees no gradient."""
        bad = next((name for name, gradient in everything.items() if not bool(torch.isfinite(gradient).all())), None)
        if bad is None:
            return False  # finite entries whose norm overflows
        self._warn(f"gradient of {bad!r} is not finite: no teleport, and this optimizer step is skipped")
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._put_aside = [(p, p.grad) for p in parameters if p.grad is not None]
        for parameter, _ in self._put_aside:
            parameter.grad = None
        _skipping.add(self.optimizer)
        return True

    def _give_gradients_back(self, optimizer: Optimizer) -> None:
        for parameter, gradient in self._put_aside:
            parameter.grad = gradient
        self._put_aside = []
        _skipping.discard(optimizer)

    def _undo_interrupted_step(self, optimizer: Optimizer) -> None:
        """A step that raised never came to the hook after it: its moves are undone now, its gradients are void."""
        self._come_back(optimizer)
        if self._put_aside:
            self._put_aside = []
            _skipping.discard(optimizer)

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"teleport_fast: {message}", RuntimeWarning, stacklevel=4)


def _quick_norm(tensors: dict[str, Tensor]) -> Tensor | None:
    """In float32 on a CPU, in half the time; None elsewhere and where a square may have overflowed or vanished."""
    if any(tensor.dtype != torch.float32 or tensor.device.type != "cpu" for tensor in tensors.values()):
        return None
    norm = torch.stack(list(torch._foreach_norm(list(tensors.values())))).double().norm()
    return norm if 1e-10 < float(norm) < 1e10 else None


def _total_norm(tensors: dict[str, Tensor]) -> Tensor:
    """In float64, where finite float32 entries of 1e25 still have a finite norm."""
    quick = _quick_norm(tensors)
    if quick is not None:
        return quick
    return torch.stack(list(torch._foreach_norm(list(tensors.values()), 2, torch.float64))).norm()


def _is_nested(optimizer: Optimizer) -> bool:
    """Whether a step of this optimizer runs inside another: where an override calls super().step(), hooks run twice."""
    wrapper, frame, found = type(optimizer).step.__code__, sys._getframe(), 0
    while frame is not None and found < 2:
        found += frame.f_code is wrapper and frame.f_locals.get("self") is optimizer
        frame = frame.f_back  # type: ignore[assignment]
    return found == 2


def _run_closure_once(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pre-step hooks run before the closure: evaluate it here and hand its loss on, so that it runs once."""
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        return None
    with torch.enable_grad():
        loss = closure()
    if len(args) > 1:
        return (args[0], lambda: loss, *args[2:]), kwargs
    return args, {**kwargs, "closure": lambda: loss}
