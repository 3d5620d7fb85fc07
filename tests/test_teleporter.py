"""The engine in good and bad weather: what it records, what it does not act on, and what it keeps alive."""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import teleport_fast as tf
from teleport_fast import objectives
from teleport_fast.symmetry import GeneralLinear

Situation = dict[str, Tensor]


def joint(i: int) -> tf.Joint:
    plus, minus = tf.View(f"{i}.weight", 0, 1, 4), tf.View(f"{i + 1}.weight", 1, 1, 4)
    return tf.Joint(f"{i}-{i + 1}", f"kind {i}", GeneralLinear(4), 1, 4, (plus,), (minus,))


class Run:
    """Four linear layers, GL joints between 0 and 1 and between 2 and 3; the last layer has a bias of no joint."""

    def __init__(self, make: Callable[..., Optimizer] = torch.optim.AdamW, **options: Any) -> None:
        torch.manual_seed(0)
        self.model: Any = nn.Sequential(*(nn.Linear(4, 4, bias=i == 3) for i in range(4))).double()
        self.symmetries = tf.Symmetries((joint(0), joint(2)), model=self.model)
        self.optimizer = make(self.model.parameters(), **{"lr": 1e-2, **options})

    def attach(self, *args: Any, **options: Any) -> tf.Teleporter:
        return tf.attach(self.optimizer, self.symmetries, *args, **options)

    def backward(self, step: int = 0) -> None:
        x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        self.model.zero_grad()
        self.model(x).square().mean().backward()

    def train(self, steps: int, first: int = 0) -> None:
        for step in range(first, first + steps):
            self.backward(step)
            self.optimizer.step()

    def situation(self) -> Situation:
        found = {}
        for name, parameter in self.model.named_parameters():
            found[name] = parameter.detach().clone()
            if parameter.grad is not None:
                found[f"{name}.grad"] = parameter.grad.clone()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{name}.{key}"] = torch.as_tensor(value).clone()
        return found


def same_bits(one: Situation, other: Situation) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[key].nan_to_num(12345.0), other[key].nan_to_num(12345.0)) for key in one
    )


def test_history_has_one_record_per_teleport_with_what_it_did() -> None:
    run, seen = Run(), list[tf.TeleportRecord]()
    teleporter = run.attach("grad_norm", tf.Every(2), radius=0.2, on_teleport=seen.append)
    run.train(7)
    assert [record.step for record in teleporter.history] == [2, 4, 6]
    assert teleporter.history == seen
    for record in teleporter.history:
        assert record.objective_after > record.objective_before > 0
        assert record.radius_used == pytest.approx(0.2)
        assert record.joints == 2
        assert 0 < record.seconds < 10


def test_callbacks_see_the_weights_on_both_sides_of_the_move() -> None:
    run, seen = Run(), []
    teleporter = run.attach("grad_norm", tf.At(1))

    def before(of: tf.Teleporter) -> None:
        seen.append((of is teleporter, run.situation()))

    def after(record: tf.TeleportRecord) -> None:
        seen.append((record == teleporter.history[-1], run.situation()))

    teleporter.before_move.append(before)
    teleporter.after_move.append(after)
    run.train(1)
    run.backward(1)
    situation = run.situation()
    run.optimizer.step()
    assert [right for right, _ in seen] == [True, True]
    assert same_bits(seen[0][1], situation)
    assert not same_bits(seen[1][1], situation)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["2.weight", "3.bias"])
@pytest.mark.parametrize("frame", ["stay", "return"])
@pytest.mark.parametrize("objective", ["grad_norm", "eigenbasis"])
def test_a_non_finite_gradient_when_a_teleport_is_due_changes_nothing_at_all(
    bad: float, name: str, frame: str, objective: str
) -> None:
    """Weights, gradients and state stay bit for bit, one warning names the parameter, and the schedule tries again."""
    run = Run()
    teleporter = run.attach(objective, tf.At(2, 4), frame=frame)
    run.train(4)
    assert [record.step for record in teleporter.history] == [2]
    run.backward(4)
    gradient = dict(run.model.named_parameters())[name].grad
    assert gradient is not None
    gradient.view(-1)[1] = bad
    situation = run.situation()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.optimizer.step()
    assert same_bits(run.situation(), situation)
    shown = name if name == "2.weight" else r"param_groups[0]['params'][4]"
    assert [str(w.message) for w in caught] == [
        f"teleport_fast: gradient of {shown!r} is not finite: no teleport, and this optimizer step is skipped"
    ]
    assert teleporter.step_count == 4
    run.train(1, first=5)
    assert [record.step for record in teleporter.history] == [2, 4]
    assert all(bool(tensor.isfinite().all()) for tensor in run.situation().values())


