"""Rows of the support matrix: parameter groups, copies, checkpoints."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import teleport_fast as tf

Close = Callable[..., bool]
Saved = Callable[..., list[Any]]
LATE = "ignore:teleport_fast. parameter .* (has no gradient|is no longer in the optimizer):RuntimeWarning"


def in_groups(model: nn.Module, *extra: dict[str, Any]) -> list[dict[str, Any]]:
    """One group per layer, with what is given for it."""
    named = [*model.named_parameters()]
    options = [*extra, *({} for _ in named[len(extra) :])]
    return [{"params": [pair], **more} for pair, more in zip(named, options, strict=True)]


@pytest.mark.support("parameter groups with their own rates and decay")
def test_groups_keep_their_rates_and_decay(arm: Any) -> None:
    """The function holds at a teleport across groups; a group at rate 0 moves by the teleport alone."""
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4))).double()
    params = in_groups(model, {"lr": 0.0, "weight_decay": 0.0}, {"weight_decay": 0.1})
    run = arm.run(model=model, params=params)
    moved, start = run.moved_outputs(), run.weights()
    run.train(2)
    assert torch.equal(run.weights()[0], start[0])
    assert not any(map(torch.equal, run.weights()[1:], start[1:]))
    run.train(3, first=2)
    assert torch.equal(run.weights()[0], start[0]) != arm.teleports
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.0, *[arm.options["lr"]] * 3]
    assert all(change < 1e-12 for change in moved)


def torch_steps_an_added_group() -> bool:
    """Whether plain Adagrad does: up to torch 2.11 it makes its state when it is built, and only then."""
    first, second = (nn.Parameter(torch.ones(2)) for _ in range(2))
    plain = torch.optim.Adagrad([first])
    plain.add_param_group({"params": [second]})
    second.grad = torch.ones(2)
    try:
        plain.step()
    except KeyError:
        return False
    return True


@pytest.mark.support("add_param_group")
def test_a_group_that_is_added_is_stepped_and_the_others_go_on(arm: Any, close: Close) -> None:
    if arm.name == "Adagrad" and not torch_steps_an_added_group():
        pytest.skip(f"torch {torch.__version__}'s own Adagrad raises KeyError at a group that is added")
    run, other = arm.run(), arm.run().train(6)
    extra = nn.Parameter(torch.ones(3, 3, dtype=torch.float64))
    run.train(3)
    run.optimizer.add_param_group({"params": [("extra", extra)]})
    for step in range(3, 6):
        run.backward(step)
        extra.grad = torch.ones_like(extra)
        run.optimizer.step()
    assert close(run.weights(), other.weights(), rtol=1e-12)
    assert float(extra.max()) < 1
    assert run.engine is None or run.engine.step_count == 6


@pytest.mark.support("groups reordered after attach")
def test_groups_in_another_order_step_as_before(arm: Any, close: Close) -> None:
    runs = []
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4))).double()
        run = arm.run(model=model, params=in_groups(model)).train(3)
        groups = run.optimizer.param_groups
        groups[:] = [groups[i] for i in order]
        runs.append(run.train(4, first=3))
    assert close(runs[0].everything(), runs[1].everything(), rtol=1e-10)
    assert runs[0].engine is None or [r.engine.step_count for r in runs] == [7, 7]
    assert runs[0].engine is None or runs[0].teleports == runs[1].teleports == [2, 4, 6]


@pytest.mark.support("groups removed after attach, and back")
@pytest.mark.filterwarnings(LATE)
def test_a_group_that_is_removed_stays_and_its_joint_waits(arm: Any) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4))).double()
    run = arm.run(model=model, params=in_groups(model)).train(3)
    moved, before = run.moved_outputs(), run.weights()
    gone = run.optimizer.param_groups.pop(0)
    run.train(2, first=3)
    assert torch.equal(run.weights()[0], before[0])
    assert not any(map(torch.equal, run.weights()[1:], before[1:]))
    run.optimizer.param_groups.append(gone)
    run.train(3, first=5)
    assert not torch.equal(run.weights()[0], before[0])
    assert all(change < 1e-12 for change in moved)
    if run.engine is not None:
        assert [(r.step, r.joints) for r in run.engine.history] == [(2, 2), (4, 1), (6, 2)]
        assert run.engine.step_count == 8


@pytest.mark.support("frozen and late-unfrozen parameters")
@pytest.mark.filterwarnings(LATE)
def test_a_frozen_parameter_stays_and_moves_once_it_is_unfrozen(arm: Any) -> None:
    run = arm.run()
    frozen, start, moved = run.model[0].weight.requires_grad_(False), run.weights(), run.moved_outputs()
    run.train(5)
    assert torch.equal(frozen, start[0])
    frozen.requires_grad_(True)
    run.train(4, first=5)
    assert not torch.equal(frozen, start[0])
    assert all(change < 1e-12 for change in moved)
    assert run.engine is None or [(r.step, r.joints) for r in run.engine.history] == [(2, 1), (4, 1), (6, 2), (8, 2)]


@pytest.fixture(scope="module")
def tied() -> tuple[nn.Module, tf.Symmetries]:
    """Layers 0 and 3 share a weight; layers 1 and 2 have the space between them to themselves."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4))).double()
    model[3].weight = model[0].weight
    return model, tf.find_symmetries(model, example_inputs=(torch.randn(3, 4, dtype=torch.float64),))


