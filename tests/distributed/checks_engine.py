"""What the engine decides is the same on every rank, what it sends is the formula's, and what cannot be is refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import stand
import torch
import torch.distributed as dist
from checks_fsdp import sharded
from ranks import on
from torch import nn

import teleport_fast as tf
from teleport_fast.distributed import counted, shards
from teleport_fast.distributed.parts import local_of

prepare = stand.prepare


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, kind: str = "gpt") -> float:
    tokens, targets = next(stand.batches(kind, 1, dist.get_world_size()))
    loss = stand.loss_of(model, tokens, targets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def loss_now(model: nn.Module, kind: str = "gpt") -> float:
    tokens, targets = next(stand.batches(kind, 1, dist.get_world_size()))
    return float(stand.loss_of(model, tokens, targets).detach())


@on(2)
def without_the_sum_over_ranks_they_disagree_and_the_loss_moves() -> None:
    for silent in (False, True):
        model = stand.built("gpt")
        sharded(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-13)
        teleporter = tf.attach(optimizer, stand.symmetries_of("gpt", model), schedule=tf.At(0))
        seen = stand.moved_by(teleporter)
        original = shards.all_reduce_
        if silent:
            shards.all_reduce_ = lambda requests, op="sum": list(requests) and None
        try:
            before = one_step(model, optimizer)
        finally:
            shards.all_reduce_ = original
        same, moved = stand.same_everywhere(seen), abs(loss_now(model) - before)
        assert same is not silent
        assert (moved > 1e-6) is silent, moved


@on(2, 4)
def what_is_sent_is_what_the_formula_says() -> None:
    """Grams and row sums of the model in one all-reduce per round, four scalars, and the turned tensors' local bytes."""
    model = stand.built("gpt")
    sharded(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    symmetries = stand.symmetries_of("gpt", model)
    for joint_kinds, turns in ((("up-down",), False), (("value-output", "query-key"), True)):
        teleporter = tf.attach(optimizer, symmetries.select(joint_kinds), schedule=tf.Every(1))
        one_step(model, optimizer)  # not at step 0
        with counted() as traffic:
            one_step(model, optimizer)
        assert teleporter.history
        small = 0
        for bucket in teleporter.plan.buckets:
            heads = len(bucket.joints) * bucket.heads
            # a, b by row of a diagonal; S₋ − S₊ of a dense group; float64
            small += 8 * (2 * heads * bucket.width if bucket.group.form == "diagonal" else heads * bucket.width**2)
        rounds = len(list(shards._rounds(list(enumerate(teleporter.plan.buckets)))))
        # the norm, the values before and after
        assert traffic.reduced == small + 3 * 8, (traffic, small)
        assert traffic.reductions == rounds + 3
        parameters = dict(model.named_parameters())
        turned = 0
        for bucket in teleporter.plan.buckets:
            layouts = {name: shards.layout_of(parameters[name]) for name in bucket.parameters()}
            for turn in local_of(bucket, layouts, lambda layout: True).turns:
                local = parameters[turn.parameter].to_local()
                # its gradient for the sums, then it and its gradient there and back
                turned += 5 * local.numel() * local.element_size()
        assert traffic.turned == turned and (turned > 0) is turns
        teleporter.detach()


@on(2)
def a_step_that_does_not_fire_sends_nothing() -> None:
    model = stand.built("gpt")
    sharded(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    tf.attach(optimizer, stand.symmetries_of("gpt", model), schedule=tf.Every(100))
    with counted() as traffic:
        one_step(model, optimizer)
    assert traffic.reductions == traffic.turns == 0


@on(2)
def a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all() -> None:
    model = stand.built("gpt")
    sharded(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    teleporter = tf.attach(optimizer, stand.symmetries_of("gpt", model), schedule=tf.At(0, 1))
    before = stand.weights(model)
    tokens, targets = next(stand.batches("gpt", 1, 2))
    stand.loss_of(model, tokens, targets).backward()
    name, parameter = next((n, p) for n, p in model.named_parameters() if "mlp.up" in n)
    if dist.get_rank() == 1:
        parameter.grad.to_local()[0, 0] = float("inf")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert any(name in str(w.message) and "skipped" in str(w.message) for w in caught), [str(w.message) for w in caught]
    assert stand.far(before, stand.weights(model)) == 0 and not teleporter.history and not optimizer.state
    optimizer.zero_grad()
    one_step(model, optimizer)
    assert teleporter.step_count == 1 and teleporter.history


@on(2)
def a_scalers_verdict_of_one_rank_holds_on_all() -> None:
    for fused in (False, True):
        model = stand.built("gpt").float()
        sharded(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
        teleporter = tf.attach(optimizer, stand.symmetries_of("gpt", model), schedule=tf.At(0, 1))
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for overflows in (True, False):
            before = stand.weights(model)
            tokens, targets = next(stand.batches("gpt", 1, 2))
            scaler.scale(stand.loss_of(model, tokens, targets)).backward()
            if overflows and dist.get_rank() == 1:
                next(p for n, p in model.named_parameters() if "mlp.up" in n).grad.to_local()[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            moved = stand.far(before, stand.weights(model))
            assert (moved == 0) is overflows, (fused, overflows, moved)
            assert (len(teleporter.history) == 0) is overflows and teleporter.step_count == (0 if overflows else 1)


@on(2)
def a_schedule_that_reads_a_clock_goes_by_the_first_ranks() -> None:
    rank = dist.get_rank()
    model = stand.built("gpt")
    sharded(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    schedule = tf.When(lambda info: (info.step + rank) % 3 == 0)
    teleporter = tf.attach(optimizer, stand.symmetries_of("gpt", model), schedule=schedule)
    for _ in range(5):
        one_step(model, optimizer)
    assert [record.step for record in teleporter.history] == [0, 3]
    plateau = tf.attach(optimizer, stand.symmetries_of("gpt", model), schedule=tf.Plateau(patience=1, threshold=0.9))
    for _ in range(3):
        one_step(model, optimizer)
    steps: list[Any] = [None, None]
    dist.all_gather_object(steps, [record.step for record in plateau.history])
    assert steps[0] and steps[0] == steps[1]


@on(2)
def averages_whole_or_sharded_move_with_the_weights() -> None:
    model = stand.built("gpt")
    whole = copy.deepcopy(model)
    sharded(model)
    parts = stand.built("gpt")
    sharded(parts)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-13)
    teleporter = tf.attach(optimizer, stand.symmetries_of("gpt", model), schedule=tf.At(0))
    teleporter.track(whole)
    teleporter.track(parts)
    before = stand.weights(model)
    one_step(model, optimizer)
    assert stand.far(before, stand.weights(model)) > 1e-3
    assert stand.far(stand.weights(whole), stand.weights(model)) < 1e-9
    assert stand.far(stand.weights(parts), stand.weights(model)) < 1e-9


@on(2)
def attach_may_come_before_sharding_and_joints_from_a_meta_model() -> None:
    results = []
    for order in ("plain", "before", "meta"):
        model = stand.built("gpt")
        symmetries = stand.symmetries_of("gpt", model)
        if order == "meta":
            with torch.device("meta"):
                hollow = tf.experiments.gpt.GPT(stand.KINDS["gpt"])
            symmetries = tf.find_symmetries(hollow)
        if order != "plain":
            optimizer = torch.optim.SGD(model.named_parameters(), lr=1e-2)
            if order == "before":
                teleporter = tf.attach(optimizer, symmetries, schedule=tf.At(0, 1))
            sharded(model)
            replacements = dict(model.named_parameters())
            for group in optimizer.param_groups:  # what accelerate does with an optimizer that was made before
                group["params"] = [replacements[name] for name in group["param_names"]]
            if order == "meta":
                teleporter = tf.attach(optimizer, symmetries, schedule=tf.At(0, 1))
        else:
            optimizer = torch.optim.SGD(model.named_parameters(), lr=1e-2)
            teleporter = tf.attach(optimizer, symmetries, schedule=tf.At(0, 1))
        one_step(model, optimizer)
        one_step(model, optimizer)
        assert len(teleporter.history) == 2, order
        results.append(stand.weights(model))
    assert stand.far(results[0], results[1]) < 1e-9 and stand.far(results[0], results[2]) < 1e-9


@on(2)
def what_a_layout_makes_impossible_is_refused_with_the_reason() -> None:
    model = stand.built("gpt")
    sharded(model)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=1e-3)
    teleporter = tf.attach(optimizer, stand.symmetries_of("gpt", model), objective="grad_l1", schedule=tf.At(0))
    reason = teleporter.plan.left_out["blocks.0.attention.value-output"]
    assert ("line search" in reason and "Shard" in reason and "leave the joint out" in reason) or "S(0)" in reason, reason

    class Own(tf.objectives.GradNorm):
        def element(self, index: int, bucket: Any, move: Any) -> Any:
            return super().element(index, bucket, move)

        decide = tf.objectives.Objective.decide

    try:
        tf.attach(optimizer, stand.symmetries_of("gpt", model), objective=Own())
    except ValueError as error:
        assert "override reads and decide" in str(error)
    else:
        raise AssertionError("an objective of whole tensors was let in")

