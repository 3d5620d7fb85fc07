"""Recorded cases, small networks, and a model whose Hessian is small enough to be written out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

from teleport_fast.data_dependent import CrossEntropy, MLPAction

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
CASES = ("w653_b4", "w7543_b6", "w7543_b20")


class Case:
    """One recorded file: `case["tag"]` is a tensor, `case.list("W")` the tensors W_0, W_1, ..."""

    def __init__(self, name: str) -> None:
        self.name = name
        with numpy.load(FIXTURES / f"{name}.npz") as data:
            self.data = {key: torch.from_numpy(numpy.asarray(data[key])) for key in data.files}
        with numpy.load(FIXTURES / "sharp_directions.npz") as data:
            self.directions = torch.from_numpy(data[name])
        self.weights, self.X, self.joints = self.list("W"), self.data["X"], len(self.list("M"))

    def __getitem__(self, key: str) -> Tensor:
        return self.data[key]

    def list(self, prefix: str) -> list[Tensor]:
        found = []
        while f"{prefix}_{len(found)}" in self.data:
            found.append(self.data[f"{prefix}_{len(found)}"])
        return found

    def loss(self) -> Tensor:
        """Cross entropy at the present weights."""
        return CrossEntropy(self["labels"])(MLPAction(self.weights, self.X).outputs(self.weights))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def network(widths: tuple[int, ...], batch: int, bias: bool = False) -> tuple[list[Tensor], Tensor]:
    """Random weights [W b] and inputs (widths[0], batch), float64."""
    weights = [
        torch.randn(after, before + bias, dtype=torch.float64) / before**0.5 for before, after in itertools.pairwise(widths)
    ]
    return weights, torch.randn(widths[0], batch, dtype=torch.float64)


def relative(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖."""
    return float((found - wanted).detach().norm() / wanted.detach().norm())


def small_model() -> tuple[list[Tensor], Callable[[], Tensor]]:
    """(parameters, closure) of an MLP with tanh and 27 parameters."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2), torch.nn.Tanh()).double()
    inputs, targets = torch.randn(10, 3, dtype=torch.float64), torch.randn(10, 2, dtype=torch.float64)
    parameters = list(model.parameters())[:3]
    return [*parameters, list(model.parameters())[3]], lambda: (model(inputs) - targets).square().mean()


def explicit_hessian(params: list[Tensor], loss_fn: Callable[[], Tensor]) -> Tensor:
    """(P, P), row after row by backward."""
    gradients = torch.autograd.grad(loss_fn(), params, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradients])
    rows = [torch.autograd.grad(entry, params, retain_graph=True, materialize_grads=True) for entry in flat]
    return torch.stack([torch.cat([x.flatten() for x in row]) for row in rows]).detach()
