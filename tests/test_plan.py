"""A plan finds parameters in the optimizer by name or identity, holds no tensor, and says what it leaves out."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import teleport_fast as tf
from teleport_fast import objectives
from teleport_fast.plan import Plan
from teleport_fast.symmetry import GeneralLinear, Permutation


def chain(layers: int = 3) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(layers)))


def joint(name: str, first: str, second: str, group: tf.symmetry.Group | None = None) -> tf.Joint:
    views = tf.View(first, 0, 1, 4), tf.View(second, 1, 1, 4)
    return tf.Joint(name, "test", group or GeneralLinear(4), 1, 4, (views[0],), (views[1],))


def two_joints(model: nn.Module) -> tf.Symmetries:
    return tf.Symmetries((joint("a", "0.weight", "1.weight"), joint("b", "1.weight", "2.weight")), model=model)


def test_parameters_are_found_by_identity_whatever_the_order_of_the_groups() -> None:
    model = chain()
    weights = dict(model.named_parameters())
    groups = [{"params": [weights["2.weight"]]}, {"params": [weights["1.weight"], weights["0.weight"]]}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    plan = Plan(two_joints(model), optimizer, objectives.GradNorm())
    assert plan.slots == {"0.weight": (1, 1), "1.weight": (1, 0), "2.weight": (0, 0)}
    found = plan.parameters(optimizer)
    assert all(found[name] is weights[name] for name in weights)


def test_parameters_of_another_copy_of_the_model_are_found_by_the_optimizers_names() -> None:
    model = chain()
    other = copy.deepcopy(model)
    plan = Plan(two_joints(model), torch.optim.SGD(other.named_parameters(), lr=0.1), objectives.GradNorm())
    assert plan.slots.keys() == {"0.weight", "1.weight", "2.weight"}
    with pytest.raises(ValueError, match=r"parameter '0\.weight' of joint 'a' is not in the optimizer"):
        Plan(two_joints(model), torch.optim.SGD(other.parameters(), lr=0.1), objectives.GradNorm())


def test_a_parameter_object_that_was_replaced_in_its_group_is_the_one_that_moves() -> None:
    model = chain()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    plan = Plan(two_joints(model), optimizer, objectives.GradNorm())
    replacement = nn.Parameter(torch.zeros(4, 4))
    optimizer.param_groups[0]["params"][1] = replacement
    assert plan.parameters(optimizer)["1.weight"] is replacement


def test_groups_that_are_added_later_do_not_move_the_positions() -> None:
    model, extra = chain(), nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = Plan(two_joints(model), optimizer, objectives.GradNorm())
    optimizer.add_param_group({"params": [extra]})
    assert plan.parameters(optimizer)["2.weight"] is model[2].weight


def test_a_plan_holds_names_and_no_tensor() -> None:
    model = chain()
    plan = Plan(two_joints(model), torch.optim.SGD(model.parameters(), lr=0.1), objectives.GradNorm())
    assert b"torch._utils" not in pickle.dumps(plan)
    assert b"torch._utils" in pickle.dumps((plan, model[0].weight))


def test_a_bucket_serves_only_when_all_of_its_parameters_are_there() -> None:
    model = chain()
    plan = Plan(two_joints(model), torch.optim.SGD(model.parameters(), lr=0.1), objectives.GradNorm())
    assert [bucket.joints[0].name for _, bucket in plan.serving({"0.weight", "1.weight", "2.weight"})] == ["a", "b"]
    assert [(i, bucket.joints[0].name) for i, bucket in plan.serving({"1.weight", "2.weight"})] == [(1, "b")]
    assert plan.serving({"1.weight"}) == []


def test_joints_that_do_not_suit_the_objective_are_left_out_with_the_reason() -> None:
    model = chain()
    symmetries = tf.Symmetries(
        (joint("a", "0.weight", "1.weight"), joint("p", "1.weight", "2.weight", Permutation(4))), model=model
    )
    plan = Plan(symmetries, torch.optim.SGD(model.parameters(), lr=0.1), objectives.GradNorm())
    assert plan.left_out == {"p": "permutation(4) leaves the gradient norm as it is"}
    assert [name for bucket in plan.buckets for name in bucket.parameters()] == ["0.weight", "1.weight"]


def test_a_parameter_that_only_left_out_joints_name_need_not_be_in_the_optimizer() -> None:
    model = chain()
    symmetries = tf.Symmetries(
        (joint("a", "0.weight", "1.weight"), joint("p", "1.weight", "2.weight", Permutation(4))), model=model
    )
    optimizer = torch.optim.SGD([model.get_parameter("0.weight"), model.get_parameter("1.weight")], lr=0.1)
    assert Plan(symmetries, optimizer, objectives.GradNorm()).slots.keys() == {"0.weight", "1.weight"}


def test_gradients_are_named_for_the_joints_and_placed_for_the_rest() -> None:
    model, extra = chain(), nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([{"params": list(model.parameters())}, {"params": [extra]}], lr=0.1)
    plan = Plan(two_joints(model), optimizer, objectives.GradNorm())
    for parameter in (model.get_parameter("0.weight"), model.get_parameter("2.weight"), extra):
        parameter.grad = torch.ones_like(parameter)
    found = plan.gradients(optimizer)
    assert found.keys() == {"0.weight", "2.weight", "param_groups[1]['params'][0]"}
    assert found["2.weight"] is model[2].weight.grad


def test_tied_weights_have_one_slot() -> None:
    model = chain(2)
    model.append(nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    symmetries = tf.Symmetries((joint("a", "0.weight", "1.weight"),), model=model)
    plan = Plan(symmetries, torch.optim.SGD(model.parameters(), lr=0.1), objectives.GradNorm())
    assert plan.slots == {"0.weight": (0, 0), "1.weight": (0, 1)}


def grouped(model: nn.Sequential, named: bool) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        [{"params": [(n, p) if named else p]} for n, p in [*model.named_parameters(), ("extra", nn.Parameter(torch.ones(3)))]],
        lr=0.1,
    )


@pytest.mark.parametrize("named", [True, False])
def test_groups_that_are_reordered_or_removed_after_attach_are_found_again(named: bool) -> None:
    model = chain()
    optimizer = grouped(model, named)
    plan = Plan(two_joints(model), optimizer, objectives.GradNorm())
    first, second, third, extra = optimizer.param_groups
    for order in ([third, extra, first, second], [first, second, third], [second, third, first, extra]):
        optimizer.param_groups[:] = order
        found = plan.parameters(optimizer)
        assert all(found[name] is parameter for name, parameter in model.named_parameters())
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        assert all(plan.gradients(optimizer)[name] is p.grad for name, p in model.named_parameters())


def test_a_joint_waits_while_its_parameter_is_not_in_the_optimizer() -> None:
    model = chain()
    optimizer = grouped(model, named=False)
    plan = Plan(two_joints(model), optimizer, objectives.GradNorm())
    first = optimizer.param_groups.pop(0)
    found = plan.parameters(optimizer)
    assert found.keys() == {"1.weight", "2.weight"}
    assert [bucket.joints[0].name for _, bucket in plan.serving(set(found))] == ["b"]
    assert plan.missing(found, found) == (
        "parameter '0.weight' is no longer in the optimizer: joints that need it are not teleported"
    )
    optimizer.param_groups.append(first)
    assert plan.parameters(optimizer)["0.weight"] is model[0].weight


@pytest.mark.parametrize("named", [True, False])
def test_parameters_that_are_swapped_twice_are_found_by_name_or_place(named: bool) -> None:
    """As a wrapper does that shards: first all go, then other objects come."""
    model = chain()
    optimizer = grouped(model, named)
    plan = Plan(two_joints(model), optimizer, objectives.GradNorm())
    for _ in range(2):
        fresh = [nn.Parameter(torch.zeros(4, 4)) for _ in range(3)]
        for group, parameter in zip(optimizer.param_groups, fresh, strict=False):
            group["params"] = [parameter]
        found = plan.parameters(optimizer)
        assert all(found[f"{i}.weight"] is fresh[i] for i in range(3))


def test_a_parameter_of_another_joint_is_not_taken_for_a_replacement() -> None:
    """The place of a removed group is filled by its neighbour: the neighbour is not the one that left."""
    model = chain()
    optimizer = grouped(model, named=False)
    plan = Plan(two_joints(model), optimizer, objectives.GradNorm())
    del optimizer.param_groups[1]
    found = plan.parameters(optimizer)
    assert found.keys() == {"0.weight", "2.weight"}
    assert found["2.weight"] is model[2].weight