@pytest.mark.support("tied weights")
def test_tied_weights_stay_one_and_teleports_keep_the_function(arm: Any, tied: tuple[nn.Module, tf.Symmetries]) -> None:
    model: Any = copy.deepcopy(tied[0])
    assert model[3].weight is model[0].weight and len(tied[1]) >= 1
    run = arm.run(model=model, symmetries=tf.Symmetries(tied[1].joints, model=model))
    moved, start = run.moved_outputs(), run.whole_loss()
    run.train(7)
    assert model[3].weight is model[0].weight
    assert run.whole_loss() < start
    assert all(change < 1e-12 for change in moved)
    assert run.engine is None or run.teleports == [2, 4, 6]


@pytest.mark.support("sparse gradients of what moves")
def test_sparse_gradients_are_refused_at_the_first_step(arm: Any) -> None:
    run = arm.run()
    run.backward(0)
    run.model[0].weight.grad = run.model[0].weight.grad.to_sparse()
    before = run.weights()
    with arm.refuses((ValueError, TypeError), r"gradient of '0\.weight' is .*sparse.*; build its module with", "by name"):
        run.optimizer.step()
    assert all(map(torch.equal, run.weights(), before))


@pytest.mark.support("no gradients: nothing moves")
@pytest.mark.filterwarnings("ignore:teleport_fast. no parameter of the joints:RuntimeWarning")
def test_a_step_without_gradients_changes_nothing(arm: Any) -> None:
    run = arm.run()
    before = run.everything()
    for _ in range(4):
        run.optimizer.step()
    after = run.everything()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert run.engine is None or (run.engine.step_count, run.teleports) == (0, [])


@pytest.mark.support("zero gradients: nothing moves")
def test_a_step_with_zero_gradients_and_no_decay_changes_no_weight(arm: Any) -> None:
    run = arm.run(weight_decay=0.0)
    before = run.weights()
    for _ in range(4):
        for parameter in run.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        run.optimizer.step()
    assert all(map(torch.equal, run.weights(), before))
    assert run.engine is None or run.teleports == []


def copied(arm: Any, way: Callable[[Any], Any], close: Close) -> None:
    """A copy has the state and goes on as the plain optimizer; hooks do not go along, in torch."""
    run = arm.run().train(3)
    if arm.name == "tf.optim.AdamW":
        with arm.refuses(TypeError, "cannot be copied or pickled", "a copy would not teleport; load state_dict()"):
            way((run.model, run.optimizer))
        return
    model, optimizer = way((run.model, run.optimizer))
    assert run.engine is None or optimizer.param_groups[0]["teleport_step"] == 3
    if run.engine is not None:
        run.engine.detach()
        arm.note("the copy is plain: attach again")
    run.train(3, first=3)
    start = [p.detach().clone() for p in model.parameters()]
    run.model, run.optimizer = model, optimizer
    mine = [p.detach().clone() for p in run.model.parameters()]
    assert all(map(torch.equal, mine, start))
    other = arm.run().train(3)
    if other.engine is not None:
        other.engine.detach()
    other.train(3, first=3)
    run.train(3, first=3)
    assert all(map(torch.equal, run.weights(), other.weights()))
    if arm.teleports:
        assert tf.attach(optimizer, tf.Symmetries(run.symmetries.joints, model=model)).step_count == 3


@pytest.mark.support("deepcopy")
def test_deepcopy(arm: Any, close: Close) -> None:
    copied(arm, copy.deepcopy, close)


@pytest.mark.support("pickle")
def test_pickle(arm: Any, close: Close) -> None:
    copied(arm, lambda pair: pickle.loads(pickle.dumps(pair)), close)


@pytest.mark.support("state_dict into the plain optimizer and back")
def test_state_goes_to_the_plain_optimizer_and_back(arm: Any, saved: Saved) -> None:
    if not arm.teleports:
        from_plain_to_rotated(arm, saved)
        return
    run = arm.run(schedule=tf.At(2, 6)).train(4)
    plain = arm.run(plain=True)
    weights, state = saved(run.model.state_dict(), run.optimizer.state_dict())
    assert {key for entry in state["state"].values() for key in entry} == {
        key for entry in plain.train(1).optimizer.state_dict()["state"].values() for key in entry
    }
    plain.model.load_state_dict(weights)
    plain.optimizer.load_state_dict(state)
    for each in (run, plain):
        each.train(1, first=4)
    assert all(map(torch.equal, run.weights(), plain.weights()))
    back = arm.run(schedule=tf.At(2, 6))
    weights, state = saved(plain.model.state_dict(), plain.optimizer.state_dict())
    back.model.load_state_dict(weights)
    back.optimizer.load_state_dict(state)
    assert back.engine.step_count == 4  # the plain optimizer carried the count, and did not raise it
    for each in (run, back):
        each.train(1, first=5)
    assert all(map(torch.equal, run.weights(), back.weights()))


