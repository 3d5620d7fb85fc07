"""An optimizer's state across a data-dependent teleport: carried by the move, or reset."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from teleport_fast.data_dependent.action import MLPAction
from teleport_fast.data_dependent.covector import push_covectors
from teleport_fast.data_dependent.report import RankWarning, TeleportReport
from teleport_fast.data_dependent.sequential import has_bias
from teleport_fast.state import forget_, state_sources
from teleport_fast.symmetry.bucket import SQUARE

SECOND_MOMENTS = ("keep", "project")
PROBES = 64
Push = Callable[[Sequence[Tensor]], list[Tensor]]


def reset_state_(optimizer: Optimizer, model: nn.Sequential) -> None:
    """The state of the model's Linear layers starts anew, as where the published code builds the optimizer again.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.1), nn.Linear(4, 2))
    >>> optimizer = torch.optim.Adam(model.parameters())
    >>> model(torch.ones(1, 3)).sum().backward(); optimizer.step(); reset_state_(optimizer, model)
    >>> len(optimizer.state)
    0
    """
    forget_(optimizer, _parameters(model).values())


def carry_state_(
    optimizer: Optimizer, model: nn.Sequential, action: MLPAction, report: TeleportReport, second_moments: str = "keep"
) -> None:
    """Moves the state as the teleport `report` of `action` moved the weights: first moments and momentum p → (DΦ)⁻ᵀ p.

    A diagonal second moment has no image under a dense move: "keep" leaves it, "project" takes the mean square of the pushed √v ξ
    over random signs ξ, its image if the gradient's entries are uncorrelated (own). Step counts stay. ValueError for a published
    loop (parity), whose steps are no inverse pairs, and where push_covectors refuses.
    """
    if second_moments not in SECOND_MOMENTS:
        raise ValueError(f"second_moments must be one of {', '.join(SECOND_MOMENTS)}, got {second_moments!r}; reset_state_ starts anew")
    moves = report.elements()
    if report.undone or not moves:
        return
    push = pusher(action, moves)
    parameters = _parameters(model)
    for kind, tensors in state_sources(optimizer, parameters):
        blocks = _blocks(model, tensors, action)
        if kind != SQUARE:
            _write(model, tensors, push(blocks))
        elif second_moments == "project":
            _write(model, tensors, projected(blocks, push))


def pusher(action: MLPAction, moves: Sequence[Sequence[Tensor]]) -> Push:
    """The map of covectors (one a layer) through all steps of a teleport; the weights between them are computed once."""
    path = []
    for gs in moves:
        with warnings.catch_warnings():
            # The teleport itself has said it.
            warnings.simplefilter("ignore", RankWarning)
            moved = action.apply(gs)
        path.append((action, gs, moved))
        action = action.at(moved)

    def push(covectors: Sequence[Tensor]) -> list[Tensor]:
        carried = list(covectors)
        for step, gs, moved in path:
            carried = push_covectors(step, gs, moved, carried)
        return carried

    return push


def projected(blocks: Sequence[Tensor], push: Push) -> list[Tensor]:
    """The mean square of the pushed √v ξ over random signs ξ, v by layer."""
    generator = torch.Generator().manual_seed(0)
    signed = []
    for v in blocks:
        signs = torch.randint(0, 2, (PROBES, *v.shape), generator=generator) * 2 - 1
        signed.append(v.sqrt() * signs.to(v))
    return [pushed.square().mean(0) for pushed in push(signed)]


def _linears(model: nn.Sequential) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in model.named_children() if isinstance(module, nn.Linear)]


def _parameters(model: nn.Sequential) -> dict[str, Tensor]:
    return {f"{name}.{key}": p for name, linear in _linears(model) for key, p in linear.named_parameters()}


def _blocks(model: nn.Sequential, tensors: dict[str, Tensor], action: MLPAction) -> list[Tensor]:
    """[W b] of a state entry by layer, 0 where the optimizer has none yet."""
    blocks = []
    for name, linear in _linears(model):
        weight = tensors.get(f"{name}.weight", torch.zeros_like(linear.weight))
        if action.bias:
            bias = tensors.get(f"{name}.bias", weight.new_zeros(len(weight)))
            weight = torch.cat([weight, bias.unsqueeze(1)], 1)
        blocks.append(weight)
    return blocks


def _write(model: nn.Sequential, tensors: dict[str, Tensor], blocks: Sequence[Tensor]) -> None:
    for (name, linear), block in zip(_linears(model), blocks, strict=True):
        if f"{name}.weight" in tensors:
            tensors[f"{name}.weight"].copy_(block[:, : linear.in_features])
        if has_bias(linear) and f"{name}.bias" in tensors:
            tensors[f"{name}.bias"].copy_(block[:, -1])
