"""One run: same start and batches for all arms, a function check that notices, timings and early ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from teleport_fast.experiments import train as module
from teleport_fast.experiments.arms import arm_named
from teleport_fast.experiments.text import Text
from teleport_fast.experiments.train import TOLERANCE, FunctionCheck, Run, Setting, loss_of, rate_scale, train
from teleport_fast.symmetry import DenseGroup, Orthogonal, Rotary

TELEPORTED = ("rotations", "random", "grad_norm", "grad_l1", "balance")


@pytest.mark.parametrize("name", TELEPORTED)
def test_no_teleport_of_any_arm_moves_the_function(name: str, tiny: Setting, tiny_text: Text) -> None:
    run = train(arm_named(name, every=2), 0.003, 0, replace(tiny, dtype="float64"), tiny_text)
    assert run.complete
    assert run.teleports == [2, 4]
    assert len(run.deviations) == 2
    assert run.max_deviation <= TOLERANCE["float64"]


# What real models have: gated MLPs, planes, grouped queries, gains, biases, LayerNorm, one table for both ends.
REAL: dict[str, dict[str, Any]] = {
    "gated-rotary-grouped-gains": {"mlp": "swiglu", "positions": "rotary", "kv_heads": 1, "gains": True},
    "layernorm-gains-bias-tied": {"norm": "layer", "gains": True, "bias": True, "tied": True, "mlp": "gelu"},
    "rotary-fused-layernorm-tied": {"positions": "rotary", "fused_qkv": True, "norm": "layer", "tied": True},
}
every_real = pytest.mark.parametrize("model", REAL.values(), ids=REAL.keys())


@every_real
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_no_exact_rotation_of_a_run_moves_the_function_of_a_real_models_parts(
    model: dict[str, Any], dtype: str, tiny: Setting, tiny_text: Text
) -> None:
    setting = replace(tiny, dtype=dtype, model=replace(tiny.model, **model))
    run = train(arm_named("rotations:every=1"), 0.003, 0, setting, tiny_text)
    assert run.complete
    assert run.teleports == [1, 2, 3, 4, 5]
    assert 0 < run.max_deviation <= TOLERANCE[dtype]


@pytest.mark.parametrize(("kind", "model"), [(Rotary, REAL["gated-rotary-grouped-gains"]), (Orthogonal, {"norm": "layer"})])
def test_the_check_inside_a_run_notices_a_turn_that_is_no_symmetry(
    kind: type[DenseGroup], model: dict[str, Any], tiny: Setting, tiny_text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planes and the ones vector not minded: the turn that a stream under RMSNorm would take."""
    monkeypatch.setattr(kind, "turn_to_eigenbasis", lambda _, covariance: torch.linalg.qr(covariance).Q)
    setting = replace(tiny, dtype="float64", model=replace(tiny.model, **model))
    run = train(arm_named("rotations:every=1"), 0.003, 0, setting, tiny_text)
    assert run.complete
    assert min(run.deviations[1:]) > 1e-3


def test_the_function_check_notices_a_move_that_is_no_symmetry() -> None:
    model, teleporter = nn.Linear(4, 4), SimpleNamespace(before_move=[], after_move=[])
    check = FunctionCheck(model, torch.randn(3, 4))
    check.watch(teleporter)
    for wrong in (False, True):
        teleporter.before_move[0](teleporter)
        with torch.no_grad():
            model.weight.mul_(1.1 if wrong else 1.0)
        teleporter.after_move[0](None)
    still, moved = check.deviations
    assert still == 0
    assert moved > 1e-2
    assert check.seconds > 0