def test_a_non_finite_gradient_between_teleports_is_the_base_optimizers_affair() -> None:
    run, plain = Run(torch.optim.SGD), Run(torch.optim.SGD)
    run.attach("grad_norm", tf.At(1))
    for each in (run, plain):
        each.backward()
        each.model[0].weight.grad[0, 0] = math.nan
        each.optimizer.step()
    assert same_bits(run.situation(), plain.situation())
    assert run.model[0].weight.isnan().sum() == 1


@pytest.mark.parametrize("size", [1e25, 1e-30])
def test_gradients_whose_squares_leave_float32_are_finite_gradients_and_not_zero(size: float) -> None:
    run = Run(torch.optim.SGD, lr=0.0)
    run.model.float()
    teleporter = run.attach("grad_l1", tf.Once(), radius=0.1)
    for parameter in run.model.parameters():
        parameter.grad = torch.full_like(parameter, size)
    run.optimizer.step()
    assert len(teleporter.history) == 1
    assert teleporter.step_count == 1


def test_two_teleporters_warn_once_about_one_non_finite_gradient() -> None:
    run = Run()
    first, second = run.attach("balance", tf.Once()), run.attach("eigenbasis", tf.Once())
    run.backward()
    run.model[0].weight.grad[0, 0] = math.nan
    situation = run.situation()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.optimizer.step()
    assert len(caught) == 1
    assert same_bits(run.situation(), situation)
    assert first.step_count == second.step_count == 0


def test_without_gradients_a_step_warns_and_counts_for_nothing() -> None:
    run = Run()
    teleporter = run.attach("balance", tf.Once())
    situation = run.situation()
    with pytest.warns(RuntimeWarning, match=r"no parameter of the joints has a gradient.*call backward\(\) first"):
        run.optimizer.step()
    assert same_bits(run.situation(), situation)
    assert teleporter.step_count == 0
    run.train(1)
    assert [record.step for record in teleporter.history] == [0]


@pytest.mark.parametrize("objective", ["balance", "random", "eigenbasis"])
def test_a_step_with_zero_gradients_and_no_rate_leaves_no_trace(objective: str) -> None:
    """Distributed checkpoints initialise an optimizer's state in this way."""
    run, plain = Run(lr=0.0), Run(lr=0.0)
    teleporter = run.attach(objective, tf.Once())
    for each in (run, plain):
        for parameter in each.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        each.optimizer.step()
    assert same_bits(run.situation(), plain.situation())
    assert teleporter.step_count == 0
    assert teleporter.history == []
    assert teleporter.state_dict() == {"objective": {}, "held": {}}
    run.train(1)
    assert [record.step for record in teleporter.history] == [0]


def test_zero_gradients_move_nothing_but_the_step_counts() -> None:
    """An optimizer with a rate takes the step, its decay included; there is no direction to teleport in."""
    run, plain = Run(weight_decay=0.1), Run(weight_decay=0.1)
    teleporter = run.attach("random", tf.Once())
    for each in (run, plain):
        for parameter in each.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        each.optimizer.step()
    assert same_bits(run.situation(), plain.situation())
    assert teleporter.step_count == 1
    assert teleporter.history == []


def test_a_joint_without_gradients_stays_while_the_others_move() -> None:
    run = Run(lr=0.0)
    teleporter = run.attach("grad_norm", tf.Once())
    run.backward()
    run.model[0].weight.grad = None
    weights = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    with pytest.warns(RuntimeWarning, match=r"parameter '0\.weight' has no gradient: joints that need it are not"):
        run.optimizer.step()
    changed = {name for name, parameter in run.model.named_parameters() if not torch.equal(parameter, weights[name])}
    assert changed == {"2.weight", "3.weight"}
    assert teleporter.history[0].joints == 1


