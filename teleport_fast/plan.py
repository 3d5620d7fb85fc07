"""The plan of a teleporter: which joints serve, in which buckets, and where their parameters sit in the optimizer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from teleport_fast.objectives import Objective
from teleport_fast.symmetry.bucket import Bucket, buckets
from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.symmetries import Symmetries


class Plan:
    """Holds names and positions, never tensors: parameters are looked up in `optimizer.param_groups` at every step, buffers on
    the model.

    Errors: ValueError if no joint serves the objective, a joint names a parameter that the optimizer does not have, or
    a joint's tensors do not fit their views.
    """

    def __init__(self, symmetries: Symmetries, optimizer: Optimizer, objective: Objective) -> None:
        objective.check(symmetries)
        self.left_out = {joint.name: reason for joint in symmetries if (reason := objective.unusable(joint))}
        joints = [joint for joint in symmetries if joint.name not in self.left_out]
        if not joints:
            reasons = "; ".join(f"{name}: {why}" for name, why in self.left_out.items()) or "there are no joints"
            raise ValueError(
                f"no joint can serve objective {objective.name!r} ({reasons}); "
                f"pass another objective, or other symmetries: see symmetries.explain()"
            )
        positions = _positions(optimizer, symmetries)
        self.slots: dict[str, tuple[int, int]] = {}
        for joint in joints:
            for name in joint.parameters():
                if name not in positions:
                    raise ValueError(
                        f"parameter {name!r} of joint {joint.name!r} is not in the optimizer; "
                        f"give it to the optimizer, or leave the joint out with symmetries.select(...)"
                    )
                self.slots[name] = positions[name]
        self._names = {position: name for name, position in positions.items()}
        parameters = self.parameters(optimizer)
        for joint in joints:
            joint.check_shapes({**symmetries.buffers(joint.buffers()), **parameters})
        on_device: dict[torch.device, list[Joint]] = {}
        for joint in joints:
            on_device.setdefault(parameters[joint.parameters()[0]].device, []).append(joint)
        self.buckets: list[Bucket] = [bucket for alike in on_device.values() for bucket in buckets(alike)]
        self._buffers = symmetries.buffers

    def parameters(self, optimizer: Optimizer) -> dict[str, Tensor]:
        groups = optimizer.param_groups
        return {name: groups[group]["params"][index] for name, (group, index) in self.slots.items()}

    def buffers(self, bucket: Bucket) -> dict[str, Tensor]:
        """The buffers that the bucket's joints carry along, looked up on the model."""
        return self._buffers(bucket.buffers())

    def gradients(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """The gradients of all parameters, those of the joints under the names that the plan has for them."""
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
                found[name] = gradient
        return found

    def serving(self, names: set[str]) -> list[tuple[int, Bucket]]:
        """Numbered buckets whose parameters are all in `names` (those that have a gradient)."""
        return [(i, bucket) for i, bucket in enumerate(self.buckets) if names.issuperset(bucket.parameters())]


def _positions(optimizer: Optimizer, symmetries: Symmetries) -> dict[str, tuple[int, int]]:
    named: dict[str, tuple[int, int]] = {}
    by_id: dict[int, tuple[int, int]] = {}
    for g, group in enumerate(optimizer.param_groups):
        for i, parameter in enumerate(group["params"]):
            by_id[id(parameter)] = (g, i)
            if "param_names" in group:
                named[group["param_names"][i]] = (g, i)
    for joint in symmetries:
        for name in joint.parameters():
            parameter = symmetries.parameter(name)
            if parameter is not None and id(parameter) in by_id:
                named[name] = by_id[id(parameter)]
    return named
