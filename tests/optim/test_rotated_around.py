"""Around Rotated's step: checkpoints, copies, schedulers, closures, groups, and gradients that are missing or bad."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import teleport_fast as tf
from teleport_fast.experiments.gpt import GPT
from teleport_fast.optim import Rotated
from teleport_fast.optim import refresh as module
from teleport_fast.optim.bases import next_basis

Same = Callable[[nn.Module, nn.Module], bool]


def saved(*states: Any) -> list[Any]:
    """Through a file and back, as `torch.load` allows it by default."""
    buffer = io.BytesIO()
    torch.save(list(states), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def flat(state: Any) -> list[Tensor]:
    """All tensors of a state, in order."""
    if isinstance(state, Tensor):
        return [state]
    return [t for key in state for t in flat(state[key])] if isinstance(state, dict) else []


@pytest.mark.parametrize("stream", ["matrix", "site", "model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_state", [True, False])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    gpt: GPT,
    symmetries: tf.Symmetries,
    train: Callable[..., None],
    same: Same,
    stream: str,
    dtype: torch.dtype,
    with_state: bool,
) -> None:
    """Interrupted between two refreshes; without the state (the control) it goes on differently."""
    gpt.to(dtype)
    resumed = copy.deepcopy(gpt)
    options: dict[str, Any] = {"symmetries": symmetries, "stream": stream, "hidden": True, "table_lr": 0.01}
    optimizer = Rotated(gpt.named_parameters(), **options)
    train(gpt, optimizer, 4)
    weights, state = saved(gpt.state_dict(), optimizer.state_dict())
    train(gpt, optimizer, 5, first=4)
    second = Rotated(resumed.named_parameters(), **options)
    resumed.load_state_dict(weights)
    if with_state:
        second.load_state_dict(state)
    train(resumed, second, 5, first=4)
    assert same(gpt, resumed) == with_state
    if with_state:
        for one, two in zip(flat(optimizer.state_dict()["state"]), flat(second.state_dict()["state"]), strict=True):
            assert torch.equal(one, two) and one.dtype == two.dtype
    moment = second.state[resumed.blocks[0].mlp.up.weight]["exp_avg"]
    assert moment.dtype == torch.float32


def test_where_cholesky_fails_the_next_refresh_is_householders_also_after_a_resume(
    gpt: GPT, symmetries: tf.Symmetries, train: Callable[..., None], same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As off the CPU: the flag of a failed factor is read at the next refresh, from the state where a run was resumed."""
    monkeypatch.setattr(module, "HOUSEHOLDER", ())
    asked: list[bool] = []

    def failing(covariance: Tensor, basis: Tensor, by_householder: bool) -> tuple[Tensor, Tensor]:
        asked.append(by_householder)
        found, ill = next_basis(covariance, basis, by_householder)
        return (found, ill) if by_householder else (basis.clone(), torch.ones_like(ill))

    monkeypatch.setattr(module, "next_basis", failing)
    resumed = copy.deepcopy(gpt)
    optimizer = Rotated(gpt.named_parameters(), symmetries=symmetries, heads=False, every=1)
    train(gpt, optimizer, 1)
    assert set(asked) == {True}
    asked.clear()
    train(gpt, optimizer, 1, first=1)
    assert set(asked) == {False}
    assert bool(optimizer.state[gpt.blocks[0].mlp.up.weight]["columns_ill"])
    weights, state = saved(gpt.state_dict(), optimizer.state_dict())
    second = Rotated(resumed.named_parameters(), symmetries=symmetries, heads=False, every=1)
    resumed.load_state_dict(weights)
    second.load_state_dict(state)
    for model, each in ((gpt, optimizer), (resumed, second)):
        asked.clear()
        train(model, each, 1, first=2)
        assert set(asked) == {True}
    assert same(gpt, resumed)


def test_a_state_of_other_bases_is_refused(gpt: GPT, symmetries: tf.Symmetries, train: Callable[..., None]) -> None:
    optimizer = Rotated(gpt.named_parameters(), symmetries=symmetries)
    train(gpt, optimizer, 1)
    whole = Rotated(gpt.named_parameters())
    train(gpt, whole, 1)
    before = copy.deepcopy(whole.state_dict())
    with pytest.raises(
        ValueError, match=r"'rows_basis' of 'blocks.0.attention.q.weight' is \(2, 4, 4\) and .* \(1, 8, 8\)"
    ):
        whole.load_state_dict(optimizer.state_dict())
    assert all(map(torch.equal, flat(whole.state_dict()["state"]), flat(before["state"])))


