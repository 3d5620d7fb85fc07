"""Rows of the support matrix: what stands around a step in a training loop."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.checkpoint import checkpoint

import teleport_fast as tf

Close = Callable[..., bool]

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4], 0.5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.5, total_iters=4),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=2),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 20),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 5e-3, total_steps=12, cycle_momentum=False),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 5e-3, 2, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.5, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 20)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.ConstantLR(o, 0.5, total_iters=2)]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=1e-3, anneal_epochs=3),
}


@pytest.mark.support("every learning-rate scheduler")
def test_schedulers_set_the_plain_rates_and_the_loss_falls(arm: Any) -> None:
    assert {n for n in lr_scheduler.__all__ if n not in ("LRScheduler", "EPOCH_DEPRECATION_WARNING")} <= SCHEDULERS.keys()
    for name, make in SCHEDULERS.items():
        rates = []
        for plain in (True, False):
            run = arm.run(plain=plain)
            start = run.whole_loss()
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*lr_scheduler.step.*optimizer.step.*")
                scheduler = make(run.optimizer)
                for step in range(6):
                    if plain:
                        run.optimizer.step()
                    else:
                        run.train(1, first=step)
                    scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
                    rates.append((plain, [group["lr"] for group in run.optimizer.param_groups]))
            assert plain or run.whole_loss() < start, name
            assert plain or run.engine is None or run.teleports == [2, 4]
        assert [r for plain, r in rates if plain] == [r for plain, r in rates if not plain], name
        assert len({r[0] for _, r in rates}) > 1, name


@pytest.mark.support("GradScaler, with an inf at a step with a teleport and at one without")
@pytest.mark.parametrize("overflow", [4, 5])
@pytest.mark.parametrize("unscale", [True, False])
def test_a_scaled_run_is_the_unscaled_one_without_the_steps_that_overflowed(
    arm: Any, close: Close, overflow: int, unscale: bool
) -> None:
    run, other = arm.run(dtype=torch.float32), arm.run(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    for step in range(8):
        run.optimizer.zero_grad()
        scaler.scale(run.loss(step)).backward()
        if step == overflow:
            run.model[3].weight.grad[1, 2] = float("inf")
        if unscale:
            scaler.unscale_(run.optimizer)
        scaler.step(run.optimizer)
        scaler.update()
        if step != overflow:
            other.train(1, first=step)
    assert scaler.get_scale() == 512
    assert close(run.everything(), other.everything(), rtol=2e-3 if arm.name == "Muon" else 1e-4)
    if run.engine is not None:
        assert run.engine.step_count == other.engine.step_count == 7
        assert run.teleports == other.teleports == [2, 4, 6]


def under_autocast(arm: Any, dtype: torch.dtype) -> None:
    runs = [arm.run(dtype=torch.float32) for _ in range(2)]
    start = runs[0].whole_loss()
    for step in range(8):
        for inside, run in zip((True, False), runs, strict=True):
            run.optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = run.loss(step)
            loss.backward()
            with torch.autocast("cpu", dtype=dtype, enabled=inside and arm.name != "Muon"):
                run.optimizer.step()
    assert runs[0].whole_loss() < start
    assert all(map(torch.equal, runs[0].everything().values(), runs[1].everything().values()))


@pytest.mark.support("autocast, bfloat16")
def test_autocast_to_bfloat16(arm: Any) -> None:
    under_autocast(arm, torch.bfloat16)


@pytest.mark.support("autocast, float16")
def test_autocast_to_float16(arm: Any) -> None:
    under_autocast(arm, torch.float16)


@pytest.mark.support("bfloat16 weights")
def test_half_precision_weights_train_and_their_moves_keep_the_function(arm: Any) -> None:
    run = arm.run(dtype=torch.bfloat16)
    moved, start = run.moved_outputs(), run.whole_loss()
    run.train(12)
    assert run.whole_loss() < start
    assert all(change < 2e-2 for change in moved)
    assert {p.dtype for p in run.model.parameters()} == {torch.bfloat16}


@pytest.mark.support("gradient accumulation")
def test_two_half_batches_are_one_batch(arm: Any, close: Close) -> None:
    run, other = arm.run(), arm.run().train(6)
    for step in range(6):
        run.optimizer.zero_grad()
        for rows in (slice(0, 3), slice(3, 6)):
            (run.loss(step, rows) / 2).backward()
        run.optimizer.step()
    # Muon orthogonalises in bfloat16
    assert close(run.everything(), other.everything(), rtol=5e-2 if arm.name == "Muon" else 1e-6)


@pytest.mark.support("clipping before the step")
def test_gradients_clipped_before_the_step_are_what_the_teleport_sees(arm: Any) -> None:
    run, norms = arm.run(), list[float]()

    def norm() -> float:
        return float(torch.stack([p.grad.norm() for p in run.model.parameters()]).norm())

    moved = run.moved_outputs()
    if run.engine is not None:
        run.engine.before_move.append(lambda _: norms.append(norm()))
    else:
        run.optimizer.register_step_post_hook(lambda *_: norms.append(norm()))
    for step in range(6):
        run.backward(step)
        assert norm() > 0.1
        nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
        run.optimizer.step()
    assert norms == pytest.approx([0.1] * len(norms), rel=1e-4) and len(norms) >= 2
    assert all(change < 1e-12 for change in moved)


def max_norm_within_the_step(arm: Any) -> None:
    """Gradients of what is moved within the step stay unmoved: the first moment after one step shows what was taken."""
    taken = {}
    for max_norm in (None, 0.1):
        run = arm.run(max_norm=max_norm, radius=0.5, schedule=tf.Once())
        run.backward(0)
        nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
        run.optimizer.step()
        moments = [run.optimizer.state[p]["exp_avg"] / 0.1 for p in run.model.parameters()]
        taken[max_norm] = float(torch.stack([moment.norm() for moment in moments]).norm())
    assert taken[0.1] == pytest.approx(0.1, rel=1e-3) and taken[None] > 0.102


@pytest.mark.support("max_norm after a teleport")
def test_max_norm_bounds_what_the_base_steps_with(arm: Any) -> None:
    """Without it (the control) a teleport raises the norm; Rotated's turns do not, and leave gradients alone."""
    if arm.name == "tf.optim.AdamW":
        max_norm_within_the_step(arm)
        return
    largest = {}
    for max_norm in (None, 0.1):
        run, seen = arm.run(**({"max_norm": max_norm, "radius": 0.5} if arm.teleports else {})), list[float]()

        def look(*_: Any, run: Any = run, seen: list[float] = seen) -> None:
            seen.append(float(torch.stack([p.grad.norm() for p in run.model.parameters()]).norm()))

        run.optimizer.register_step_pre_hook(look)
        for step in range(5):
            run.backward(step)
            nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
            run.optimizer.step()
        largest[max_norm] = max(seen)
    assert largest[0.1] == pytest.approx(0.1, rel=1e-3)
    assert (largest[None] > 0.102) == arm.teleports
    if not arm.teleports:
        arm.note("norms stay")


