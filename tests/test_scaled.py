"""Under a GradScaler, autocast and clipping: a scaled gradient, one that overflowed, and one that a move made larger."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import teleport_fast as tf
from teleport_fast.called import unless
from teleport_fast.symmetry import Diagonal, GeneralLinear, Orthogonal, Permutation
from teleport_fast.symmetry.bucket import Element

GROUPS = {"dense": GeneralLinear(4), "diagonal": Diagonal(4), "rotations": Orthogonal(4)}


class Run:
    """Four linear layers with two joints; one joint's group is given."""

    def __init__(self, group: str = "dense", dtype: torch.dtype = torch.float32, **options: Any) -> None:
        torch.manual_seed(0)
        self.model: Any = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))).to(dtype)
        joints = [
            tf.Joint(
                f"{i}", "test", GROUPS[group], 1, 4,
                (tf.View(f"{i}.weight", 0, 1, 4), tf.View(f"{i}.bias", 0, 1, 4)), (tf.View(f"{i + 1}.weight", 1, 1, 4),),
            )
            for i in (0, 2)
        ]  # fmt: skip
        self.symmetries = tf.Symmetries(tuple(joints), model=self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **{"lr": 1e-2, **options})

    def loss(self, step: int) -> Tensor:
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step)).to(self.model[0].weight.dtype)
        loss: Tensor = self.model(x).square().mean()
        return loss

    def train(self, steps: int, overflow: tuple[int, ...] = (), scaler: Any = None) -> None:
        for step in range(steps):
            self.optimizer.zero_grad()
            loss = self.loss(step)
            (loss if scaler is None else scaler.scale(loss)).backward()
            if step in overflow:
                self.model[3].bias.grad[1] = float("inf")
            if scaler is None:
                self.optimizer.step()
            else:
                scaler.step(self.optimizer)
                scaler.update()

    def state(self) -> dict[str, Tensor]:
        found = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            found |= {f"{name}.{key}": value.clone() for key, value in self.optimizer.state.get(parameter, {}).items()}
        return found


def scaler() -> Any:
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)