def test_a_distributed_checkpoint_goes_through_a_step_without_gradients_and_resumes(
    gpt: GPT, symmetries: tf.Symmetries, train: Callable[..., None], same: Same
) -> None:
    """torch's state_dict helpers step with zero gradients and rate 0 to make the state: no weight may move."""
    resumed = copy.deepcopy(gpt)
    optimizer = Rotated(gpt.named_parameters(), symmetries=symmetries, weight_decay=0.1)
    train(gpt, optimizer, 4)
    resumed.load_state_dict(gpt.state_dict())
    second = Rotated(resumed.named_parameters(), symmetries=symmetries, weight_decay=0.1)
    resumed.zero_grad()
    get_optimizer_state_dict(resumed, second)
    assert same(gpt, resumed)
    set_optimizer_state_dict(resumed, second, get_optimizer_state_dict(gpt, optimizer))
    for model, each in ((gpt, optimizer), (resumed, second)):
        train(model, each, 3, first=4)
    assert same(gpt, resumed)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_go_on_alike(
    gpt: GPT, symmetries: tf.Symmetries, train: Callable[..., None], same: Same, way: str
) -> None:
    optimizer = Rotated(gpt.named_parameters(), symmetries=symmetries, table_lr=0.01)
    train(gpt, optimizer, 4)
    both = (gpt, optimizer)
    other, twin = copy.deepcopy(both) if way == "deepcopy" else pickle.loads(pickle.dumps(both))
    table = optimizer.table()
    train(gpt, optimizer, 3, first=4)
    assert twin.table() == table
    assert not same(gpt, other)
    train(other, twin, 3, first=4)
    assert same(gpt, other)


def test_schedulers_set_the_rate_of_both_groups(
    gpt: GPT, symmetries: tf.Symmetries, train: Callable[..., None]
) -> None:
    """After the scheduler has brought every rate to zero nothing moves, and before it did everything moved."""
    optimizer = Rotated(gpt.named_parameters(), symmetries=symmetries, lr=0.01, table_lr=0.02)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / 2))
    assert isinstance(optimizer, torch.optim.Optimizer)
    for step, rates in enumerate(([0.01, 0.02], [0.005, 0.01], [0.0, 0.0])):
        assert [group["lr"] for group in optimizer.param_groups] == rates
        before = copy.deepcopy(gpt)
        train(gpt, optimizer, 1, first=step)
        moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), gpt.parameters(), strict=True)]
        assert all(moved) if rates[0] else not any(moved)
        scheduler.step()


def test_a_closure_runs_once_with_gradients(gpt: GPT, loss_of: Callable[..., Tensor]) -> None:
    optimizer, calls = Rotated(gpt.named_parameters()), []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(gpt, 0)
        loss.backward()
        calls.append(loss)
        return loss

    before = gpt.head.weight.detach().clone()
    assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1
    assert not torch.equal(gpt.head.weight, before)


def test_frozen_parameters_and_missing_gradients_stay(
    gpt: GPT, symmetries: tf.Symmetries, loss_of: Callable[..., Tensor]
) -> None:
    """The first of a site is frozen, and the basis that it would keep turns for the others all the same."""
    q, k, v = (getattr(gpt.blocks[0].attention, name).weight for name in "qkv")
    q.requires_grad_(False)
    optimizer = Rotated(gpt.named_parameters(), symmetries=symmetries, stream="site", every=1)
    before = [p.detach().clone() for p in (q, k, v)]
    for step in range(3):
        optimizer.zero_grad()
        loss_of(gpt, step).backward()
        if step == 1:
            k.grad = None
        optimizer.step()
    assert torch.equal(q, before[0]) and not torch.equal(k, before[1])
    assert "exp_avg" not in optimizer.state[q]
    assert float((optimizer.state[q]["columns_basis"][0] - torch.eye(8)).abs().max()) > 0.01
    assert [float(optimizer.state[p]["step"]) for p in (k, v)] == [2, 3]


