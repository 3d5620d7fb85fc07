"""How each entry of an optimizer's state moves with its parameter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from teleport_fast.bases import is_schedulefree
from teleport_fast.symmetry.bucket import COVECTOR, PARAMETER, SQUARE

# RMSprop's momentum averages G/√v: of a diagonal only the signs are left in it, other elements move it as a gradient.
NORMALISED = "normalised"

# torch.optim's names. First moments are averages of gradients, second moments of their squares (docs/mathematics.md).
ROLES = {
    "exp_avg": COVECTOR,
    "momentum_buffer": COVECTOR,
    "grad_avg": COVECTOR,
    "exp_avg_sq": SQUARE,
    "max_exp_avg_sq": SQUARE,
    "square_avg": SQUARE,
    "sum": SQUARE,
}

SECOND_MOMENTS = ("keep", "reset", "project")


def state_sources(optimizer: Optimizer, parameters: dict[str, Tensor]) -> list[tuple[str, dict[str, Tensor]]]:
    """The state tensors that move, as (kind, {parameter name: tensor}) per state key.

    Errors: ValueError for a tensor of more than one entry whose key is unknown: moving the parameter without it would
    corrupt the optimizer.
    """
    roles = _roles(optimizer)
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and key in roles and value.shape == parameter.shape:
                found.setdefault(key, {})[name] = value
                continue
            for tensor in _tensors(value):
                if tensor.numel() > 1 or key in roles:
                    raise ValueError(
                        f"optimizer state {key!r} of {name!r}, shape {tuple(tensor.shape)}, has no known "
                        f"transformation; teleportation supports the state of SGD, Adam, AdamW, Adagrad, RMSprop "
                        f"and Muon: "
                        f"{', '.join(ROLES)}"
                    )
    return [(roles[key], tensors) for key, tensors in found.items()]


def _roles(optimizer: Optimizer) -> dict[str, str]:
    if isinstance(optimizer, torch.optim.RMSprop):
        return {**ROLES, "momentum_buffer": NORMALISED}
    if is_schedulefree(optimizer):
        return {**ROLES, "z": PARAMETER}  # averages of z and the weights move as both do
    return ROLES


def forget_(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Let the state of `parameters` start anew; Adagrad's exists before its first step, so it is put back."""
    for parameter in parameters:
        state = optimizer.state.get(parameter)
        if state and isinstance(optimizer, torch.optim.Adagrad):
            begin = optimizer.defaults["initial_accumulator_value"]
            optimizer.state[parameter] = {
                "step": torch.zeros_like(state["step"]),
                "sum": torch.full_like(state["sum"], begin),
            }
        else:
            optimizer.state.pop(parameter, None)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, Iterable) and not isinstance(value, str):
        for inner in value:
            yield from _tensors(inner)
