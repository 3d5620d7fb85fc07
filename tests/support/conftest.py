"""The support matrix: every test here is a row, named by its `support` marker, and runs once for every optimizer, the columns.

`arm` is the column. What a test finds refused it says with `arm.refuses(error, message)`, which checks the error; a condition on
what works is `arm.note(text)`. `python tests/support/write_page.py` turns the outcomes into docs/support.md.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import teleport_fast as tf
from teleport_fast.symmetry import Diagonal, GeneralLinear

Make = Callable[..., Optimizer]


def schedule_free(params: Any, **options: Any) -> Optimizer:
    schedulefree = pytest.importorskip("schedulefree", reason="needs schedulefree; pip install -r requirements/dev.txt")
    optimizer: Any = schedulefree.AdamWScheduleFree(params, **options)
    optimizer.train()
    made: Optimizer = optimizer
    return made


# column: (the base optimizer, what it is made with); None where there is no optimizer around which it is put
COLUMNS: dict[str, tuple[Make, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 2e-2, "momentum": 0.9}),
    "Adam": (torch.optim.Adam, {"lr": 5e-3}),
    "AdamW": (torch.optim.AdamW, {"lr": 5e-3}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 2e-2}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 2e-3, "momentum": 0.5}),
    "Muon": (torch.optim.Muon, {"lr": 5e-3, "weight_decay": 0.0}),
    "schedulefree": (schedule_free, {"lr": 1e-2}),
    "AdamW(fused=True)": (torch.optim.AdamW, {"lr": 5e-3, "fused": True}),
    "tf.optim.AdamW": (torch.optim.AdamW, {"lr": 5e-3}),
    "tf.optim.Rotated": (tf.optim.Rotated, {"lr": 5e-3, "every": 2}),
}


def joint(name: str, group: tf.symmetry.Group, first: int) -> tf.Joint:
    views = tf.View(f"{first}.weight", 0, 1, 4), tf.View(f"{first + 1}.weight", 1, 1, 4)
    return tf.Joint(name, name, group, 1, 4, (views[0],), (views[1],))


def chain(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4))).to(dtype)


def pair() -> tuple[nn.Sequential, tf.Symmetries]:
    """Two of the layers and their joint, where every parameter costs time."""
    model = chain()[:2]
    return model, tf.Symmetries((joint("dense", GeneralLinear(4), 0),), model=model)


def joints(model: nn.Module) -> tf.Symmetries:
    return tf.Symmetries((joint("dense", GeneralLinear(4), 0), joint("diagonal", Diagonal(4), 2)), model=model)


class Run:
    """Four linear layers with a GL joint and a diagonal one, the column's optimizer, and a teleport every two steps."""

    def __init__(self, arm: Arm, **changes: Any) -> None:
        take = changes.pop
        self.arm, self.plain = arm, take("plain", False)
        self.model: Any = take("model", None) or chain(take("dtype", torch.float64))
        self.symmetries = take("symmetries", None) or joints(self.model)
        params = take("params", None) or self.model.named_parameters()
        engine: dict[str, Any] = {
            "objective": "grad_norm",
            "schedule": tf.Every(2),
            "radius": 0.2,
            **{k: take(k) for k in ("objective", "schedule", "radius", "frame", "max_norm") if k in changes},
        }
        options = {**arm.options, **changes}
        self.engine: Any = None
        if arm.name == "tf.optim.AdamW" and not self.plain:
            self.optimizer: Any = tf.optim.AdamW(params, symmetries=self.symmetries, **engine, **options)
            self.engine = self.optimizer.teleporter
        else:
            self.optimizer = arm.make(params, **options)
            if not self.plain and arm.teleports:
                self.engine = tf.attach(self.optimizer, self.symmetries, **engine)

    def loss(self, step: int, rows: slice = slice(None)) -> Tensor:
        # a target, so that no rate is too large for long
        generator = torch.Generator().manual_seed(step % 4)
        x = torch.randn(6, 4, generator=generator).to(next(self.model.parameters()).dtype)
        target = x.roll(1, dims=1)
        loss: Tensor = (self.model(x[rows]) - target[rows]).square().mean()
        return loss

    def whole_loss(self) -> float:
        with torch.no_grad():
            return sum(float(self.loss(step)) for step in range(4))

    def backward(self, step: int) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(step)
        loss.backward()
        return loss.detach()

    def train(self, steps: int, first: int = 0) -> Run:
        for step in range(first, first + steps):
            self.backward(step)
            self.optimizer.step()
        return self

    @property
    def teleports(self) -> list[int]:
        return [record.step for record in self.engine.history]

    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]

    def everything(self) -> dict[str, Tensor]:
        """Weights and the optimizer's state, by name."""
        found = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found[f"{name}.{key}"] = value.clone()
        return found

    def moved_outputs(self) -> list[float]:
        """How far each teleport moves the function; the list fills as the run goes on."""
        x, seen, before = torch.randn(6, 4, dtype=torch.float64), list[float](), list[Tensor]()
        if self.engine is None:
            return seen

        def outputs() -> Tensor:
            with torch.no_grad():
                found: Tensor = copy.deepcopy(self.model).double()(x)
            return found

        def compare(_: object) -> None:
            seen.append(float((outputs() - before[-1]).norm() / before[-1].norm()))

        self.engine.before_move.append(lambda _: before.append(outputs()))
        self.engine.after_move.append(compare)
        return seen


class Arm:
    """One column, in one test."""

    def __init__(self, name: str, record: Callable[[str, object], None]) -> None:
        self.name, self._record = name, record
        self.make, self.options = COLUMNS[name]
        # Rotated turns within its own step: nothing is attached to it
        self.teleports = name != "tf.optim.Rotated"
        self.attached = self.teleports and name != "tf.optim.AdamW"

    def run(self, **changes: Any) -> Run:
        return Run(self, **changes)

    @contextmanager
    def refuses(self, error: type[Exception] | tuple[type[Exception], ...], match: str, because: str) -> Iterator[None]:
        with pytest.raises(error, match=match):
            yield
        self._record("refused", because)

    def pair(self) -> tuple[nn.Module, tf.Symmetries]:
        return pair()

    def note(self, text: str) -> None:
        self._record("note", text)


@pytest.fixture(params=COLUMNS)
def arm(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Arm:
    torch.set_num_threads(1)
    record_property("row", request.node.get_closest_marker("support").args[0])
    record_property("column", request.param)
    return Arm(request.param, record_property)


@pytest.fixture
def saved() -> Callable[..., list[Any]]:
    """Through a file and back, as `torch.load` allows it by default."""

    def through_a_file(*states: Any) -> list[Any]:
        buffer = io.BytesIO()
        torch.save(list(states), buffer)
        buffer.seek(0)
        found: list[Any] = torch.load(buffer, weights_only=True)
        return found

    return through_a_file


@pytest.fixture
def close() -> Callable[..., bool]:
    """Whether two lists or dictionaries of tensors agree, to a relative tolerance."""

    def agree(one: Any, other: Any, rtol: float = 1e-9) -> bool:
        pairs = zip(*(x.values() if isinstance(x, dict) else x for x in (one, other)), strict=True)
        return all(torch.allclose(a.double(), b.double(), rtol=rtol, atol=rtol / 10) for a, b in pairs)

    return agree
