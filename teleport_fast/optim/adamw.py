"""AdamW that teleports, with diagonal moves fused into its step: one pass over parameters, gradients and moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from teleport_fast.distributed.layout import as_dtensor
from teleport_fast.objectives import Objective
from teleport_fast.ops.diagonal_action import diagonal_action_
from teleport_fast.ops.teleport_adamw import teleport_adamw_
from teleport_fast.optim.plain_adamw import begin, plain_adamw_
from teleport_fast.optim.refresh import count_up_
from teleport_fast.optimizer import attach_as
from teleport_fast.record import TeleportRecord
from teleport_fast.schedule import Schedule
from teleport_fast.symmetry.bucket import Bucket, Element, Split
from teleport_fast.symmetry.symmetries import Symmetries
from teleport_fast.symmetry.view import View
from teleport_fast.teleporter import Teleporter
from teleport_fast.writes import Write, Writes

Numbers = tuple[int, float, tuple[float, float], float, float]


class DeferringTeleporter(Teleporter):
    """A teleporter that leaves diagonal moves of whole parameters to the optimizer's step, in `deferred`.

    All of a bucket or nothing of it: were the step never taken, no joint would have moved on one side only.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.deferred: list[tuple[Bucket, Element, set[str]]] = []
        self._everything: dict[str, Tensor] = {}
        self._later: dict[int, set[str]] = {}

    def _undo_interrupted_step(self, optimizer: Optimizer) -> None:
        super()._undo_interrupted_step(optimizer)
        self.deferred = []

    def _teleport(
        self,
        parameters: dict[str, Tensor],
        gradients: dict[str, Tensor],
        everything: dict[str, Tensor],
        serving: list[tuple[int, Bucket]],
        void: Tensor | None,
    ) -> None:
        self._everything, names = everything, set[str]()
        for index, bucket in reversed(serving):
            self._later[index] = set(names)
            names.update(bucket.parameters())
        super()._teleport(parameters, gradients, everything, serving, void)
        self._everything = {}

    def _writes(
        self,
        parameters: dict[str, Tensor],
        gradients: dict[str, Tensor],
        moves: Sequence[tuple[int, Bucket, Element | Split]],
        second_moments: str,
    ) -> list[Write]:
        left, deferred = dict(parameters), list[tuple[Bucket, Element, set[str]]]()
        for index, bucket, element in moves:
            names = set(bucket.parameters())
            if not isinstance(element, Element) or element.form != "diagonal" or bucket.buffers() or self._tracked:
                continue
            if names == self._whole(bucket, parameters) - self._later[index]:
                deferred.append((bucket, element, names))
                self._measure(bucket, element, names, parameters)
                left = {name: tensor for name, tensor in left.items() if name not in names}
        gradients = {name: gradient for name, gradient in gradients.items() if name in left}
        return [*super()._writes(left, gradients, moves, second_moments), partial(self.deferred.extend, deferred)]

    @staticmethod
    def _whole(bucket: Bucket, parameters: dict[str, Tensor]) -> set[str]:
        """Parameters of which the bucket has one view that holds every entry once; what is sharded moves before the step."""
        found: set[str] = set()
        for joint in bucket.joints:
            views = [*joint.views()]
            named = [view.parameter for view in views]
            for view in views:
                tensor = parameters[view.parameter]
                if as_dtensor(tensor) is not None:
                    continue
                covers = view.of(tensor).numel() == tensor.numel() and tensor.is_contiguous()
                if named.count(view.parameter) == 1 and covers:
                    found.add(view.parameter)
        return found

    def _measure(self, bucket: Bucket, element: Element, names: set[str], parameters: dict[str, Tensor]) -> None:
        """Moved copies of what the record's second value and `max_norm` read, since the tensors themselves move later."""
        on_parameters = self.objective.measures == "parameters"
        if on_parameters:
            self._move_copies(bucket, element, names, parameters, 1.0)
        if not on_parameters or self.max_norm is not None:
            self._move_copies(bucket, element, names, self._everything, -1.0)

    @staticmethod
    def _move_copies(bucket: Bucket, element: Element, names: set[str], tensors: dict[str, Tensor], sign: float) -> None:
        for name in names:
            tensors[name] = tensors[name].clone()
        for rows, side, view in _views(bucket, names):
            shift = view.shift if sign > 0 else 0.0
            diagonal_action_([view.of(tensors[view.parameter])], element.g[rows], [sign * side * view.power], [shift])

    def _clipping(self, everything: dict[str, Tensor]) -> list[Write]:
        """By the norm of the moved copies, since the step moves what is left to it by the same factors."""
        return self.plan.place.clipping(self.plan.gradients(self.optimizer).values(), everything, self.max_norm)


