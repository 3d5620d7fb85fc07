"""Recorded cases of the published code, and small networks on which the rank condition holds."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

from teleport_fast.data_dependent import CrossEntropy, SquaredError

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
CASES = ("w653_b4", "w7543_b6", "w7543_b20")


class Case:
    """One recorded file: `case["tag"]` is a tensor, `case.list("W")` the tensors W_0, W_1, ..."""

    def __init__(self, name: str) -> None:
        self.name = name
        with numpy.load(FIXTURES / f"{name}.npz") as data:
            self.data = {key: torch.from_numpy(numpy.asarray(data[key])) for key in data.files}
        self.weights, self.X = self.list("W"), self["X"]
        self.losses = {"mse": SquaredError(self["Y_real"]), "ce": CrossEntropy(self["labels"])}

    def __getitem__(self, key: str) -> Tensor:
        return self.data[key]

    def __contains__(self, key: str) -> bool:
        return key in self.data

    def list(self, prefix: str) -> list[Tensor]:
        found = []
        while f"{prefix}_{len(found)}" in self.data:
            found.append(self.data[f"{prefix}_{len(found)}"])
        return found

    @property
    def joints(self) -> int:
        return len(self.weights) - 1


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def network(widths: tuple[int, ...], batch: int, seed: int = 0, bias: bool = False) -> tuple[list[Tensor], Tensor]:
    """Random weights [W b] and inputs (widths[0], batch), float64."""
    generator = torch.Generator().manual_seed(seed)
    weights = [
        torch.randn(after, before + bias, generator=generator, dtype=torch.float64) / before**0.5
        for before, after in itertools.pairwise(widths)
    ]
    return weights, torch.randn(widths[0], batch, generator=generator, dtype=torch.float64)


def elements(widths: list[int], seed: int = 1, size: float = 0.3) -> list[Tensor]:
    """exp(size M / √h) with a random M for every hidden width."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.linalg.matrix_exp(size * torch.randn(k, k, generator=generator, dtype=torch.float64) / k**0.5) for k in widths]


def relative(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖."""
    return float((found - wanted).detach().norm() / wanted.detach().norm())
