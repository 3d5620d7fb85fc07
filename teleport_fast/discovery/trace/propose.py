"""Candidates from a recorded call, without those that a role builder has found already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from teleport_fast.discovery.candidates import Candidate
from teleport_fast.discovery.trace.assemble import candidates
from teleport_fast.discovery.trace.record import record
from teleport_fast.discovery.trace.tape import Tape
from teleport_fast.symmetry.joint import Joint


def beyond(proposals: Iterable[Candidate], found: Iterable[Joint]) -> list[Candidate]:
    """The candidates that the joints found so far do not hold already.

    What scales some rows makes another scale of them a part of it; a dense joint holds the permutations of its units, and
    one that stretches their scales.
    """
    found = list(found)
    taken = {entry for joint in found for entry in entries(joint)}
    dense = [joint for joint in found if joint.group.form == "dense"]
    reach = [(joint.group.holds_stretches, {entry[1:] for entry in entries(joint)}) for joint in dense]

    def fresh(candidate: Candidate) -> bool:
        if not candidate.alternatives:
            return True
        joint = candidate.alternatives[0]
        own = entries(joint)
        places = {entry[1:] for entry in own}
        scales, orders = joint.group.form == "diagonal", joint.group.form == "permutation"
        held = any((orders or (scales and stretches)) and places <= whole for stretches, whole in reach)
        return taken.isdisjoint(own) and not held

    names = {joint.name for joint in found}
    return [_named_apart(candidate, names) for candidate in proposals if fresh(candidate)]


def _named_apart(candidate: Candidate, names: set[str]) -> Candidate:
    """The candidate under a name that nobody has yet: a recurrent layer reads several spaces with one module."""
    name, number = candidate.name, 2
    while name in names:
        name, number = f"{candidate.name}-{number}", number + 1
    names.add(name)
    joints = tuple(replace(joint, name=name) for joint in candidate.alternatives)
    return replace(candidate, name=name, alternatives=joints)


def entries(joint: Joint) -> set[tuple[tuple[str, bool], str, int, int]]:
    """Where a joint acts, and how."""
    how = (joint.group.form, joint.group.holds_stretches)
    return {(how, view.parameter, view.axis, view.start) for view in joint.views()}


@dataclass(frozen=True)
class Record:
    """What one recorded call shows: every candidate, and for each parameter that stays the first reason why."""

    candidates: tuple[Candidate, ...]
    reasons: dict[str, str]


def _read(tape: Tape) -> Record:
    found = tuple(candidates(tape))
    reasons = dict(tape.opaque)
    for use in tape.uses:
        known = [tape.units.reasons[u] for u in use.unit.tolist() if u in tape.units.reasons]
        if known:
            reasons.setdefault(use.parameter, known[0])
    return Record(found, reasons)


def record_model(model: nn.Module, call: Callable[[], Any]) -> Record:
    """The record of one call of a model that is in eval mode already."""
    return _read(record(dict(model.named_parameters()), dict(model.named_buffers()), call))


def record_on_meta(model: nn.Module, inputs: Any) -> Record:
    """The record of a call on `meta`: shapes without numbers, so that nothing is computed and the model stays as it is."""

    def ghosts(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        return {name: tensor.detach().to("meta") for name, tensor in named}

    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def ghost(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to("meta", dtype) if value.is_floating_point() else value.to("meta")

    parameters, buffers = ghosts(model.named_parameters()), ghosts(model.named_buffers())
    keywords = tree_map(ghost, dict(inputs)) if isinstance(inputs, Mapping) else {}
    positional = tuple(tree_map(ghost, inputs if isinstance(inputs, (tuple, list)) else (inputs,)))
    def call() -> Any:
        return functional_call(model, {**parameters, **buffers}, () if keywords else positional, keywords)

    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        return _read(record(parameters, buffers, call))
    finally:
        for module in training:
            module.training = True
