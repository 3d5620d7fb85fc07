"""The engine: gradients in, group elements out, parameters, gradients and optimizer state moved together."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from teleport_fast.called import found_inf, full_precision, has_no_rate, is_nested, run_closure_once, unless
from teleport_fast.flag import Flag
from teleport_fast.gradients import Gradients
from teleport_fast.history import History
from teleport_fast.moving import writes_of
from teleport_fast.objectives import Move, Objective
from teleport_fast.plan import Plan
from teleport_fast.record import Pending, Records, TeleportRecord
from teleport_fast.schedule import Schedule, StepInfo
from teleport_fast.searching import Waves, search
from teleport_fast.skipped import PutAside, is_skipping
from teleport_fast.soundness import remembered, restore, usual_bound
from teleport_fast.state import state_sources
from teleport_fast.symmetry.bucket import Bucket, Element, Split
from teleport_fast.symmetry.symmetries import Symmetries
from teleport_fast.tracked import Tracked
from teleport_fast.warned import WarnOnce
from teleport_fast.write_phase import WritePhase
from teleport_fast.writes import Write, Writes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
        max_norm: float | None = None,
        group: ProcessGroup | None = None,
        max_condition: float | None = None,
    ) -> None:
        # the optimizer's hooks hold the teleporter: a strong reference back would keep the model until the next gc
        self._optimizer = weakref.ref(optimizer)
        self.symmetries, self.objective, self.schedule = symmetries, objective, schedule
        self.radius, self.frame, self.descend, self.second_moments = radius, frame, descend, second_moments
        self.max_norm, self.max_condition = max_norm, max_condition
        self.with_condition = False
        self.plan = Plan(symmetries, optimizer, objective, group)
        self.before_move: list[Callable[[Teleporter], object]] = []
        self.after_move: list[Callable[[TeleportRecord], object]] = []
        self._counter, self._seed = counter, seed
        self._history = Records()
        self._held: dict[int, Element] = {}
        self._away: list[tuple[int, Bucket, Element | Split]] = []
        self._put_aside = PutAside()
        self._waves, self._warn = Waves(), WarnOnce()
        self._phase = WritePhase(self.plan, frame == "return", self._warn)
        self._counts_this_step = False
        self._depth = 0
        self._watches = type(objective).observe is not Objective.observe
        self._looked = False
        self._tracked = Tracked(self.plan)
        self._verdict: Flag | None = None
        self.step_count = self.step_count
        # compiled steps call them as they are: traced, a schedule's decision and the counter would be guards
        self._handles = [
            optimizer.register_step_pre_hook(torch.compiler.disable(self._before_step)),
            optimizer.register_step_post_hook(torch.compiler.disable(self._after_step)),
            optimizer.register_state_dict_pre_hook(self._before_state_dict),
        ]
        # last in, first out: of two teleporters the inner comes back first, and other hooks see weights that are back
        optimizer._optimizer_step_post_hooks.move_to_end(self._handles[1].id, last=False)  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        optimizer = self._optimizer()
        around = f"around {type(optimizer).__name__}" if optimizer is not None and self._handles else "detached"
        joints = sum(len(bucket.joints) for bucket in self.plan.buckets)
        return (
            f"Teleporter({around}, objective={self.objective.name!r}, schedule={self.schedule!r}, frame={self.frame!r}, "
            f"{joints} of {len(self.symmetries)} joints)"
        )

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a Teleporter cannot be copied or pickled: it hangs on its optimizer's hooks; attach again, or save state_dict()")

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer; ReferenceError once nobody else holds it."""
        optimizer = self._optimizer()
        if optimizer is None:
            raise ReferenceError("the teleporter's optimizer is gone; keep a reference to it as long as you step it")
        return optimizer

    @property
    def step_count(self) -> int:
        """Optimizer steps taken so far; kept in every one of `param_groups`, so that every checkpoint carries it."""
        if self._verdict is not None:
            self._settle()
        counter, most = self._counter, 0
        for group in self.optimizer.param_groups:
            most = max(most, group.get(counter, 0))
        return most

    @step_count.setter
    def step_count(self, value: int) -> None:
        for group in self.optimizer.param_groups:
            group[self._counter] = value

    @property
    def history(self) -> History:
        """One record per teleport, oldest first; each is read off the device once, when somebody asks."""
        return History(self._history.read())

    def _last_record(self) -> TeleportRecord | None:
        return self._history.last()

    def track(self, copy: nn.Module | Mapping[str, Tensor]) -> RemovableHandle:
        """Move this copy of the weights (EMA, SWA, a reference model) too, whenever the weights move and stay.

        copy: a module with the model's parameter names, AveragedModel's "module." in front or not, held weakly; or
        {name: tensor}. Averages of points before and after a move mean nothing unless the average moves with them. In the
        return frame nothing stays moved, and nothing is done. `.remove()` of what is returned ends it; a checkpoint does
        not carry it. Errors: ValueError for a joint's tensor that the copy lacks or that has another shape.
        Source: own; tests/test_tracked.py.
        """
        return self._tracked.add(copy)

    def detach(self) -> None:
        """Leave the optimizer as it was before `attach`; weights stay where they are. Calling it twice does nothing."""
        optimizer = self._optimizer()
        if optimizer is not None and self._handles:
            self._undo_interrupted_step(optimizer)
            for group in optimizer.param_groups:
                group.pop(self._counter, None)
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def remembers(self) -> bool:
        """Whether a run that goes on without `state_dict()` is another one: a basis, its covariances, a schedule's memory."""
        return self._watches or self.objective.holds or bool(self.schedule.state_dict())

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
        self._held = {int(i): Element(*parts) for i, parts in state.get("held", {}).items()}
        self._away, self._verdict = [], None
        self._phase.forget()

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._depth and is_nested(optimizer):
            self._depth += 1
            return None
        self._depth = 1
        self._undo_interrupted_step(optimizer)
        changed = run_closure_once(args, kwargs)
        self._counts_this_step = False
        first = self.plan.first_gradient(optimizer)
        if first is None:
            if not is_skipping(optimizer):
                self._warn("no parameter of the joints has a gradient, nothing is teleported; call backward() first")
            return changed
        if first.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a captured step would replay without its schedule; capture forward and backward, and call "
                "optimizer.step() outside of the graph"
            )
        if has_no_rate(optimizer) and not self.plan.any_gradient(optimizer):
            return changed  # a checkpoint that initialises the optimizer's state steps like this: leave no trace
        self._counts_this_step = True
        if not self._looked:
            self._looked = bool(self.plan.gradients(optimizer))  # names a sparse one before the first teleport
        step = Gradients(self.plan, optimizer)
        with torch.no_grad():
            fires = self.plan.place.fires(self.schedule, StepInfo(self.step_count, optimizer, step.norm, self._last_record))
        holding = bool(self._held) and self.frame == "return" and self.objective.holds
        if fires or holding or self._watches:
            try:
                self._move(optimizer, step, fires, holding)
            except BaseException:
                # a basis that is held was already taken up
                if self._away and not self._phase.unfinished:
                    self._come_back(optimizer)
                raise
        return changed

    @torch.no_grad()
    def _move(self, optimizer: Optimizer, step: Gradients, fires: bool, holding: bool) -> None:
        everything, norm = step.everything, step.norm
        parameters = self.plan.parameters(optimizer)
        place = self.plan.place  # after the parameters: where they lie is looked up with them
        gradients = {name: everything()[name] for name in parameters if name in everything()}
        serving = self.plan.serving(set(gradients))
        if len(serving) < len(self.plan.buckets):
            self._warn(self.plan.missing(parameters, gradients))
        verdict = found_inf(optimizer)
        verdict = None if verdict is None else place.verdict(verdict)
        # before anything turns: a turn would spread a non-finite entry over its column
        if fires and verdict is None and not math.isfinite(norm()) and self._skip_step(everything()):
            return
        with full_precision({gradient.device.type for gradient in gradients.values()}):
            if holding:
                held = [(i, bucket, self._held[i]) for i, bucket in serving if i in self._held]
                if verdict is not None:
                    held = [(i, bucket, unless(verdict > 0, element)) for i, bucket, element in held]
                self._phase.commit(self._phase.listed(self._writes(parameters, gradients, held, "keep")))
            if verdict is None:
                place.observe(self.objective, serving, gradients)
                if fires and norm() > 0:
                    self._teleport(parameters, gradients, everything(), serving, None)
                return
            void = verdict > 0
            self.objective.unless(void, lambda: place.observe(self.objective, serving, gradients))
            if fires:
                void = void | (place.norm(everything()) == 0).to(void.device, non_blocking=True)
                self.objective.unless(void, lambda: self._teleport(parameters, gradients, everything(), serving, void))

    def _bound(self, parameters: dict[str, Tensor]) -> float:
        if self.max_condition is not None:
            return self.max_condition
        return min(usual_bound(parameter.dtype) for parameter in parameters.values())

    def _teleport(
        self,
        parameters: dict[str, Tensor],
        gradients: dict[str, Tensor],
        everything: dict[str, Tensor],
        serving: list[tuple[int, Bucket]],
        void: Tensor | None,
    ) -> None:
        """void: a 0-d bool on the device that makes every element the identity, or None where the host has looked."""
        start = time.perf_counter()
        if void is not None and self.second_moments == "reset" and bool(void):
            return  # what a reset forgets cannot be put back
        state_sources(self.optimizer, parameters)
        for hook in self.before_move:
            hook(self)
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + self.step_count) % 2**63)
        move = Move(parameters, gradients, self.radius, self.descend, generator, self._bound(parameters))
        measured = Move(parameters, everything, self.radius, self.descend, generator)
        place, moved, radii, noted = self.plan.place, 0, list[Tensor](), list[Pending]()
        before = place.value(self.objective, measured)
        asked = self.with_condition or bool(self.after_move)
        condition = torch.ones(()) if asked else None

        def note() -> None:
            radius: Tensor | None = None
            for used in radii:
                radius = _larger(radius, used)
            radius, after = torch.zeros(()) if radius is None else radius, place.value(self.objective, measured)
            noted.append(Pending(self.step_count, before, after, radius, time.perf_counter() - start, moved, void, condition))
            self._history.append(noted[-1])

        waves = self._waves.of(self.objective, serving)
        for number, wave in enumerate(waves):
            memory, writes = remembered(self.objective), Writes()
            try:
                found = search(place, self.objective, wave, move, void, self._warn)
                moves = [one[:3] for one in found]
                calls = self._writes(parameters, gradients, moves, self.second_moments)
                calls += [partial(self._hold, index, element) for index, _, element in moves]
                if number == len(waves) - 1:
                    calls += [note, lambda: self._clipping(everything)]
                moved += sum(len(bucket.joints) for _, bucket, _ in moves)
                radii += [used for *_, used in found]
                for _, bucket, element in moves:
                    if condition is not None and self.objective.stretches and bucket.group.holds_stretches:
                        condition = _larger(condition, element.condition())
                writes = self._phase.listed(calls)
                self._phase.commit(writes)
            except BaseException:
                if not writes.begun:
                    restore(self.objective, memory)
                raise
        if self.after_move and not noted[-1].void():
            record = noted[-1].read()
            for report in self.after_move:
                report(record)

    def _clipping(self, everything: dict[str, Tensor]) -> list[Write]:
        return self.plan.place.clipping(everything.values(), everything, self.max_norm)

    def _hold(self, index: int, element: Element | Split) -> None:
        if self.frame == "return" and self.objective.holds:
            assert isinstance(element, Element)
            held = self._held.get(index)
            self._held[index] = element if held is None else element.after(held)

    def _writes(
        self,
        parameters: dict[str, Tensor],
        gradients: dict[str, Tensor],
        moves: Sequence[tuple[int, Bucket, Element | Split]],
        second_moments: str,
    ) -> list[Write]:
        """What moves everything, the copies too, and notes that it is away; nothing is written yet."""
        writes = writes_of(self.optimizer, self.plan, parameters, gradients, moves, second_moments)
        if self.frame == "return":
            return [*writes, partial(self._away.extend, moves)]
        return [*writes, *(write for _, bucket, element in moves for write in self._tracked.writes(bucket, element))]

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth -= 1
        if self._depth:
            return
        if self._put_aside:
            self._put_aside.give_back(optimizer)
        elif self._counts_this_step:
            self.step_count += 1
            if self._away:
                self._come_back(optimizer)
            found = found_inf(optimizer)
            self._verdict = None if found is None else Flag(self.plan.place.verdict(found))
        self._phase.deliver()

    def _before_state_dict(self, _: Optimizer) -> None:
        self._phase.finish()
        self._settle()

    def _settle(self) -> None:
        """A fused step that found an inf did nothing: its count is taken back, once the verdict has come to the host."""
        verdict, self._verdict = self._verdict, None
        if verdict is not None and verdict.is_set():
            self.step_count -= 1

    @torch.no_grad()
    def _come_back(self, optimizer: Optimizer) -> None:
        """Undo the moves of this step, the last one first; a basis that is held keeps the second moments made in it."""
        parameters = self.plan.parameters(optimizer)
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        back = [(i, bucket, element.inverse(bucket.group)) for i, bucket, element in reversed(self._away)]
        with full_precision({parameter.device.type for parameter in parameters.values()}):
            policy = "keep" if self.objective.holds else self.second_moments
            writes = writes_of(optimizer, self.plan, parameters, gradients, back, policy)
            self._phase.commit(self._phase.listed([*writes, self._away.clear]))

    def _skip_step(self, everything: dict[str, Tensor]) -> bool:
        """A step that would teleport on a non-finite gradient is skipped whole: the base optimizer sees no gradient."""
        bad = self.plan.place.first_not_finite(everything)
        if bad is None:
            return False  # finite entries whose norm overflows
        self._warn(f"gradient of {bad!r} is not finite: no teleport, and this optimizer step is skipped")
        self._put_aside.take(self.optimizer)
        return True

    def _undo_interrupted_step(self, optimizer: Optimizer) -> None:
        """A step that raised never came to the hook after it: its moves are undone now, its gradients are void."""
        self._phase.finish()
        if self._away:
            self._come_back(optimizer)
        self._phase.deliver()
        if self._put_aside:
            self._put_aside.forget(optimizer)


def _larger(one: Tensor | None, other: Tensor) -> Tensor:
    """The larger of two 0-d tensors in float32, where the first one lies."""
    other = other.detach().float()
    return other if one is None else torch.maximum(one, other.to(one.device, non_blocking=True))