@pytest.mark.support("a teleport keeps the function")
def test_a_teleport_keeps_the_function(arm: Any) -> None:
    run = arm.run()
    moved = run.moved_outputs()
    run.train(6)
    if arm.name == "tf.optim.AdamW":
        # the diagonal part is taken within the step; at rate 0 nothing else happens there
        run = arm.run(lr=0.0, weight_decay=0.0)
        x = torch.randn(6, 4, dtype=torch.float64)
        before, start = run.model(x).detach(), run.weights()
        run.train(4)
        assert not any(map(torch.equal, run.weights(), start))
        assert float((run.model(x).detach() - before).norm() / before.norm()) < 1e-12
    elif run.engine is not None:
        assert len(moved) == 2 and max(moved) < 1e-12
    else:
        arm.note("moves within its step only")


@pytest.mark.support("frame='return': weights are back after every step")
def test_weights_come_back(arm: Any, close: Close) -> None:
    if arm.name == "tf.optim.AdamW":
        with arm.refuses(TypeError, "frame", "moves that stay; use attach"):
            arm.run(frame="return")
        return
    run = arm.run(lr=0.0, **({"frame": "return"} if arm.attached else {}))
    start = run.weights()
    run.train(6)
    assert close(run.weights(), start, rtol=1e-12)
    assert run.engine is None or run.teleports == [2, 4]


@pytest.mark.support("closures")
def test_a_closure_runs_once_with_gradients_and_its_loss_comes_back(arm: Any, close: Close) -> None:
    run, other, calls = arm.run(), arm.run(), list[Tensor]()
    for step in range(4):

        def closure(step: int = step) -> Tensor:
            assert torch.is_grad_enabled()
            run.optimizer.zero_grad()
            loss = run.loss(step)
            loss.backward()
            calls.append(loss)
            return loss

        with torch.no_grad():
            assert run.optimizer.step(closure) is calls[-1]
    other.train(4)
    assert len(calls) == 4
    assert close(run.everything(), other.everything(), rtol=1e-12)


