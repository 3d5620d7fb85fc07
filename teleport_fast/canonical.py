"""canonicalize: move a model to the one point of its orbit where every joint's two sides share the scale evenly."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from teleport_fast.objectives import Balance, Move
from teleport_fast.symmetry.bucket import PARAMETER, buckets
from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.symmetries import Symmetries, named_tensors

KINDS = ("balance",)


@dataclass(frozen=True)
class CanonicalReport:
    """What `canonicalize` did: sweeps over all joints, the squared norm of their weights before and after, and what stayed.

    `last_move` is the length of the largest move of the last sweep (a logarithm; 0 at the balanced point), `left_out`
    the joints that balance cannot serve, with the reason.
    """

    kind: str
    joints: int
    sweeps: int
    converged: bool
    last_move: float
    squared_norm_before: float
    squared_norm_after: float
    left_out: dict[str, str]

    def metadata(self) -> dict[str, Any]:
        """The report in plain numbers and text, as it is written beside saved weights."""
        return asdict(self)


@torch.no_grad()
def canonicalize(
    model: nn.Module,
    symmetries: Symmetries,
    kind: str = "balance",
    tolerance: float = 1e-8,
    max_sweeps: int = 500,
) -> CanonicalReport:
    """Move the model's parameters, in place, to the balanced point of their orbit; the function does not change.

    Balanced: ‖gA₊‖² + ‖g⁻ᵀA₋‖² is lowest over all joints together, so A₊A₊ᵀ = A₋A₋ᵀ on a dense joint and equal row norms on
    a diagonal one. Joints that share a parameter pull on each other: sweeps of exact minimisations, joint after joint, go
    on until no move of a sweep is longer than `tolerance` (the sum is geodesically convex, so they descend to its
    minimum). All of it in float64 on copies of the parameters that move, rounded to each parameter's dtype once.
    Returns a CanonicalReport. Errors: ValueError for another kind, a tolerance that is not positive, no joint that can be
    balanced, or a parameter that is not finite or on meta; nothing is moved then.
    Source: own derivation (docs/mathematics.md, balance), checked by tests/test_canonical.py.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> report = canonicalize(model, tf.find_symmetries(model))
    >>> report.converged, report.squared_norm_after <= report.squared_norm_before
    (True, True)
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}; balance is the one canonical form so far")
    if not tolerance > 0 or max_sweeps < 1:
        raise ValueError(f"tolerance and max_sweeps must be positive, got {tolerance} and {max_sweeps}; pass 1e-8 and 500")
    objective = Balance()
    left_out = {joint.name: reason for joint in symmetries if (reason := objective.unusable(joint))}
    joints = [joint for joint in symmetries if joint.name not in left_out]
    if not joints:
        why = "; ".join(f"{name}: {reason}" for name, reason in left_out.items()) or "there are none"
        raise ValueError(f"symmetries has no joint that can be balanced ({why}); see symmetries.explain()")
    live = {**dict(model.named_buffers()), **named_tensors(model)}
    for joint in joints:
        joint.check_shapes(live)
    for name, tensor in live.items():
        if tensor.is_meta:
            raise ValueError(f"parameter {name!r} is on meta, without numbers to balance; load the model's weights first")
    weights, carried = (
        {name: live[name].detach().double().clone() for joint in joints for name in of(joint)}
        for of in (Joint.parameters, Joint.buffers)
    )
    moving = {**carried, **weights}
    for name, tensor in moving.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"parameter {name!r} has an entry that is not finite; balance a model that is whole")
    order = buckets(joints)
    move = Move(weights, {}, math.inf, True, torch.Generator())
    before = float(objective.value(move))
    sweep, longest = 0, math.inf
    while sweep < max_sweeps and longest > tolerance:
        sweep, longest = sweep + 1, 0.0
        for index, bucket in enumerate(order):
            found = objective.element(index, bucket, move)
            if found is not None:
                bucket.move_(found[0], [(PARAMETER, moving)])
                longest = max(longest, float(found[1]))
    for name, tensor in moving.items():
        live[name].copy_(tensor)
    after = float(objective.value(move))
    return CanonicalReport(kind, len(joints), sweep, longest <= tolerance, longest, before, after, left_out)