def test_moments_without_a_gradient_turn_along_with_a_shared_basis(
    gpt: GPT, symmetries: tf.Symmetries, train: Callable[..., None], loss_of: Callable[..., Tensor]
) -> None:
    """Brought back to the weights' coordinates the moment is the same; left in the old basis (the control) it is not."""
    q, k = gpt.blocks[0].attention.q.weight, gpt.blocks[0].attention.k.weight
    optimizer = Rotated(gpt.named_parameters(), symmetries=symmetries, stream="site", heads=False, every=1)
    train(gpt, optimizer, 3)
    bases, moments = [], []
    for step in (3, 4):
        bases.append(optimizer.state[q]["columns_basis"][0].clone())
        moments.append(optimizer.state[k]["exp_avg"].clone())
        optimizer.zero_grad()
        loss_of(gpt, step).backward()
        k.grad = None
        optimizer.step()
    torch.testing.assert_close(moments[1] @ bases[1], moments[0] @ bases[0], rtol=1e-10, atol=1e-14)
    stale = (moments[0] @ bases[1] - moments[0] @ bases[0]).norm() / moments[0].norm()
    assert float(stale) > 0.01


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["blocks.1.mlp.up.weight", "head.weight"])
def test_a_step_with_a_non_finite_gradient_leaves_every_bit(
    gpt: GPT,
    symmetries: tf.Symmetries,
    train: Callable[..., None],
    loss_of: Callable[..., Tensor],
    same: Same,
    value: float,
    where: str,
) -> None:
    optimizer = Rotated(gpt.named_parameters(), symmetries=symmetries, every=1)
    train(gpt, optimizer, 2)
    before, state = copy.deepcopy(gpt), copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    loss_of(gpt, 2).backward()
    gradient = gpt.get_parameter(where).grad
    assert gradient is not None
    gradient[0, 1] = value
    with pytest.warns(
        RuntimeWarning, match=f"gradient of '{re.escape(where)}' is not finite: this optimizer step is skipped"
    ):
        optimizer.step()
    assert same(gpt, before)
    after = optimizer.state_dict()
    assert all(map(torch.equal, flat(after["state"]), flat(state["state"])))
    assert after["param_groups"] == state["param_groups"]
    trusting = Rotated(before.named_parameters(), symmetries=symmetries, skip_nonfinite=False)
    for one, two in zip(before.parameters(), gpt.parameters(), strict=True):
        one.grad = two.grad
    trusting.step()
    assert not all(bool(p.isfinite().all()) for p in before.parameters())


def test_a_gradient_scaler_unscales_before_the_step(
    gpt: GPT, symmetries: tf.Symmetries, train: Callable[..., None], loss_of: Callable[..., Tensor]
) -> None:
    other = copy.deepcopy(gpt)
    train(gpt, Rotated(gpt.named_parameters(), symmetries=symmetries), 3)
    optimizer, scaler = (
        Rotated(other.named_parameters(), symmetries=symmetries),
        torch.amp.GradScaler("cpu", init_scale=2.0**10),
    )
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(other, step)).backward()
        scaler.step(optimizer)
        scaler.update()
    for one, two in zip(gpt.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-9)


def test_sparse_gradients_are_refused_by_name() -> None:
    table = nn.Embedding(5, 4, sparse=True)
    optimizer = Rotated(table.named_parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"gradient of 'weight' is sparse, .*; build its module with sparse=False"):
        optimizer.step()


