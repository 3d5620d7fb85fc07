"""canonicalize: the function stays, the balanced point is one for the whole orbit, and bad input moves nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import teleport_fast as tf
from teleport_fast.experiments.gpt import GPT, GPTConfig

VARIANTS = {
    "learned": GPTConfig(context=8, d_model=16, layers=2, heads=2),
    "swiglu-layer": GPTConfig(context=8, d_model=16, layers=2, heads=2, gains=True, mlp="swiglu", bias=True, norm="layer"),
    "rotary": GPTConfig(context=8, d_model=16, layers=1, heads=2, kv_heads=1, gains=True, positions="rotary"),
}


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> GPT:
    built = GPT(VARIANTS[request.param]).double()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return built


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(torch.arange(16).reshape(2, 8))
    return result


def test_the_function_is_unchanged_and_the_norm_falls(model: GPT) -> None:
    before = outputs(model)
    report = tf.canonicalize(model, tf.find_symmetries(model))
    assert report.converged
    assert report.squared_norm_after < 0.99 * report.squared_norm_before
    torch.testing.assert_close(outputs(model), before, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    assert float((outputs(model) - before).norm() / before.norm()) > 1e-4


def test_every_point_of_an_orbit_has_the_same_balanced_norm(model: GPT) -> None:
    """Random moves far along the stretches, then back: the same minimum, and the same diagonals' row norms."""
    symmetries = tf.find_symmetries(model)
    first = tf.canonicalize(model, symmetries)
    stretching = symmetries.select(lambda joint: joint.group.holds_stretches and joint.group.form != "permutation")
    stretching.apply_(model, stretching.random(radius=1.0))
    moved = tf.canonicalize(model, symmetries)
    assert moved.squared_norm_before > 1.05 * first.squared_norm_after
    assert moved.squared_norm_after == pytest.approx(first.squared_norm_after, rel=1e-9)


def test_a_balanced_dense_joint_has_equal_grams() -> None:
    model = GPT(GPTConfig(context=8, d_model=16, layers=1, heads=2)).double()
    symmetries = tf.find_symmetries(model)
    tf.canonicalize(model, symmetries)
    joint = next(joint for joint in symmetries if joint.kind == "value-output")
    tensors = dict(model.named_parameters())

    def gram(views: tuple[tf.View, ...]) -> torch.Tensor:
        wide = torch.cat([view.of(tensors[view.parameter].detach()).flatten(2) for view in views], 2)
        return wide @ wide.mT

    torch.testing.assert_close(gram(joint.plus), gram(joint.minus), rtol=1e-7, atol=1e-9)


def test_float32_parameters_are_rounded_once() -> None:
    """The float64 point, rounded: moving in float32, sweep after sweep, would leave it."""
    model = GPT(GPTConfig(context=8, d_model=16, layers=1, heads=2, gains=True))
    wide = GPT(model.config).double()
    wide.load_state_dict(model.state_dict())
    for each in (model, wide):
        tf.canonicalize(each, tf.find_symmetries(each))
    for narrow, exact in zip(model.parameters(), wide.parameters(), strict=True):
        assert torch.equal(narrow, exact.float())


def test_batch_norms_keep_their_function_and_their_scale_has_no_other_side() -> None:
    """A weight before a BatchNorm has a free scale and nothing to share it with, so it stays; the gain after is balanced."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, 3)
    ).double()
    with torch.no_grad():
        for tensor in (*model.parameters(), model[1].running_mean):
            tensor.add_(torch.randn_like(tensor) * 0.3)
    model.eval()
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    symmetries, before = tf.find_symmetries(model, images), model(images)
    first, gain = model[0].weight.clone(), model[1].weight.clone()
    assert any(joint.carried for joint in symmetries)
    assert tf.canonicalize(model, symmetries).converged
    torch.testing.assert_close(model(images), before, rtol=1e-10, atol=1e-10)
    assert torch.equal(model[0].weight, first)
    assert not torch.allclose(model[1].weight, gain)


def test_bad_input_is_named_and_moves_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    symmetries = tf.find_symmetries(model)
    with pytest.raises(ValueError, match="kind must be one of balance, got 'flat'"):
        tf.canonicalize(model, symmetries, kind="flat")
    with pytest.raises(ValueError, match="tolerance and max_sweeps must be positive, got -1 and 500"):
        tf.canonicalize(model, symmetries, tolerance=-1)
    permutations = symmetries.select(lambda joint: joint.group.form == "permutation")
    with pytest.raises(ValueError, match=r"no joint that can be balanced \(.*permutation\(4\) leaves the norm"):
        tf.canonicalize(model, permutations)
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"parameter '2.weight' has an entry that is not finite"):
        tf.canonicalize(model, symmetries)
    for parameter, was in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, was, rtol=0, atol=0, equal_nan=True)


def test_a_model_on_meta_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    symmetries = tf.find_symmetries(model)
    with pytest.raises(ValueError, match=r"parameter '0.weight' is on meta, without numbers to balance"):
        tf.canonicalize(model.to("meta"), symmetries)


def test_a_sweep_limit_is_said() -> None:
    model = GPT(VARIANTS["swiglu-layer"])
    report = tf.canonicalize(model, tf.find_symmetries(model), max_sweeps=1)
    assert not report.converged
    assert report.sweeps == 1
    assert report.last_move > 1e-8
