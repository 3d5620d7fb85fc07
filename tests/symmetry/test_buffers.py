"""Buffers that a joint carries (running statistics) move with its parameters, wherever a joint is moved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import teleport_fast as tf
from teleport_fast import Symmetries
from teleport_fast.symmetry import Diagonal, Joint, Permutation, PositiveDiagonal, View


def net(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), activation(), nn.Linear(6, 3)).double()
    norm = model[1]
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return model.eval()


def view(name: str, axis: int = 0, power: float = 1.0, shift: float = 0.0) -> View:
    return View(name, axis, 1, 6, power=power, shift=shift)


ROWS = (view("0.weight"), view("0.bias"))
SCALE = Joint(
    "scale", "batchnorm-scale", PositiveDiagonal(6), 1, 6, ROWS, (),
    (view("1.running_mean"), view("1.running_var", power=2.0, shift=1e-5)),
)  # fmt: skip
ORDER = Joint(
    "order", "neurons", Permutation(6), 1, 6, (*ROWS, view("1.weight"), view("1.bias")), (view("3.weight", 1),),
    (view("1.running_mean"), view("1.running_var")),
)  # fmt: skip


@pytest.mark.parametrize("joint", [SCALE, ORDER], ids=["scale", "order"])
def test_a_move_takes_running_statistics_along(joint: Joint) -> None:
    model, x = net(), torch.randn(5, 4, dtype=torch.float64)
    symmetries = Symmetries((joint,), model=model)
    before, statistics = model(x), model[1].running_var.clone()
    symmetries.apply_(model, symmetries.random())
    assert not torch.equal(model[1].running_var, statistics)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    assert symmetries.verify(model, x).ok


@pytest.mark.parametrize("joint", [SCALE, ORDER], ids=["scale", "order"])
def test_without_its_buffers_the_same_joint_is_refuted(joint: Joint) -> None:
    forgetful = Joint(joint.name, joint.kind, joint.group, 1, 6, joint.plus, joint.minus)
    report = Symmetries((forgetful,)).verify(net(), torch.randn(5, 4, dtype=torch.float64))
    assert not report.ok
    assert report.max_deviation > 1e-2


def test_the_scale_before_a_batchnorm_is_exact_in_eval_and_up_to_eps_in_training() -> None:
    x = torch.randn(64, 4, dtype=torch.float64)
    for eps in (1e-1, 1e-5):
        model = net()
        model[1].eps = eps
        shifted = (SCALE.carried[0], view("1.running_var", power=2.0, shift=eps))
        joint = Joint("scale", "batchnorm-scale", PositiveDiagonal(6), 1, 6, ROWS, (), shifted)
        (proof,) = Symmetries((joint,)).verify(model, x)
        assert proof.deviation < 1e-12
        assert proof.training is not None
        assert eps / 100 < proof.training < 10 * eps
        assert proof.ok == (eps < 1e-3)


def test_a_sign_is_refuted_before_a_batchnorm() -> None:
    joint = Joint("scale", "batchnorm-scale", Diagonal(6), 1, 6, ROWS, (), SCALE.carried)
    assert not Symmetries((joint,)).verify(net(), torch.randn(9, 4, dtype=torch.float64)).ok


def test_the_proof_puts_running_statistics_back() -> None:
    model, x = net(), torch.randn(9, 4, dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Symmetries((SCALE, ORDER)).verify(model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("frame", ["stay", "return"])
def test_a_teleporter_moves_buffers_with_their_parameters(frame: str) -> None:
    model, x = net(), torch.randn(5, 4, dtype=torch.float64)
    symmetries = Symmetries((SCALE,), model=model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, weight_decay=1.0)
    tf.attach(optimizer, symmetries, objective="grad_norm", schedule=tf.Once(), frame=frame)
    before, mean = model(x).detach(), model[1].running_mean.clone()
    model(x).square().sum().backward()
    optimizer.step()
    moved = not torch.allclose(model[1].running_mean, mean)
    assert moved == (frame == "stay")
    torch.testing.assert_close(model(x), before)


def test_buffers_are_found_again_after_the_model_was_moved_and_missed_when_it_is_gone() -> None:
    model = net()
    symmetries = Symmetries((SCALE,), model=model)
    model.float()
    assert symmetries.buffers(["1.running_var"])["1.running_var"].dtype == torch.float32
    gone = Symmetries((SCALE,), model=net())
    with pytest.raises(ValueError, match=r"buffer '1.running_var' moves with a joint, but the model .* is gone"):
        gone.buffers(["1.running_var"])


def test_one_value_per_channel_cannot_be_proven_in_training_and_does_not_fail() -> None:
    x = torch.randn(1, 4, dtype=torch.float64)
    assert Symmetries((ORDER,)).verify(net(nn.Tanh), x).ok


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 6, 1), nn.Conv1d(6, 8, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def test_a_view_shows_the_part_that_a_group_of_a_convolution_reads() -> None:
    model = Grouped().double()
    plus = (View("first.weight", 0, 2, 3), View("first.bias", 0, 2, 3))
    minus = View("second.weight", 1, 2, 3, head_axis=0, head_stride=4, head_size=4)
    shown = minus.of(model.second.weight)
    assert shown.shape[:2] == (2, 3)
    torch.testing.assert_close(shown[1, 2].flatten().sort().values, model.second.weight[4:, 2].flatten().sort().values)
    x = torch.randn(2, 3, 9, dtype=torch.float64)
    for group in (PositiveDiagonal(3), Permutation(3)):
        assert Symmetries((Joint("j", "k", group, 2, 3, plus, (minus,)),)).verify(model, x).ok
    wrong = View("second.weight", 1, 2, 3, head_axis=0, head_stride=2, head_size=2)
    assert not Symmetries((Joint("j", "k", PositiveDiagonal(3), 2, 3, plus, (wrong,)),)).verify(model, x).ok


def test_a_part_outside_its_axis_is_refused() -> None:
    with pytest.raises(ValueError, match=r"axis 0 of shape \(8, 3\) has no 2 heads"):
        View("w", 1, 2, 3, head_axis=0, head_start=4, head_stride=4, head_size=4).of(torch.zeros(8, 3))
    shown = View("w", 1, 1, 3, head_axis=0, head_start=4, head_size=4).of(torch.arange(24.0).reshape(8, 3))
    assert shown.flatten().sort().values.tolist() == list(range(12, 24))
