"""Random sequences of what a training script does leave weights, state and counters as a straightforward model has them.

`SEQUENCES=10000 pytest tests/test_random_sequences.py` runs as many, by five hundred; a few are in the suite. The model below is
the mathematics and torch's documented update rules, one tensor at a time, with nothing of the library in it.
"""

from __future__ import annotations

import copy
import io
import os
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

import teleport_fast as tf
from teleport_fast import objectives
from teleport_fast.symmetry import Diagonal, GeneralLinear

SEQUENCES = int(os.environ.get("SEQUENCES", "25"))
CHUNK = 500
SHAPES = {"a": (3, 2), "b": (2, 3), "c": (3, 2), "d": (2, 3), "bias": (2,)}
DENSE, DIAGONAL = ("a", "b"), ("c", "d")
LR, DECAY, MOMENTUM, BETAS, EPS = 0.01, 0.1, 0.9, (0.9, 0.99), 1e-8


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def elements() -> tuple[Tensor, Tensor]:
    g = torch.matrix_exp(0.1 * draw(7, 3, 3))
    s = (0.1 * draw(8, 3)).exp()
    return g, s


@dataclass
class Model:
    """What should happen: weights, state, rates, who is frozen, steps taken, and which teleport moved how many joints."""

    base: str
    frame: str
    second_moments: str
    every: int
    weights: dict[str, Tensor]
    groups: list[tuple[str, ...]]
    state: dict[str, dict[str, Any]] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)
    count: int = 0
    history: list[tuple[int, int]] = field(default_factory=list)

    def step(self, gradients: dict[str, Tensor], force: bool, void: bool, initialising: bool = False) -> None:
        """void: a scaler found an inf."""
        if void:
            return
        gradients = {name: gradient.clone() for name, gradient in gradients.items()}
        if initialising or not any(name in gradients for name in (*DENSE, *DIAGONAL)):
            self._base_step(gradients, 0.0 if initialising else 1.0)
            return
        due = force or (self.count > 0 and self.count % self.every == 0)
        if due and not all(bool(gradient.isfinite().all()) for gradient in gradients.values()):
            return
        moved = [names for names in (DENSE, DIAGONAL) if due and all(name in gradients for name in names)]
        for names in moved:
            self._move(names, gradients, inverse=False)
        if due:
            self.history.append((self.count, len(moved)))
        self._base_step(gradients, 1.0)
        if self.frame == "return":
            for names in reversed(moved):
                self._move(names, {}, inverse=True)
        self.count += 1

    def _move(self, names: tuple[str, ...], gradients: dict[str, Tensor], inverse: bool) -> None:
        """W_plus -> g W_plus, W_minus -> W_minus g^-1; gradients and first moments as covectors."""
        first, second = names
        g, s = elements()
        if names == DIAGONAL:
            g = s.reciprocal().diag() if inverse else s.diag()
        elif inverse:
            g = torch.linalg.inv(g)
        back = torch.linalg.inv(g)
        self.weights[first], self.weights[second] = g @ self.weights[first], self.weights[second] @ back
        covectors = [gradients] if gradients else []
        covectors += [
            {name: self.state[name][key] for name in names if self.state.get(name, {}).get(key) is not None}
            for key in ("momentum_buffer", "exp_avg")
        ]
        for tensors in covectors:
            if first in tensors:
                tensors[first].copy_(back.mT @ tensors[first])
            if second in tensors:
                tensors[second].copy_(tensors[second] @ g.mT)
        if names == DIAGONAL:
            for name, factor in ((first, g.diagonal().pow(-2)[:, None]), (second, g.diagonal().pow(2)[None])):
                if "exp_avg_sq" in self.state.get(name, {}):
                    self.state[name]["exp_avg_sq"] *= factor
        elif self.second_moments == "reset":
            for name in names:
                self.state.pop(name, None)

    def _base_step(self, gradients: dict[str, Tensor], scale: float) -> None:
        for name, gradient in gradients.items():
            weight, lr, state = self.weights[name], scale * self.rates[name], self.state.setdefault(name, {})
            if self.base == "SGD":
                gradient = gradient + DECAY * weight
                before = state.get("momentum_buffer")
                state["momentum_buffer"] = gradient.clone() if before is None else MOMENTUM * before + gradient
                self.weights[name] = weight - lr * state["momentum_buffer"]
                continue
            state["step"] = t = state.get("step", 0) + 1
            zero = torch.zeros_like(weight)
            m = state["exp_avg"] = BETAS[0] * state.get("exp_avg", zero) + (1 - BETAS[0]) * gradient
            v = state["exp_avg_sq"] = BETAS[1] * state.get("exp_avg_sq", zero) + (1 - BETAS[1]) * gradient**2
            m_hat, v_hat = m / (1 - BETAS[0] ** t), v / (1 - BETAS[1] ** t)
            self.weights[name] = (1 - lr * DECAY) * weight - lr * m_hat / (v_hat.sqrt() + EPS)