@pytest.mark.parametrize("objective, group", [("grad_norm", "dense"), ("grad_norm", "diagonal"), ("eigenbasis", "rotations")])
@pytest.mark.parametrize("frame", ["stay", "return"])
@pytest.mark.parametrize("overflow", [(), (1,), (2,), (4,)])
def test_a_fused_step_under_a_scaler_is_the_unfused_one(
    objective: str, group: str, frame: str, overflow: tuple[int, ...]
) -> None:
    """The scaler steps a fused optimizer also on inf, with scaled gradients and its verdict in a tensor."""
    runs = Run(group, fused=True), Run(group, fused=False)
    teleporters = [tf.attach(run.optimizer, run.symmetries, objective, tf.Every(2), frame=frame) for run in runs]
    for run in runs:
        run.train(7, overflow, scaler())
    assert [t.step_count for t in teleporters] == [7 - len(overflow)] * 2
    steps, others = ([record.step for record in t.history] for t in teleporters)
    assert steps == others and len(steps) == (3 if not overflow else 2)
    for one, two in zip(runs[0].state().values(), runs[1].state().values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    for mine, its in zip(teleporters[0].history, teleporters[1].history, strict=True):
        assert mine.objective_before == pytest.approx(its.objective_before, rel=1e-3)


@pytest.mark.parametrize("second_moments", ["keep", "reset"])
@pytest.mark.parametrize("objective, group", [("grad_norm", "dense"), ("grad_norm", "diagonal"), ("eigenbasis", "rotations")])
@pytest.mark.parametrize("frame", ["stay", "return"])
def test_a_fused_step_that_overflowed_leaves_every_bit(
    objective: str, group: str, frame: str, second_moments: str
) -> None:
    """When a teleport is due: weights, state, the objective's memory and the counter; without the inf (control) all move."""
    for overflows in (True, False):
        run, seen, scaling = Run(group, fused=True), list[tf.TeleportRecord](), scaler()
        teleporter = tf.attach(
            run.optimizer, run.symmetries, objective, tf.At(3), frame=frame,
            second_moments=second_moments, on_teleport=seen.append,
        )  # fmt: skip
        run.train(3, scaler=scaling)
        before, memory = run.state(), copy.deepcopy(teleporter.objective.state_dict())
        run.train(1, (0,) if overflows else (), scaling)
        after, now = run.state(), teleporter.objective.state_dict()
        assert all(torch.equal(after[key], before[key]) for key in before) == overflows
        if memory:
            assert all(torch.equal(now[key], memory[key]) for key in memory) == overflows
        assert teleporter.step_count == (3 if overflows else 4)
        assert len(teleporter.history) == len(seen) == (0 if overflows else 1)


class Reads(TorchDispatchMode):
    """Counts what brings a number to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::item"):
            self.names[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective, group", [("grad_norm", "dense"), ("grad_norm", "diagonal"), ("eigenbasis", "rotations")])
@pytest.mark.parametrize("due", [True, False])
def test_the_verdict_gates_the_move_without_being_read(objective: str, group: str, due: bool) -> None:
    """Between the hooks nothing comes to the host; the count is settled later, and `history` (the control) does read."""
    run = Run(group, fused=True)
    teleporter = tf.attach(run.optimizer, run.symmetries, objective, tf.At(0) if due else tf.At())
    run.loss(0).backward()
    run.optimizer.found_inf = torch.zeros(())
    run.optimizer.grad_scale = torch.full((), 2.0)
    with Reads() as reads:
        run.optimizer.step()
    assert not reads.names
    with Reads() as reads:
        assert len(teleporter.history) == due
        assert teleporter.step_count == 1
    assert reads.names["aten::_local_scalar_dense"] > 0


def test_a_step_between_teleports_reads_nothing_back() -> None:
    run = Run(lr=torch.tensor(1e-2), foreach=False)
    tf.attach(run.optimizer, run.symmetries, "grad_norm", tf.At())
    plain = Run(lr=torch.tensor(1e-2), foreach=False)
    counts = []
    for each in (run, plain):
        each.train(1)
        each.loss(1).backward()
        with Reads() as reads:
            each.optimizer.step()
        counts.append(reads.names)
    rate = 1  # a rate on the host is read there
    assert sum(counts[0].values()) <= sum(counts[1].values()) + rate


def test_the_identity_takes_the_place_of_every_kind_of_element() -> None:
    for group in (*GROUPS.values(), Permutation(4)):
        g = group.random(2, 0.5, torch.Generator().manual_seed(0), *(() if group.form == "permutation" else (torch.float64,)))
        element = Element.of(group, g)
        gone, kept = unless(torch.tensor(True), element), unless(torch.tensor(False), element)
        assert torch.equal(kept.g, g)
        identity = {"dense": torch.eye(4).expand(2, 4, 4), "diagonal": torch.ones(2, 4)}.get(
            group.form, torch.arange(4).expand(2, 4)
        )
        assert torch.equal(gone.g, identity.to(g.dtype))
        assert gone.g_inverse_t is None or torch.equal(gone.g_inverse_t, identity.to(g.dtype))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("objective, group", [("grad_norm", "dense"), ("eigenbasis", "rotations"), ("balance", "dense")])
@pytest.mark.parametrize("frame", ["stay", "return"])
def test_a_step_taken_under_autocast_moves_in_full_precision(
    half: torch.dtype, objective: str, group: str, frame: str
) -> None:
    inside, outside = Run(group), Run(group)
    for run in (inside, outside):
        tf.attach(run.optimizer, run.symmetries, objective, tf.Every(2), frame=frame)
    for step in range(5):
        for run in (inside, outside):
            run.optimizer.zero_grad()
            with torch.autocast("cpu", dtype=half):
                loss = run.loss(step)
            loss.float().backward()
            if run is inside:
                with torch.autocast("cpu", dtype=half):
                    run.optimizer.step()
                    assert torch.is_autocast_enabled("cpu")
            else:
                run.optimizer.step()
    assert all(map(torch.equal, inside.state().values(), outside.state().values()))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_rotated_steps_under_autocast_in_full_precision(half: torch.dtype) -> None:
    states = []
    for enabled in (True, False):
        run = Run()
        run.optimizer = tf.optim.Rotated(run.model.named_parameters(), every=1)
        for step in range(3):
            run.optimizer.zero_grad()
            run.loss(step).backward()
            with torch.autocast("cpu", dtype=half, enabled=enabled):
                run.optimizer.step()
        states.append(run.state())
    assert all(map(torch.equal, states[0].values(), states[1].values()))


@pytest.mark.parametrize("frame", ["stay", "return"])
def test_max_norm_clips_what_a_teleport_raised(frame: str) -> None:
    """Clipped before the step the norm is 1, a teleport raises it, and the base sees 1 again; without (control) more."""
    norms: dict[float | None, list[float]] = {}
    for max_norm in (None, 1.0):
        run = Run(dtype=torch.float64)
        tf.attach(run.optimizer, run.symmetries, "grad_norm", tf.Every(2), radius=0.5, frame=frame, max_norm=max_norm)
        seen = norms.setdefault(max_norm, [])

        def look(*_: Any, run: Run = run, seen: list[float] = seen) -> None:
            seen.append(float(torch.stack([p.grad.norm() for p in run.model.parameters()]).norm()))

        run.optimizer.register_step_pre_hook(look)
        for step in range(5):
            run.optimizer.zero_grad()
            (1e3 * run.loss(step)).backward()
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
            run.optimizer.step()
    assert [norm > 1.05 for norm in norms[None]] == [False, False, True, False, True]
    assert norms[1.0] == pytest.approx([1.0] * 5, rel=1e-4)


def test_max_norm_leaves_smaller_gradients_as_they_are() -> None:
    runs = Run(dtype=torch.float64), Run(dtype=torch.float64)
    for run, max_norm in zip(runs, (None, 1e6), strict=True):
        tf.attach(run.optimizer, run.symmetries, "grad_norm", tf.Every(2), max_norm=max_norm)
        run.train(5)
    assert all(map(torch.equal, runs[0].state().values(), runs[1].state().values()))


@pytest.mark.parametrize("wrong", [0.0, -1.0, True, "1", float("nan")])
def test_a_max_norm_that_is_no_positive_number_is_refused(wrong: Any) -> None:
    run = Run()
    with pytest.raises(ValueError, match=r"max_norm must be a positive number or None, got .*; 1\.0 is usual"):
        tf.attach(run.optimizer, run.symmetries, "grad_norm", max_norm=wrong)