@pytest.mark.parametrize("schedule", [tf.Once(), tf.At(5)], ids=["due", "not due yet"])
def test_a_sparse_gradient_of_a_joint_is_refused_at_the_first_step(schedule: tf.Schedule) -> None:
    run = Run(torch.optim.SGD)
    run.attach("grad_norm", schedule)
    run.model[0].weight.grad = torch.zeros(4, 4, dtype=torch.float64).to_sparse()
    with pytest.raises(ValueError, match=r"gradient of '0\.weight' is torch\.sparse_coo.*build its module with sparse"):
        run.optimizer.step()


def test_the_teleporter_keeps_neither_model_nor_optimizer_alive() -> None:
    """Without a garbage collection, as with the plain optimizer: on a GPU the weights would stay until the next one."""
    gc.collect()
    gc.disable()
    try:
        run = Run()
        teleporter = run.attach("eigenbasis", tf.Every(1), frame="return")
        run.train(3)
        gone = [weakref.ref(run.model[0].weight), weakref.ref(run.optimizer)]
        del run
        assert [reference() for reference in gone] == [None, None]
        assert len(teleporter.history) == 2
        with pytest.raises(ReferenceError, match="the teleporter's optimizer is gone; keep a reference to it"):
            _ = teleporter.optimizer
        teleporter.detach()
    finally:
        gc.enable()


def test_a_dropped_teleporter_goes_on_teleporting() -> None:
    run, seen = Run(), list[tf.TeleportRecord]()
    run.attach("grad_norm", tf.Every(1), on_teleport=seen.append)
    gc.collect()
    run.train(3)
    assert [record.step for record in seen] == [1, 2]


def test_balance_once_and_eigenbasis_every_three_steps_share_an_optimizer() -> None:
    run = Run()
    balance = run.attach(objectives.Balance(), tf.Once())
    turns = run.attach("eigenbasis", tf.Every(3))
    run.train(7)
    assert [record.step for record in balance.history] == [0]
    assert [record.step for record in turns.history] == [3, 6]
    assert balance.step_count == turns.step_count == 7
    assert {k for k in run.optimizer.param_groups[0] if k.startswith("teleport")} == {"teleport_step", "teleport_step1"}
    balance.detach()
    run.train(3, first=7)
    assert [record.step for record in turns.history] == [3, 6, 9]
    assert len(balance.history) == 1


def test_a_schedule_is_told_the_step_the_optimizer_and_the_last_record() -> None:
    run, told = Run(), list[Any]()

    def third(info: tf.StepInfo) -> bool:
        told.append((info.step, info.optimizer is run.optimizer, info.gradient_norm() > 0, info.last_teleport()))
        return info.step == 2

    teleporter = run.attach("grad_norm", tf.When(third))
    run.train(5)
    assert told == [(step, True, True, teleporter.history[0] if step > 2 else None) for step in range(5)]


def test_the_record_is_of_the_longest_way_of_all_joints() -> None:
    """Joints that share a weight are searched one after the other: the first went further than the last."""

    class Lengths(objectives.Fixed):
        reads_tensors = True

        def decide(self, index: int, bucket: Any, *rest: Any) -> Any:
            element, _ = super().decide(index, bucket, *rest) or (None, None)
            return element, torch.tensor(0.3 if bucket.joints[0].name == "0-1" else 0.1)

    run = Run()
    run.symmetries = tf.Symmetries((joint(0), joint(1)), model=run.model)
    stretch = {"0-1": torch.diag(torch.tensor([3.0, 1, 1, 1]))[None], "1-2": torch.diag(torch.tensor([1.0, 1, 1, 2]))[None]}
    teleporter = run.attach(Lengths(stretch), tf.Once())
    teleporter.with_condition = True
    run.train(1)
    (record,) = teleporter.history
    assert record.radius_used == pytest.approx(0.3)
    assert record.condition == pytest.approx(3)
    assert record.joints == 2


def test_the_seed_alone_decides_what_is_drawn() -> None:
    ends = []
    for seed, of_torch in ((3, 1), (3, 2), (4, 1)):
        run = Run()
        run.attach("random", tf.Every(1), seed=seed)
        torch.manual_seed(of_torch)
        state = torch.get_rng_state()
        run.train(3)
        assert torch.equal(torch.get_rng_state(), state)
        ends.append(run.situation())
    assert same_bits(ends[0], ends[1])
    assert not same_bits(ends[0], ends[2])