def test_groups_can_be_added_and_left_unturned(gpt: GPT, symmetries: tf.Symmetries, train: Callable[..., None]) -> None:
    named = dict(gpt.named_parameters())
    late = {name: named.pop(name) for name in ("blocks.1.mlp.up.weight", "blocks.1.mlp.down.weight")}
    optimizer = Rotated(named.items(), symmetries=symmetries, lr=0.01)
    train(gpt, optimizer, 2)
    optimizer.add_param_group({"params": list(late.items())[:1], "lr": 0.02, "base": "sign"})
    optimizer.add_param_group({"params": list(late.items())[1:], "rotate": False})
    before = {name: p.detach().clone() for name, p in late.items()}
    train(gpt, optimizer, 3, first=2)
    up, down = late.values()
    assert "columns_basis" in optimizer.state[up] and "exp_avg_sq" not in optimizer.state[up]
    assert set(optimizer.state[down]) == {"step", "exp_avg", "exp_avg_sq"}
    assert all(not torch.equal(p, before[name]) for name, p in late.items())
    assert "its group says rotate=False" in optimizer.table()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0, got -1.0; pass"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"base": "lion"}, "base must be one of adam, sign, row_norm, sinkhorn, got 'lion'"),
        ({"eps": -1e-8}, "eps must be at least 0, got -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"match_rms": 0.0}, "match_rms must be positive or None, got 0.0"),
        ({"table_lr": -0.1}, "table_lr must be at least 0, got -0.1"),
        ({"every": 0}, "every must be an integer of at least 1, got 0"),
        ({"hidden_every": 0}, "hidden_every must be an integer of at least 1, got 0"),
        ({"covariance_parts": 0}, "covariance_parts must be an integer of at least 1, got 0"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        ({"stream": "head"}, "stream must be one of matrix, site, layer, model, none, got 'head'"),
        ({"max_side": -1}, "max_side must be at least 0, got -1"),
        (
            {"basis_dtype": torch.float16},
            "basis_dtype must be None, torch.float32 or torch.bfloat16, got torch.float16",
        ),
        ({"sides": {"*": ("stream", "heads")}}, r"sides\['\*'\] must be two of .*, got \('stream', 'heads'\)"),
        ({"sides": {"*": ("heads:3", "none")}}, "sides of .*: 'heads:3' does not divide its axis of 8"),
        ({"hidden": 1}, "hidden must be True, False or a width of at least 2, got 1"),
        ({"hidden": 64.0}, "hidden must be True, False or a width of at least 2, got 64.0"),
    ],
)
def test_bad_arguments_are_named_with_value_and_remedy(gpt: GPT, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rotated(gpt.blocks.named_parameters(), **changes)


def test_what_is_no_symmetries_is_refused(gpt: GPT) -> None:
    with pytest.raises(TypeError, match=r"symmetries must be a Symmetries, got GPT; pass find_symmetries\(model\)"):
        Rotated(gpt.named_parameters(), symmetries=gpt)  # type: ignore[arg-type]


def test_a_refused_group_leaves_the_optimizer_as_it_was(gpt: GPT) -> None:
    optimizer = Rotated(gpt.blocks.named_parameters())
    with pytest.raises(ValueError, match="lr must be at least 0"):
        optimizer.add_param_group({"params": [("head.weight", gpt.head.weight)], "lr": -1.0})
    assert len(optimizer.param_groups) == 1


def grouped(model: nn.Module, symmetries: tf.Symmetries, stream: str) -> Rotated:
    named = [*model.named_parameters()]
    parts = [named[:3], named[3:8], named[8:]]
    return Rotated([{"params": part} for part in parts], symmetries=symmetries, stream=stream, every=1)


@pytest.mark.parametrize("stream", ["matrix", "model"])
def test_groups_may_be_reordered_and_matrices_keep_their_bases(
    gpt: GPT, symmetries: tf.Symmetries, train: Callable[..., None], same: Same, stream: str
) -> None:
    """The same run as with the groups in place; a run with fresh bases (the control) is another."""
    other, fresh = copy.deepcopy(gpt), copy.deepcopy(gpt)
    optimizers = [grouped(model, symmetries, stream) for model in (gpt, other, fresh)]
    for model, optimizer in zip((gpt, other, fresh), optimizers, strict=True):
        train(model, optimizer, 3)
    table = optimizers[1].table()
    optimizers[1].param_groups.reverse()
    optimizers[2] = grouped(fresh, symmetries, stream)
    for model, optimizer in zip((gpt, other, fresh), optimizers, strict=True):
        train(model, optimizer, 3, first=3)
    for one, two in zip(gpt.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
    assert not same(gpt, fresh)
    assert sorted(optimizers[1].table().splitlines()) == sorted(table.splitlines())


def test_a_group_that_is_removed_stops_and_the_others_go_on(
    gpt: GPT, symmetries: tf.Symmetries, train: Callable[..., None]
) -> None:
    optimizer = grouped(gpt, symmetries, "matrix")
    train(gpt, optimizer, 2)
    gone = optimizer.param_groups.pop(0)["params"]
    still = [p.detach().clone() for p in gone]
    kept = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    rows = [state["rows_basis"].clone() for state in kept if "rows_basis" in state]
    train(gpt, optimizer, 2, first=2)
    assert all(map(torch.equal, gone, still))
    after = [state["rows_basis"] for state in kept if "rows_basis" in state]
    assert len(rows) > 3
    assert all(one.shape == two.shape and not torch.equal(one, two) for one, two in zip(rows, after, strict=True))


def test_a_group_whose_state_holds_a_shared_basis_is_missed(
    gpt: GPT, symmetries: tf.Symmetries, train: Callable[..., None]
) -> None:
    optimizer = grouped(gpt, symmetries, "model")
    train(gpt, optimizer, 2)
    holder = next(p for p, state in optimizer.state.items() if state.get("columns_basis", torch.ones(0)).shape[-1] == 8)
    index = next(g for g, group in enumerate(optimizer.param_groups) if any(p is holder for p in group["params"]))
    del optimizer.param_groups[index]
    with pytest.raises(ValueError, match=r"left the optimizer, and its state holds a basis that .* turns in; keep its group"):
        train(gpt, optimizer, 1, first=2)