def test_all_arms_see_the_same_start_and_the_same_batches(
    tiny: Setting, tiny_text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[torch.Tensor]] = []
    original = module.sample

    def recording(data: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = original(data, *rest)
        if data is tiny_text.train:
            seen[-1].append(drawn[0])
        return drawn

    monkeypatch.setattr(module, "sample", recording)
    runs = []
    for name, seed in (("adamw", 0), ("rotations", 0), ("random", 0), ("adamw", 1)):
        seen.append([])
        runs.append(train(arm_named(name), 0.003, seed, tiny, tiny_text))
    plain, turned, random, other = (torch.stack(batches) for batches in seen)
    assert torch.equal(plain, turned)
    assert torch.equal(plain, random)
    assert not torch.equal(plain, other)
    # A zero head gives every start the same first loss: it is the first gradient that shows equal weights.
    assert runs[0].gradient_norms[0] == runs[1].gradient_norms[0] == runs[2].gradient_norms[0]
    assert runs[0].gradient_norms[0] != runs[3].gradient_norms[0]


def test_the_same_run_twice_gives_the_same_bits(tiny: Setting, tiny_text: Text) -> None:
    first, again = (train(arm_named("rotations"), 0.003, 0, tiny, tiny_text) for _ in range(2))
    assert first.losses == again.losses
    assert first.validation == again.validation


def test_an_arm_that_teleports_takes_another_path_than_the_baseline(tiny: Setting, tiny_text: Text) -> None:
    plain = train(arm_named("adamw"), 0.003, 0, tiny, tiny_text)
    turned = train(arm_named("random", every=2), 0.003, 0, tiny, tiny_text)
    assert plain.losses[:3] == pytest.approx(turned.losses[:3], rel=1e-5)
    assert plain.losses[-1] != turned.losses[-1]


def test_every_step_is_measured(tiny: Setting, tiny_text: Text) -> None:
    calls: list[int] = []
    run = train(arm_named("adamw"), 0.003, 0, tiny, tiny_text, lambda run: calls.append(len(run.losses)))
    assert calls == [1, 2, 3, 4, 5, 6]
    assert len(run.losses) == len(run.gradient_norms) == 6
    assert [step for step, _ in run.validation] == [3, 6]
    assert 0 < run.optimizer_ms < run.step_ms
    assert run.tokens_per_second == pytest.approx(1e3 * 2 * 16 / run.step_ms)


def test_the_function_check_is_outside_the_timings(
    tiny: Setting, tiny_text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock.now)
    original = FunctionCheck._logits

    def slow(self: FunctionCheck) -> torch.Tensor:
        logits = original(self)
        clock.now += 1000.0
        self.seconds += 1000.0
        return logits

    def one_second(*inputs: object) -> torch.Tensor:
        clock.now += 1.0
        return loss_of(*inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(FunctionCheck, "_logits", slow)
    monkeypatch.setattr(module, "loss_of", one_second)
    run = train(arm_named("rotations", every=1), 0.003, 0, replace(tiny, steps=8), tiny_text)
    assert len(run.teleports) == 7
    assert (run.step_ms, run.optimizer_ms) == (1000.0, 0.0)


def test_control_c_returns_what_was_measured(tiny: Setting, tiny_text: Text) -> None:
    def stop(run: Run) -> None:
        if len(run.losses) == 4:
            raise KeyboardInterrupt

    run = train(arm_named("rotations"), 0.003, 0, tiny, tiny_text, stop)
    assert run.interrupted
    assert not run.complete
    assert len(run.losses) == 4
    assert [step for step, _ in run.validation] == [3]


def test_a_loss_that_is_not_finite_ends_the_run_as_diverged(
    tiny: Setting, tiny_text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: Iterator[float] = iter([1.0, 1.0, float("nan")])
    original = module.loss_of
    monkeypatch.setattr(module, "loss_of", lambda *inputs: original(*inputs) * next(losses))
    run = train(arm_named("adamw"), 0.003, 0, tiny, tiny_text)
    assert run.diverged
    assert not run.complete
    assert run.final == float("inf")
    assert len(run.losses) == 2


def test_gains_are_folded_in_every_arm_so_that_all_train_the_same_model(tiny: Setting, tiny_text: Text) -> None:
    setting = replace(tiny, model=replace(tiny.model, gains=True))
    plain, turned = (train(arm_named(name), 0.003, 0, setting, tiny_text) for name in ("adamw", "rotations"))
    # The third loss follows the first step that the two arms' second moments make differently.
    assert plain.losses[:2] == turned.losses[:2]
    assert turned.teleports == [3]


def test_the_rate_warms_up_and_ends_near_zero() -> None:
    scales = [rate_scale(step, 200) for step in range(200)]
    assert scales[0] == pytest.approx(0.1)
    assert max(scales) == scales[9] == scales[79] == 1
    assert scales[100:] == sorted(scales[100:], reverse=True)
    assert scales[-1] == 0.02


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0; pass"),
        ({"batch": -1}, "batch must be at least 1, got -1; pass"),
        ({"dtype": "float16"}, "dtype must be float32 or float64, got 'float16'; pass"),
        ({"table_rate": 0.0}, "table_rate must be positive, got 0.0; pass"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Setting(**fields)  # type: ignore[arg-type]
