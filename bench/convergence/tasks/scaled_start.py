"""Digits by the same MLP from a badly scaled start: every hidden neuron by e^N(0, 1.5), its readers by the inverse."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from bench.convergence.additions import parse
from bench.convergence.network import Digits
from bench.convergence.optimizers import FIRST_ORDER
from bench.convergence.tasks.digits_mlp import QUICK_WORK, WORK, mlp

SPREAD = 1.5
# those that `attach` is tried around: it refuses Rotated
PEERS = ("muon", "sam")
ARMS = tuple(f"{name}{added}" for name in (*FIRST_ORDER, *PEERS) for added in ("", "+good-start", "+balance-once"))


@torch.no_grad()
def scale_(model: nn.Module, factors: list[torch.Tensor]) -> None:
    """Multiplies each hidden neuron's weights and bias by its factor, and what reads it by the inverse: the function stays."""
    layers = [module for module in model.children() if isinstance(module, nn.Linear)]
    for (writer, reader), factor in zip(itertools.pairwise(layers), factors, strict=True):
        writer.weight.mul_(factor[:, None])
        writer.bias.mul_(factor)
        reader.weight.div_(factor)


def factors(model: nn.Module, seed: int) -> list[torch.Tensor]:
    """The seed's factors of every hidden layer."""
    generator = torch.Generator().manual_seed(77_000 + seed)
    layers = [module for module in model.children() if isinstance(module, nn.Linear)]
    return [(SPREAD * torch.randn(layer.out_features, generator=generator)).exp() for layer in layers[:-1]]


def start(model: nn.Module, seed: int, arm: str) -> None:
    """The bad start, unless the arm says otherwise."""
    if "good-start" not in parse(arm)[1]:
        scale_(model, factors(model, seed))


class ScaledStart(Digits):
    """Every arm is paired with its optimizer's run from the good start."""

    def references(self, arm: str) -> tuple[str, ...]:
        base = parse(arm)[0]
        good = f"{base}+good-start"
        return tuple(other for other in (good, base) if other != arm and arm != good)


def variants(quick: bool) -> tuple[Digits, ...]:
    """One task."""
    note = f"e^N(0, {SPREAD})"
    return (ScaledStart("scaled-start", mlp, (64,), QUICK_WORK if quick else WORK, ARMS, start, note),)