class AdamW(torch.optim.AdamW):
    """torch's AdamW, teleported as by `attach`, with diagonal moves and the step in one pass by `teleport_adamw_`.

    params, lr, betas, eps, weight_decay: torch's. symmetries: `find_symmetries(model)`, or None for plain AdamW;
    objective, schedule, radius, direction, second_moments, on_teleport, seed, max_norm, max_condition: those of `attach`, in the frame "stay".
    Fused are diagonal moves of parameters that a joint holds whole and that no other joint moves after; gradients of
    these stay as backward left them. `.teleporter` is the engine. state_dict is torch.optim.AdamW's, both ways. Copies
    would teleport no more and are refused. Errors: those of torch.optim.AdamW and `attach`. Source: docs/mathematics.md;
    checked against `attach` by tests/optim/test_adamw.py.

    >>> from teleport_fast.experiments.gpt import GPT, GPTConfig
    >>> import teleport_fast as tf
    >>> model = GPT(GPTConfig(d_model=16, layers=1, heads=2))
    >>> optimizer = AdamW(model.named_parameters(), lr=1e-3, symmetries=tf.find_symmetries(model), schedule=tf.Every(10))
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        symmetries: Symmetries | None = None,
        objective: str | Objective = "grad_norm",
        schedule: Schedule | None = None,
        radius: float | None = None,
        direction: str | None = None,
        second_moments: str = "keep",
        on_teleport: Callable[[TeleportRecord], object] | None = None,
        seed: int = 0,
        max_norm: float | None = None,
        max_condition: float | None = None,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)
        self.teleporter: DeferringTeleporter | None = None
        if symmetries is not None:
            self.teleporter = attach_as(
                DeferringTeleporter,
                self,
                symmetries,
                objective,
                schedule,
                radius,
                "stay",
                direction,
                second_moments,
                on_teleport,
                seed,
                max_norm,
                None,
                max_condition,
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; where a teleport is due its diagonal moves are taken in the same pass."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stepped = self._step_deferred()
        for group in self.param_groups:
            plain_adamw_([p for p in group["params"] if p.grad is not None and p not in stepped], self.state, group)
        return loss

    def _step_deferred(self) -> set[Tensor]:
        if self.teleporter is None or not self.teleporter.deferred:
            return set()
        parameters = self.teleporter.plan.parameters(self)
        of_group = {p: group for group in self.param_groups for p in group["params"]}
        deferred, self.teleporter.deferred = self.teleporter.deferred, []
        numbers: dict[str, Numbers] = {}
        for name in (name for _, _, names in deferred for name in names):
            parameter, group = parameters[name], of_group[parameters[name]]
            state = self.state[parameter]
            begin(parameter, state)
            step = int(state["step"]) + 1
            numbers[name] = step, float(group["lr"]), tuple(group["betas"]), group["eps"], group["weight_decay"]
        writes: list[Write] = [partial(count_up_, [self.state[parameters[name]]["step"] for name in numbers])]
        for bucket, element, names in deferred:
            for key in {numbers[name]: None for name in sorted(names)}:
                chosen = {name for name in names if numbers[name] == key}
                writes += self._steps(_views(bucket, chosen), len(bucket.joints), element.g, parameters, key)
        self.teleporter._phase.commit(Writes(writes))
        return {parameters[name] for name in numbers}

    def _steps(
        self,
        views: list[tuple[slice, float, View]],
        joints: int,
        s: Tensor,
        parameters: dict[str, Tensor],
        numbers: Numbers,
    ) -> list[Write]:
        """One call for all joints where each has as many views here, else one per joint."""
        calls: list[Write] = []
        owners: dict[int, list[tuple[slice, float, View]]] = {}
        for rows, side, view in views:
            owners.setdefault(rows.start, []).append((rows, side, view))
        together = len(owners) == joints and len({len(run) for run in owners.values()}) == 1
        runs = [(slice(None), joints, views)] if together else [(run[0][0], 1, run) for run in owners.values()]
        step, lr, betas, eps, weight_decay = numbers
        for rows, count, run in runs:
            tensors = [parameters[view.parameter] for _, _, view in run]
            states = [self.state[tensor] for tensor in tensors]
            gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]

            def aliases(source: list[Tensor], named: list[tuple[slice, float, View]] = run) -> list[Tensor]:
                return [view.of(tensor) for (_, _, view), tensor in zip(named, source, strict=True)]

            calls.append(
                partial(
                    teleport_adamw_,
                    aliases(tensors),
                    aliases(gradients),
                    aliases([state["exp_avg"] for state in states]),
                    aliases([state["exp_avg_sq"] for state in states]),
                    s[rows],
                    [side * view.power for _, side, view in run],
                    [view.shift for _, _, view in run],
                    step=step,
                    lr=lr,
                    betas=betas,
                    eps=eps,
                    weight_decay=weight_decay,
                    joints=count,
                )
            )
        return calls

    def __getstate__(self) -> dict[str, Any]:
        if self.teleporter is not None:
            raise TypeError(
                "an AdamW that teleports cannot be copied or pickled: the copy would teleport no more; make a new one "
                "and load state_dict()"
            )
        return {**super().__getstate__(), "teleporter": None}


def _views(bucket: Bucket, names: set[str]) -> list[tuple[slice, float, View]]:
    """(rows of g, +1 for plus and −1 for minus, view) of the named parameters, joint after joint."""
    return [
        (slice(index * bucket.heads, (index + 1) * bucket.heads), side, view)
        for index, joint in enumerate(bucket.joints)
        for side, views in ((1.0, joint.plus), (-1.0, joint.minus))
        for view in views
        if view.parameter in names
    ]
