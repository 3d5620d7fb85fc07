"""The plan of a teleporter: which joints serve, in which buckets, and where their parameters sit in the optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from teleport_fast.distributed.layout import as_dtensor, described, local_part
from teleport_fast.objectives import Objective
from teleport_fast.symmetry.bucket import Bucket, buckets
from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.symmetries import Symmetries
from teleport_fast.whole import WHOLE, Whole

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Plan:
    """Holds names and places, never tensors: parameters are looked up in `optimizer.param_groups`, buffers on the model.

    A place is good as long as the same parameter stands there. Where groups were removed or reordered, a parameter is found
    again by identity; where it was replaced (by a wrapper that shards), by its name, or at its place if it is new there and
    of the same shape. Joints of a parameter that left the optimizer wait until it is back. `place` says how what lies there is
    measured and moved: whole tensors by this process, parts by all ranks; it is looked up when the parameters are.
    Errors: ValueError if no joint serves the objective, a joint names a parameter that the optimizer does not have, or
    a joint's tensors do not fit their views.
    """

    def __init__(
        self, symmetries: Symmetries, optimizer: Optimizer, objective: Objective, group: ProcessGroup | None = None
    ) -> None:
        objective.check(symmetries)
        self._objective, self._group = objective, group
        positions = _positions(optimizer, symmetries)
        self.place = place_of(_all(optimizer), group)
        self.left_out = {
            joint.name: reason
            for joint in symmetries
            if (reason := objective.unusable(joint) or self._refusal(joint, optimizer, positions))
        }
        joints = [joint for joint in symmetries if joint.name not in self.left_out]
        if not joints:
            reasons = "; ".join(f"{name}: {why}" for name, why in self.left_out.items()) or "there are no joints"
            raise ValueError(
                f"no joint can serve objective {objective.name!r} ({reasons}); "
                f"pass another objective, or other symmetries: see symmetries.explain()"
            )
        self.slots: dict[str, tuple[int, int]] = {}
        for joint in joints:
            for name in joint.parameters():
                if name not in positions:
                    raise ValueError(
                        f"parameter {name!r} of joint {joint.name!r} is not in the optimizer; "
                        f"give it to the optimizer, or leave the joint out with symmetries.select(...)"
                        + ("; give model.named_parameters() where a wrapper replaced the model's" if self.place.sharded else "")
                    )
                self.slots[name] = positions[name]
        self._wanted = tuple(self.slots)
        self._names = {position: name for name, position in positions.items()}
        self._remember(optimizer)
        parameters = self.parameters(optimizer)
        shapes = described(parameters)
        for joint in joints:
            joint.check_shapes({**symmetries.buffers(joint.buffers()), **shapes})
        on_device: dict[torch.device, list[Joint]] = {}
        for joint in joints:
            on_device.setdefault(parameters[joint.parameters()[0]].device, []).append(joint)
        self.buckets: list[Bucket] = [bucket for alike in on_device.values() for bucket in buckets(alike)]
        self._buffers = symmetries.buffers
        self._refused: dict[int, str] = {}

    def _refusal(self, joint: Joint, optimizer: Optimizer, positions: Mapping[str, tuple[int, int]]) -> str | None:
        """Why this joint cannot serve where its parameters lie, or None."""
        if not self.place.sharded or not all(name in positions for name in joint.parameters()):
            return None
        places = {name: positions[name] for name in joint.parameters()}
        tensors = {name: optimizer.param_groups[g]["params"][i] for name, (g, i) in places.items()}
        return self.place.refuses(self._objective, joint, tensors)

    def _remember(self, optimizer: Optimizer) -> None:
        """Who stands where: the joints' parameters by name, and all of them by id."""
        groups = optimizer.param_groups
        self._live: dict[str, weakref.ref[Tensor]] = {
            name: weakref.ref(groups[g]["params"][i]) for name, (g, i) in self.slots.items()
        }
        self._seen: dict[int, weakref.ref[Tensor]] = {
            id(parameter): weakref.ref(parameter) for group in groups for parameter in group["params"]
        }

    def _stale(self, optimizer: Optimizer) -> bool:
        groups = optimizer.param_groups
        try:
            return len(self.slots) < len(self._wanted) or any(
                groups[g]["params"][i] is not self._live[name]() for name, (g, i) in self.slots.items()
            )
        except IndexError:
            return True

    def _locate(self, optimizer: Optimizer) -> None:
        by_id, by_name = _places(optimizer)
        found: dict[str, tuple[int, int]] = {}
        for name in self._wanted:
            before = self._live[name]() if name in self._live else None
            if before is not None and id(before) in by_id:
                found[name] = by_id[id(before)]
            elif name in by_name:
                found[name] = by_name[name]
            elif name in self.slots and self._is_replaced(optimizer, self.slots[name], before):
                found[name] = self.slots[name]
        gone = {name: reference for name, reference in self._live.items() if name not in found}
        self._names = {place: name for name, place in (*by_name.items(), *found.items())}
        self.slots = found
        self._remember(optimizer)
        self._live |= gone
        self.place = place_of(_all(optimizer), self._group)
        self._refused = {}
        for index, bucket in enumerate(self.buckets):
            for joint in bucket.joints:
                reason = self._refusal(joint, optimizer, found)
                if reason:
                    self._refused[index] = f"joint {joint.name!r}: {reason}"

    def _is_replaced(self, optimizer: Optimizer, place: tuple[int, int], before: Tensor | None) -> bool:
        """Whether a parameter that was in no group before stands where this one stood."""
        try:
            now = optimizer.param_groups[place[0]]["params"][place[1]]
        except IndexError:
            return False
        known = self._seen.get(id(now))
        return (known is None or known() is not now) and (before is None or before.shape == now.shape)

    def parameters(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """The joints' parameters that are in the optimizer now, by name."""
        if self._stale(optimizer):
            self._locate(optimizer)
        groups = optimizer.param_groups
        return {name: groups[group]["params"][index] for name, (group, index) in self.slots.items()}

    def first_gradient(self, optimizer: Optimizer) -> Tensor | None:
        """A gradient of one of the joints' parameters, or None where none has any."""
        for reference in self._live.values():
            parameter = reference()
            if parameter is not None and parameter.grad is not None:
                return parameter.grad
        return next((p.grad for p in self.parameters(optimizer).values() if p.grad is not None), None)

    def missing(self, parameters: dict[str, Tensor], gradients: dict[str, Tensor]) -> str:
        """Why not all joints serve in this step."""
        name = next((name for name in self._wanted if name not in gradients), None)
        if name is None:
            return f"{next(iter(self._refused.values()))}; joints like it are not teleported"
        if name in parameters:
            return f"parameter {name!r} has no gradient: joints that need it are not teleported"
        return f"parameter {name!r} is no longer in the optimizer: joints that need it are not teleported"

    def buffers(self, bucket: Bucket) -> dict[str, Tensor]:
        """The buffers that the bucket's joints carry along, looked up on the model."""
        return self._buffers(bucket.buffers())

    def gradients(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """The gradients of all parameters, those of the joints under the names that the plan has for them."""
        if self._stale(optimizer):
            self._locate(optimizer)
        found: dict[str, Tensor] = {}
        for g, group in enumerate(optimizer.param_groups):
            for i, parameter in enumerate(group["params"]):
                gradient = parameter.grad
                if gradient is None:
                    continue
                name = self._names.get((g, i), f"param_groups[{g}]['params'][{i}]")
                if gradient.layout != torch.strided:
                    if name in self.slots:
                        raise ValueError(
                            f"gradient of {name!r} is {gradient.layout}, which has no views; build its module with "
                            f"sparse=False, or leave its joints out with symmetries.select(...)"
                        )
                    continue
                found[name] = self.place.settled(parameter, gradient)
        return found

    def any_gradient(self, optimizer: Optimizer) -> bool:
        """Whether any entry of a gradient is not 0, on any rank."""
        return self.place.any_nonzero(local_part(gradient) for gradient in self.gradients(optimizer).values())

    def serving(self, names: set[str]) -> list[tuple[int, Bucket]]:
        """Numbered buckets whose parameters are all in `names` (those that have a gradient)."""
        return [
            (i, bucket)
            for i, bucket in enumerate(self.buckets)
            if names.issuperset(bucket.parameters()) and i not in self._refused
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_live": {}, "_seen": {}, "place": WHOLE, "_group": None}


def place_of(tensors: Iterable[Tensor], group: ProcessGroup | None = None) -> Whole:
    """How these parameters are measured and moved: by this process, or by all ranks where one is a DTensor.

    group: the ranks that hold the same plain tensors.
    """
    parameters = list(tensors)
    if all(as_dtensor(parameter) is None for parameter in parameters):
        if group is None:
            return WHOLE
        from teleport_fast.distributed.replicas import Replicas

        return Replicas(group)
    from teleport_fast.distributed.shards import Shards

    return Shards(parameters)


def _places(optimizer: Optimizer) -> tuple[dict[int, tuple[int, int]], dict[str, tuple[int, int]]]:
    """Where each parameter stands, by id, and by its name in the groups that have names."""
    by_id: dict[int, tuple[int, int]] = {}
    by_name: dict[str, tuple[int, int]] = {}
    for g, group in enumerate(optimizer.param_groups):
        for i, parameter in enumerate(group["params"]):
            by_id[id(parameter)] = (g, i)
            if "param_names" in group:
                by_name[group["param_names"][i]] = (g, i)
    return by_id, by_name


def _positions(optimizer: Optimizer, symmetries: Symmetries) -> dict[str, tuple[int, int]]:
    by_id, named = _places(optimizer)
    for joint in symmetries:
        for name in joint.parameters():
            for parameter in symmetries.candidates(name):
                if id(parameter) in by_id:
                    named[name] = by_id[id(parameter)]
                    break
    return named


def _all(optimizer: Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