@pytest.mark.support("step hooks: order and count")
def test_hooks_run_once_in_order(arm: Any) -> None:
    run, order = arm.run(), list[str]()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: order.append(name)

    for name in ("first", "second"):
        run.optimizer.register_step_pre_hook(note(f"{name} before"))
        run.optimizer.register_step_post_hook(note(f"{name} after"))
    everywhere = [
        register_optimizer_step_pre_hook(note("all before")),
        register_optimizer_step_post_hook(note("all after")),
    ]
    run.train(3)
    for handle in everywhere:
        handle.remove()
    assert order == 3 * [
        "all before", "first before", "second before", "first after", "second after", "all after"
    ]  # fmt: skip


@pytest.mark.support("gradient checkpointing")
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_forward_gives_the_same_run(arm: Any, reentrant: bool) -> None:
    run, other = arm.run(), arm.run().train(6)
    for step in range(6):
        run.optimizer.zero_grad()
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step % 4)).double()
        hidden = checkpoint(run.model[:2], x.clone().requires_grad_(), use_reentrant=reentrant)
        hidden = checkpoint(run.model[2:], hidden, use_reentrant=reentrant)
        (hidden - x.roll(1, dims=1)).square().mean().backward()
        run.optimizer.step()
    assert all(map(torch.equal, run.weights(), other.weights()))


@pytest.mark.support("a step between forward and backward raises")
def test_autograd_sees_that_weights_changed_between_forward_and_backward(arm: Any) -> None:
    run = arm.run().train(2)
    run.backward(2)
    loss = run.loss(3)
    run.optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.support("deterministic mode")
def test_deterministic_mode_gives_the_same_bits_twice(arm: Any) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        runs = [arm.run().train(6) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    one, other = (run.everything() for run in runs)
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.support("EMA and SWA")
@pytest.mark.parametrize("average", ["EMA", "SWA"])
def test_an_average_goes_along_with_the_weights(arm: Any, average: str, close: Close) -> None:
    """At rate 0 every point has the same function, so the average has it; untracked (the control) it has not."""
    deviations = {}
    for tracked in (True, False):
        run = arm.run(lr=0.0, radius=0.5) if arm.teleports else arm.run(lr=0.0)
        how = {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.8)} if average == "EMA" else {}
        averaged: Any = swa_utils.AveragedModel(run.model, **how)
        if tracked and run.engine is not None:
            run.engine.track(averaged)
        for step in range(8):
            run.train(1, first=step)
            averaged.update_parameters(run.model)
        x = torch.randn(6, 4, dtype=torch.float64)
        here, there = run.model(x).detach(), averaged(x).detach()
        deviations[tracked] = float((there - here).norm() / here.norm())
    assert deviations[True] < 1e-12
    assert (deviations[False] > 1e-2) == arm.teleports
    if arm.teleports:
        arm.note("through `teleporter.track`")


@pytest.mark.support("a non-finite gradient at a teleport skips the step")
def test_a_non_finite_gradient_leaves_every_bit(arm: Any) -> None:
    run = arm.run().train(2)
    run.backward(2)
    run.model[1].weight.grad[0, 0] = float("nan")
    before = run.everything()
    with pytest.warns(RuntimeWarning, match=r"gradient of '1\.weight' is not finite"):
        run.optimizer.step()
    after = run.everything()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.support("torch.compile of the model and of the step")
def test_nothing_is_compiled_again_after_warm_up(arm: Any, close: Close) -> None:
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    runs = [arm.run(model=model, symmetries=symmetries) for model, symmetries in (arm.pair(), arm.pair())]
    run, other, counter = *runs, CompileCounter()
    # schedulefree and Rotated keep rates and counts as python numbers, which a compiled step would be compiled for
    eager = arm.name in ("schedulefree", "tf.optim.AdamW", "tf.optim.Rotated")
    forward = torch.compile(run.model, backend=counter)
    step = run.optimizer.step if eager else torch.compile(run.optimizer.step, backend=counter)
    counts = []
    with contextlib.ExitStack() as stack:
        stack.callback(torch.compiler.reset)
        for number in range(7):
            run.optimizer.zero_grad()
            x = torch.randn(6, 4, generator=torch.Generator().manual_seed(number % 4)).double()
            (forward(x) - x.roll(1, dims=1)).square().mean().backward()
            step()
            counts.append(counter.frame_count)
    other.train(7)
    assert counts[0] >= 1 and counts[2] == counts[-1], counts
    assert close(run.weights(), other.weights(), rtol=5e-2 if arm.name == "Muon" else 1e-4)
    assert run.engine is None or run.teleports == other.teleports == [2, 4, 6]
    if eager:
        arm.note("the model; its step runs eagerly")
