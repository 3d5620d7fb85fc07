"""Hostile numbers: ill-conditioned Grams, denormals, gradients of 1e±30, h = 1, empty tensors. A finite result, or a refusal that
names the joint."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import teleport_fast as tf
from teleport_fast.soundness import refusal, usual_bound
from teleport_fast.symmetry import Diagonal, GeneralLinear
from teleport_fast.symmetry.bucket import Bucket, Element
from teleport_fast.symmetry.groups import Group

WIDTHS = (1, 4)
OBJECTIVES = ("grad_norm", "grad_l1", "balance", "eigenbasis", "scaled", "random", "ratio")


def joint(i: int, group: Group) -> tf.Joint:
    width = group.width
    views = (tf.View(f"{i}.weight", 0, 1, width),), (tf.View(f"{i + 1}.weight", 1, 1, width),)
    return tf.Joint(f"joint {i}", f"{i}", group, 1, width, *views)


def chain(width: int, outer: int = 3) -> tuple[nn.Sequential, tf.Symmetries]:
    torch.manual_seed(0)
    sizes = ((outer, width), (width, outer), (outer or 3, width), (width, outer or 3))
    model = nn.Sequential(*(nn.Linear(*size, bias=False) for size in sizes))
    return model, tf.Symmetries((joint(0, GeneralLinear(width)), joint(2, Diagonal(width))), model=model)


def rank_one(shape: torch.Size) -> Tensor:
    return torch.outer(torch.arange(1.0, shape[0] + 1), torch.arange(1.0, shape[1] + 1))


GRADIENTS: dict[str, Any] = {
    "zero": torch.zeros,
    "denormal": lambda shape: torch.randn(shape) * 1e-40,
    "1e-30": lambda shape: torch.randn(shape) * 1e-30,
    "1e30": lambda shape: torch.randn(shape) * 1e30,
    "1e30 on one side": lambda shape: torch.randn(shape) * (1e30 if shape[0] > shape[1] else 1e-30),
    "rank one": rank_one,
    "1e19": lambda shape: torch.randn(shape) * 1e19,
}


@pytest.mark.parametrize("numbers", GRADIENTS)
@pytest.mark.parametrize("where", ["gradients", "weights"])
def test_whatever_the_numbers_the_result_is_finite_or_the_joint_is_named(numbers: str, where: str) -> None:
    for objective in OBJECTIVES:
        for width in WIDTHS:
            model, symmetries = chain(width)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter) if where == "weights" else GRADIENTS[numbers](parameter.shape)
                if where == "weights":
                    parameter.data = GRADIENTS[numbers](parameter.shape)
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
            frame = "return" if objective == "scaled" else "stay"
            try:
                teleporter = tf.attach(optimizer, symmetries, objective, tf.Every(1), frame=frame)
            except ValueError as error:  # rotations of width 1
                assert "no joint can serve" in str(error)
                continue
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                for _ in range(2):
                    optimizer.step()
            whole = all(bool(p.isfinite().all()) and p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
            assert whole, f"{objective}, width {width}: {[str(one.message) for one in said]}"
            refused = [str(one.message) for one in said]
            assert all("joint 'joint " in text or "joint 0" in text for text in refused), refused
            assert teleporter.step_count == 2
            assert len(teleporter.history) == 1 or numbers == "zero" or where == "weights"


def test_a_tensor_without_entries_moves_with_its_joint() -> None:
    for objective in ("grad_norm", "balance", "eigenbasis"):
        model, symmetries = chain(4, outer=0)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        teleporter = tf.attach(optimizer, symmetries, objective, tf.Once())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
        assert len(teleporter.history) == 1 and model[0].weight.numel() == 0  # type: ignore[union-attr]


def test_a_descent_stops_at_the_condition_number_that_is_allowed() -> None:
    """An ill-balanced pair: the whole way would take a g of 1e6; as far as the bound allows, the norm still falls."""
    scales = torch.logspace(-6, 6, 4)
    for bound in (10.0, None):
        model, symmetries = chain(4, outer=4)
        with torch.no_grad():
            model[0].weight.copy_(scales.diag())  # type: ignore[union-attr]
            model[1].weight.copy_(scales.reciprocal().diag())  # type: ignore[union-attr]
        product = model[1].weight @ model[0].weight  # type: ignore[union-attr]
        before = model[0].weight.detach().clone()  # type: ignore[union-attr]
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer.param_groups[0]["lr"] = 1e-30
        teleporter = tf.attach(optimizer, symmetries.select("0"), "balance", tf.Once(), max_condition=bound)
        optimizer.step()
        g = model[0].weight.detach() @ torch.linalg.inv(before)  # type: ignore[union-attr]
        condition, allowed = float(torch.linalg.cond(g.double())), bound or usual_bound(torch.float32)
        assert 0.5 * allowed < condition <= 1.01 * allowed
        record = teleporter.history[0]
        assert record.objective_after < record.objective_before
        torch.testing.assert_close(model[1].weight @ model[0].weight, product, rtol=1e-2, atol=1e-2)  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:teleport_fast. no parameter:RuntimeWarning")
def test_an_element_beyond_the_bound_is_refused_by_the_joint_s_name() -> None:
    model, symmetries = chain(4, outer=4)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
    steep = torch.tensor([1e3, 1.0, 1.0, 1e-3]).diag()
    options: dict[str, Any] = {"objective": tf.objectives.Fixed({"joint 0": steep}), "schedule": tf.Once()}
    tf.attach(optimizer, symmetries, **options)
    message = r"joint 'joint 0': the search gave an element of condition number 1e\+06, max_condition is 2.9e\+03, the joint stays"
    with pytest.warns(RuntimeWarning, match=message):
        optimizer.step()
    assert all(torch.equal(parameter, weight) for parameter, weight in zip(model.parameters(), before, strict=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
    tf.attach(optimizer, symmetries, max_condition=1e7, **options)
    optimizer.step()
    assert not torch.equal(model[0].weight, before[0])


def test_the_refusal_names_the_joint_that_is_wrong_and_passes_what_is_sound() -> None:
    joints = tuple(tf.Joint(name, "kind", GeneralLinear(2), 2, 2, (tf.View(name, 0, 2, 2),), ()) for name in ("first", "second"))
    bucket, g = Bucket(joints), torch.eye(2).repeat(4, 1, 1)
    for head, name in ((1, "first"), (2, "second")):
        wrong, steep = g.clone(), g.clone()
        wrong[head, 0, 0], steep[head, 0, 0] = math.nan, 100.0
        text = refusal(bucket, Element("dense", wrong, g.clone()), 10.0)
        assert text == f"joint {name!r}: the search gave a non-finite element"
        text = refusal(bucket, Element("dense", steep, torch.linalg.inv(steep).mT), 10.0)
        assert text is not None and text.startswith(f"joint {name!r}: the search gave an element of condition number 1e+02")
    assert refusal(bucket, Element("dense", g, g.clone()), 10.0) is None
    assert refusal(bucket, Element("dense", steep, steep), 10.0) is None  # given as a rotation: its own inverse transpose
    text = refusal(bucket, Element("diagonal", torch.tensor([[1.0, 1.0]] * 3 + [[0.0, 1.0]])), 10.0)
    assert text == "joint 'second': the search gave a non-finite element"


@pytest.mark.filterwarnings("ignore:teleport_fast. joint:RuntimeWarning")
def test_a_search_that_does_not_converge_leaves_its_joint(monkeypatch: pytest.MonkeyPatch) -> None:
    model, symmetries = chain(4, outer=4)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
    teleporter = tf.attach(optimizer, symmetries, "balance", tf.Once())

    def fails(*_: object, **__: object) -> Tensor:
        raise torch.linalg.LinAlgError("linalg.svd: did not converge")

    monkeypatch.setattr(torch.linalg, "svd", fails)
    with pytest.warns(RuntimeWarning, match=r"joint 'joint 0' or one searched with it: the search failed \(linalg.svd: did not converge"):
        optimizer.step()
    assert torch.equal(model[0].weight, before[0])
    assert not torch.equal(model[2].weight, before[2])
    assert [record.joints for record in teleporter.history] == [1]