def from_plain_to_rotated(arm: Any, saved: Saved) -> None:
    """AdamW's moments are Rotated's in the bases it begins with; its own are in bases that AdamW does not know."""
    arm.note("from AdamW's; its own state is for Rotated only")
    options = {"lr": 5e-3, "betas": (0.9, 0.98), "weight_decay": 0.0}
    run = arm.run(every=100, **options)
    plain = torch.optim.AdamW(run.model.named_parameters(), **options)
    other = copy.deepcopy(run)
    run.optimizer = plain
    run.train(3)
    weights, state = saved(run.model.state_dict(), run.optimizer.state_dict())
    other.model.load_state_dict(weights)
    other.optimizer.load_state_dict(state)
    for each in (run, other):
        each.train(2, first=3)
    for one, two in zip(run.weights(), other.weights(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


@pytest.mark.support("resume in mid-schedule bit for bit, `weights_only=True`")
@pytest.mark.parametrize("objective", ["grad_norm", "eigenbasis"])
def test_a_resumed_run_is_the_uninterrupted_one(arm: Any, saved: Saved, objective: str) -> None:
    """Between two teleports or refreshes; without the optimizer's state (the control) the run is another."""
    changes = {"objective": objective, "schedule": tf.Every(3)} if arm.teleports else {"every": 3}

    def start() -> tuple[Any, Any]:
        run = arm.run(**changes)
        return run, torch.optim.lr_scheduler.CosineAnnealingLR(run.optimizer, 12)

    def go(run: Any, scheduler: Any, steps: range) -> None:
        for step in steps:
            run.train(1, first=step)
            scheduler.step()

    run, scheduler = start()
    go(run, scheduler, range(4))
    engine = {} if run.engine is None else run.engine.state_dict()
    states = saved(run.model.state_dict(), run.optimizer.state_dict(), scheduler.state_dict(), engine)
    go(run, scheduler, range(4, 9))
    outcome = []
    for whole in (True, False):
        second, rates = start()
        second.model.load_state_dict(states[0])
        if whole:
            second.optimizer.load_state_dict(states[1])
            rates.load_state_dict(states[2])
            if second.engine is not None:
                second.engine.load_state_dict(states[3])
        go(second, rates, range(4, 9))
        outcome.append(all(map(torch.equal, run.weights(), second.weights())))
    assert outcome == [True, False]


@pytest.mark.support("deterministic state_dict")
def test_two_optimizers_of_one_state_dict_take_the_same_steps(arm: Any, saved: Saved) -> None:
    run = arm.run().train(5)
    (weights, state), twins = saved(run.model.state_dict(), run.optimizer.state_dict()), [arm.run(), arm.run()]
    for twin in twins:
        twin.model.load_state_dict(weights)
        twin.optimizer.load_state_dict(copy.deepcopy(state))
        twin.train(3, first=5)
    assert all(map(torch.equal, twins[0].weights(), twins[1].weights()))
    one, two = (twin.optimizer.state_dict() for twin in twins)
    assert one["param_groups"] == two["param_groups"]
    flat = [[(n, k, v) for n, entry in s["state"].items() for k, v in entry.items()] for s in (one, two)]
    for (n, k, v), (m, j, w) in zip(*flat, strict=True):
        assert (n, k) == (m, j) and (torch.equal(v, w) if isinstance(v, Tensor) else v == w)


@pytest.mark.support("distributed checkpoint's state_dict on one rank")
def test_torchs_distributed_state_dict_round_trips(arm: Any, close: Close) -> None:
    """Its initialising step (zero gradients, rate 0) moves nothing, counts nothing and draws nothing."""
    run, second = arm.run(weight_decay=0.0).train(4), arm.run(weight_decay=0.0)
    second.model.load_state_dict(run.model.state_dict())
    second.optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        get_optimizer_state_dict(second.model, second.optimizer)
    assert all(map(torch.equal, run.weights(), second.weights()))
    assert second.engine is None or (second.engine.step_count, second.teleports) == (0, [])
    # torch hands out and takes in the tensors themselves
    state = copy.deepcopy(get_optimizer_state_dict(run.model, run.optimizer))
    set_optimizer_state_dict(second.model, second.optimizer, state)
    assert second.engine is None or second.engine.step_count == 4
    for each in (run, second):
        each.train(3, first=4)
    assert all(map(torch.equal, run.weights(), second.weights()))