class Sequences(RuleBasedStateMachine):
    """The library and the model, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.seed, self.force, self.extra, self.saved = 0, False, 0, None

    @initialize(
        base=st.sampled_from(["SGD", "AdamW", "fused AdamW", "tf.optim.AdamW"]),
        frame=st.sampled_from(["stay", "return"]),
        second_moments=st.sampled_from(["keep", "reset"]),
        every=st.integers(2, 4),
        split=st.booleans(),
    )
    def begin(self, base: str, frame: str, second_moments: str, every: int, split: bool) -> None:
        frame = "stay" if base == "tf.optim.AdamW" else frame
        weights = {name: draw(i, *shape) for i, (name, shape) in enumerate(SHAPES.items())}
        groups: list[tuple[str, ...]] = [("a", "d"), ("bias",), ("b", "c")] if split else [tuple(SHAPES)]
        self.model = Model(base, frame, second_moments, every, weights, groups, rates=dict.fromkeys(SHAPES, LR))
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=10**6)
        self.scaler.scale(torch.ones(()))
        self.build()

    def build(self) -> None:
        """New parameters, a new optimizer and a new teleporter with the model's weights and groups."""
        model = self.model
        self.parameters = {name: nn.Parameter(weight.clone()) for name, weight in model.weights.items()}
        holder = nn.Module()
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name not in model.frozen)
            holder.register_parameter(name, parameter)
        groups = [
            {"params": [(name, self.parameters[name]) for name in names], "lr": model.rates[names[0]]}
            for names in model.groups
        ]
        dense = tf.Joint("dense", "t", GeneralLinear(3), 1, 3, (tf.View("a", 0, 1, 3),), (tf.View("b", 1, 1, 3),))
        diagonal = tf.Joint("diagonal", "t", Diagonal(3), 1, 3, (tf.View("c", 0, 1, 3),), (tf.View("d", 1, 1, 3),))
        symmetries, (g, s) = tf.Symmetries((dense, diagonal), model=holder), elements()
        engine: dict[str, Any] = {
            "objective": objectives.Fixed({"dense": g[None], "diagonal": s[None]}),
            "schedule": tf.When(lambda info: self.force or (info.step > 0 and info.step % model.every == 0)),
            "second_moments": model.second_moments,
        }
        adamw: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
        if model.base == "tf.optim.AdamW":
            self.optimizer: Any = tf.optim.AdamW(groups, **adamw, symmetries=symmetries, **engine)
            self.teleporter: Any = self.optimizer.teleporter
        else:
            if model.base == "SGD":
                self.optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
            else:
                self.optimizer = torch.optim.AdamW(groups, **adamw, fused=model.base == "fused AdamW")
            self.teleporter = tf.attach(self.optimizer, symmetries, frame=model.frame, **engine)
        self.holder = holder

    def gradients(self) -> dict[str, Tensor]:
        self.seed += 1
        names = [name for name in self.parameters if name not in self.model.frozen]
        return {name: draw(1000 * self.seed + i, *self.parameters[name].shape) for i, name in enumerate(names)}

    def take(self, gradients: dict[str, Tensor], force: bool = False, scaled: bool = False) -> None:
        """One step of both."""
        scale = self.scaler.get_scale() if scaled else 1.0
        for name, parameter in self.parameters.items():
            parameter.grad = scale * gradients[name] if name in gradients else None
        infinite = not all(bool(gradient.isfinite().all()) for gradient in gradients.values())
        self.force = force
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            if scaled:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            else:
                self.optimizer.step()
        self.force = False
        self.model.step(gradients, force, void=scaled and infinite)

    @rule(scaled=st.booleans())
    def step(self, scaled: bool) -> None:
        gradients = self.gradients()
        self.take(gradients, scaled=scaled and bool(gradients))

    @rule(scaled=st.booleans())
    def teleport(self, scaled: bool) -> None:
        gradients = self.gradients()
        self.take(gradients, force=True, scaled=scaled and bool(gradients))

    @rule(where=st.sampled_from([*SHAPES]), scaled=st.booleans(), value=st.sampled_from([float("inf"), float("nan")]))
    def overflow(self, where: str, scaled: bool, value: float) -> None:
        """Without a scaler only when a teleport is due: between teleports it is the base's affair."""
        gradients = self.gradients()
        if where in gradients:
            gradients[where].view(-1)[1] = value
        matters = any(name in gradients for name in (*DENSE, *DIAGONAL))
        if gradients and (scaled or where not in gradients or matters):
            self.take(gradients, force=not scaled, scaled=scaled)

    @rule()
    def initialising_step(self) -> None:
        """As torch's distributed checkpoint makes an optimizer's state."""
        gradients = {name: torch.zeros_like(gradient) for name, gradient in self.gradients().items()}
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        for name, parameter in self.parameters.items():
            parameter.grad = gradients.get(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            self.optimizer.step()
        self.model.step(gradients, force=False, void=False, initialising=True)
        for group, names in zip(self.optimizer.param_groups, self.model.groups, strict=True):
            group["lr"] = self.model.rates[names[0]]

    @rule(name=st.sampled_from([*SHAPES]))
    def freeze_or_unfreeze(self, name: str) -> None:
        self.model.frozen ^= {name}
        self.parameters[name].requires_grad_(name not in self.model.frozen)

    @precondition(lambda self: self.extra < 2)
    @rule(rate=st.sampled_from([0.005, 0.02]))
    def add_group(self, rate: float) -> None:
        self.extra += 1
        name = f"extra{self.extra}"
        self.parameters[name] = nn.Parameter(draw(self.extra, 2, 2))
        self.model.weights[name], self.model.rates[name] = draw(self.extra, 2, 2), rate
        self.model.groups.append((name,))
        self.optimizer.add_param_group({"params": [(name, self.parameters[name])], "lr": rate})

    @rule()
    def reorder_groups(self) -> None:
        self.optimizer.param_groups.reverse()
        self.model.groups.reverse()

    @rule()
    def save(self) -> None:
        buffer = io.BytesIO()
        torch.save([self.optimizer.state_dict(), self.teleporter.state_dict()], buffer)
        self.saved = buffer.getvalue(), copy.deepcopy(self.model), self.extra

    @precondition(lambda self: self.saved is not None)
    @rule(fresh=st.booleans())
    def load(self, fresh: bool) -> None:
        """Into what is there, where its groups are still those that were saved, or as in a new process."""
        assert self.saved is not None
        written, then, extra = self.saved
        fresh = fresh or then.groups != self.model.groups
        history = [] if fresh else self.model.history
        self.model, self.extra = copy.deepcopy(then), extra
        self.model.history = history
        if fresh:
            self.build()
        else:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(self.model.weights[name]).requires_grad_(name not in self.model.frozen)
        states = torch.load(io.BytesIO(written), weights_only=True)
        self.optimizer.load_state_dict(states[0])
        self.teleporter.load_state_dict(states[1])

    @invariant()
    def the_library_is_where_the_model_is(self) -> None:
        if not hasattr(self, "model"):
            return
        names, mine, theirs = list[str](), list[Tensor](), list[Tensor]()
        for name, weight in self.model.weights.items():
            parameter, state = self.parameters[name], self.model.state.get(name, {})
            its = self.optimizer.state.get(parameter, {})
            for key in {"weight", *state, *its}:
                one, other = (weight, parameter.detach()) if key == "weight" else (state.get(key), its.get(key))
                other = torch.zeros(1) if other is None else torch.as_tensor(other)
                names.append(f"{key} of {name}")
                theirs.append(other.reshape(-1).double())
                # a state that was never needed is one of zeros
                mine.append(torch.as_tensor(0 if one is None else one).double().reshape(-1).expand(theirs[-1].shape))
        if not torch.allclose(torch.cat(theirs), torch.cat(mine), rtol=1e-8, atol=1e-10):
            differ = [n for n, x, y in zip(names, theirs, mine, strict=True) if not torch.allclose(x, y, 1e-8, 1e-10)]
            raise AssertionError(f"the library has other values in {differ}")
        assert self.teleporter.step_count == self.model.count
        assert [(record.step, record.joints) for record in self.teleporter.history] == self.model.history

    def teardown(self) -> None:
        # engines of one process must not pile up in the optimizers' registry
        if hasattr(self, "teleporter"):
            self.teleporter.detach()


@pytest.mark.parametrize("chunk", range(-(-SEQUENCES // CHUNK)))
def test_random_sequences_end_where_the_model_ends(chunk: int) -> None:
    torch.set_num_threads(1)
    machine = seed(chunk)(type("Sequences", (Sequences,), {}))
    slow = [HealthCheck.too_slow]  # what is drawn is cheap; a busy machine is not the test's affair
    how = settings(
        max_examples=min(CHUNK, SEQUENCES), stateful_step_count=12, suppress_health_check=slow, database=None, derandomize=False
    )
    run_state_machine_as_test(machine, settings=how)


@pytest.mark.parametrize("wrong", ["gradient", "state", "count"])
def test_the_model_notices_a_wrong_library(wrong: str) -> None:
    """The control: a teleport that forgets gradients or first moments, or a count that does not go on, is found."""
    machine = Sequences()
    machine.begin("AdamW", "stay", "keep", 2, False)
    machine.step(False)
    machine.step(False)
    machine.the_library_is_where_the_model_is()
    if wrong == "gradient":

        def disturb(*_: Any) -> None:
            machine.parameters["a"].grad.mul_(1.001)

        machine.optimizer.register_step_pre_hook(disturb)
    elif wrong == "state":
        machine.optimizer.state[machine.parameters["b"]]["exp_avg"].mul_(1.001)
    else:
        machine.teleporter.step_count -= 1
    machine.teleport(False)
    with pytest.raises(AssertionError):
        machine.the_library_is_where_the_model_is()
