"""A joint moves the weights and leaves the function alone: exact in float64, and every wrong way is noticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from teleport_fast.symmetry import Diagonal, GeneralLinear, Group, Joint, Orthogonal, PositiveDiagonal, Rotary, View
from teleport_fast.symmetry.bucket import PARAMETER, Bucket, Element

if TYPE_CHECKING:
    from tests.symmetry.conftest import Trial

EXACT, NOTICED = 1e-12, 1e-3


def move_(trial: Trial, joint: Joint, g: Tensor | None = None) -> None:
    """Move the joint's parameters by g, a random element of its group when none is given; nothing is checked."""
    if g is None:
        g = joint.group.random(joint.heads, 0.5, torch.Generator().manual_seed(4), torch.float64)
    Bucket((joint,)).move_(Element.of(joint.group, g), [(PARAMETER, trial.tensors)])


def deviation(after: Tensor, before: Tensor) -> float:
    return float((after - before).norm() / before.norm())


def test_every_joint_leaves_the_function_alone(trial: Trial) -> None:
    before = trial.logits()
    for joint in trial.symmetries:
        weights = {name: trial.tensors[name].detach().clone() for name in joint.parameters()}
        move_(trial, joint)
        assert deviation(trial.logits(), before) <= EXACT, joint.name
        for name, weight in weights.items():
            assert deviation(trial.tensors[name].detach(), weight) > NOTICED, f"{name} did not move"


def test_all_joints_together_leave_the_function_alone(trial: Trial) -> None:
    before = trial.logits()
    trial.symmetries.apply_(trial.model, trial.symmetries.random(radius=0.5))
    assert deviation(trial.logits(), before) <= EXACT


def test_a_side_that_stays_is_noticed(trial: Trial) -> None:
    for joint in trial.symmetries:
        weights = {name: tensor.clone() for name, tensor in trial.tensors.items()}
        for half in (replace(joint, minus=()), replace(joint, plus=())):
            before = trial.logits()
            move_(trial, half)
            assert deviation(trial.logits(), before) > NOTICED, joint.name
            trial.model.load_state_dict(weights, strict=False)


def plain_inverse(joint: Joint) -> Joint:
    return replace(joint, minus=tuple(replace(view, power=1.0) for view in joint.minus))


def without_bias(joint: Joint) -> Joint:
    return replace(joint, plus=joint.plus[:1])


def with_group(make: Callable[[int], Group]) -> Callable[[Joint], Joint]:
    return lambda joint: replace(joint, group=make(joint.width))


def other_layout(joint: Joint) -> Joint:
    return replace(joint, group=Rotary(joint.width, joint.width, "interleaved"))


def one_row_off(joint: Joint) -> Joint:
    return replace(joint, plus=tuple(replace(view, start=view.start - 1) for view in joint.plus))


def heads_in_turn(joint: Joint) -> Joint:
    """Query head r of key head i at r · heads + i instead of i · repeats + r: the other way to share heads."""
    strides = {"head_stride": joint.width, "repeat_stride": joint.heads * joint.width}
    return replace(joint, minus=tuple(replace(view, **strides) for view in joint.minus))


VALUE_OUTPUT = "blocks.0.attention.value-output"
QUERY_KEY = "blocks.0.attention.query-key"
UP_DOWN = "blocks.0.mlp.up-down"
WRONG_WAYS = {
    "the inverse instead of its square through ReLU²": ("relu2", UP_DOWN, plain_inverse),
    "negative factors through ReLU": ("relu-layernorm-bias", UP_DOWN, with_group(Diagonal)),
    "GL through ReLU": ("relu-layernorm-bias", UP_DOWN, with_group(GeneralLinear)),
    "the value bias left behind": ("relu-layernorm-bias", VALUE_OUTPUT, without_bias),
    "the up bias left behind": ("relu-layernorm-bias", UP_DOWN, without_bias),
    "the wrong rotary layout": ("rotary-bias", QUERY_KEY, other_layout),
    "GL under a rotary embedding": ("rotary-bias", QUERY_KEY, with_group(GeneralLinear)),
    "a rotation under a rotary embedding": ("rotary-bias", QUERY_KEY, with_group(Orthogonal)),
    "a stream under LayerNorm that loses its ones": ("tied-layernorm", "residual", with_group(Orthogonal)),
    "a stream stretched under RMSNorm": ("relu2", "residual", with_group(GeneralLinear)),
    "a fused slice one row off": ("gelu-fused-bias", VALUE_OUTPUT, one_row_off),
    "grouped heads in the wrong order": ("swiglu-grouped", VALUE_OUTPUT, heads_in_turn),
}


@pytest.mark.parametrize(("variant", "name", "wrong"), WRONG_WAYS.values(), ids=WRONG_WAYS.keys())
def test_a_wrong_joint_is_noticed(
    trial_of: Callable[..., Trial], variant: str, name: str, wrong: Callable[[Joint], Joint]
) -> None:
    trial = trial_of(variant)
    joint = trial.symmetries[name]
    before = trial.logits()
    move_(trial, joint)
    assert deviation(trial.logits(), before) <= EXACT
    move_(trial, wrong(joint))
    assert deviation(trial.logits(), before) > NOTICED


def test_a_scale_through_gelu_is_noticed(trial_of: Callable[..., Trial]) -> None:
    trial = trial_of("gelu-fused-bias")
    assert UP_DOWN not in trial.symmetries
    neurons = trial.symmetries["blocks.0.mlp.neurons"]
    before = trial.logits()
    move_(trial, replace(neurons, group=PositiveDiagonal(neurons.width)))
    assert deviation(trial.logits(), before) > NOTICED


def test_a_rotated_stream_with_unfolded_gains_is_noticed(trial_of: Callable[..., Trial]) -> None:
    plain, gained = trial_of("relu2"), trial_of("gains")
    assert "residual" not in gained.symmetries
    before = gained.logits()
    move_(gained, plain.symmetries["residual"])
    assert deviation(gained.logits(), before) > NOTICED


def test_a_gate_is_not_a_producer_of_the_scaled_space(trial_of: Callable[..., Trial]) -> None:
    """SwiGLU: the neurons' permutation moves gate, up and down; the scale must leave the gate alone."""
    trial = trial_of("swiglu-grouped")
    neurons = trial.symmetries["blocks.0.mlp.neurons"]
    assert [view.parameter for view in neurons.plus] == ["blocks.0.mlp.up.weight", "blocks.0.mlp.gate.weight"]
    before = trial.logits()
    move_(trial, replace(neurons, group=Diagonal(neurons.width)))
    assert deviation(trial.logits(), before) > NOTICED


def relu_convolutions(t: dict[str, Tensor]) -> Tensor:
    return F.conv2d(F.relu(F.conv2d(t["x"], t["first"], t["bias"])), t["second"])


def transposed_layers(t: dict[str, Tensor]) -> Tensor:
    """Conv1D keeps its weight (in, out)."""
    return F.relu(t["x"] @ t["first"] + t["bias"]) @ t["second"]


def interleaved_attention(t: dict[str, Tensor]) -> Tensor:
    """NeoX: rows of q, k and v alternate head by head; 2 heads of width 3."""
    q, k, v = (t["x"] @ t["qkv"].mT + t["bias"]).unflatten(-1, (2, 9)).transpose(1, 2).chunk(3, -1)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) @ t["o"].mT


def shifted_gain(t: dict[str, Tensor]) -> Tensor:
    """A gain stored as 1 + w in front of a linear layer."""
    return F.rms_norm(t["x"], (6,)) * (1 + t["gain"]) @ t["reader"].mT


def neox(part: int) -> dict[str, int]:
    return {"heads": 2, "width": 3, "start": 3 * part, "head_stride": 9}


LAYOUTS = {
    "convolutions": (
        relu_convolutions,
        {"x": (2, 3, 5, 5), "first": (6, 3, 2, 2), "bias": (6,), "second": (4, 6, 3, 3)},
        PositiveDiagonal(6),
        (View("first", 0, 1, 6), View("bias", 0, 1, 6)),
        (View("second", 1, 1, 6),),
    ),
    "weights stored in × out": (
        transposed_layers,
        {"x": (5, 3), "first": (3, 6), "bias": (6,), "second": (6, 4)},
        PositiveDiagonal(6),
        (View("first", 1, 1, 6), View("bias", 0, 1, 6)),
        (View("second", 0, 1, 6),),
    ),
    "q, k and v interleaved: value and output": (
        interleaved_attention,
        {"x": (2, 5, 4), "qkv": (18, 4), "bias": (18,), "o": (4, 6)},
        GeneralLinear(3),
        (View("qkv", 0, **neox(2)), View("bias", 0, **neox(2))),
        (View("o", 1, 2, 3),),
    ),
    "q, k and v interleaved: query and key": (
        interleaved_attention,
        {"x": (2, 5, 4), "qkv": (18, 4), "bias": (18,), "o": (4, 6)},
        GeneralLinear(3),
        (View("qkv", 0, **neox(0)), View("bias", 0, **neox(0))),
        (View("qkv", 0, **neox(1)), View("bias", 0, **neox(1))),
    ),
    "a gain stored as 1 + w": (
        shifted_gain,
        {"x": (5, 6), "gain": (6,), "reader": (4, 6)},
        Diagonal(6),
        (View("gain", 0, 1, 6, shift=1.0),),
        (View("reader", 1, 1, 6),),
    ),
}


@pytest.mark.parametrize(("function", "shapes", "group", "plus", "minus"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_other_layouts_leave_the_function_alone(
    function: Callable[[dict[str, Tensor]], Tensor],
    shapes: dict[str, tuple[int, ...]],
    group: Group,
    plus: tuple[View, ...],
    minus: tuple[View, ...],
) -> None:
    tensors = {name: torch.randn(*shape, dtype=torch.float64) for name, shape in shapes.items()}
    joint = Joint("by hand", "layout", group, plus[0].heads, plus[0].width, plus, minus)
    element = Element.of(group, group.random(joint.heads, 0.5, torch.Generator().manual_seed(4), torch.float64))
    before = function(tensors)
    Bucket((joint,)).move_(element, [(PARAMETER, tensors)])
    assert deviation(function(tensors), before) <= EXACT
    Bucket((replace(joint, minus=()),)).move_(element, [(PARAMETER, tensors)])
    assert deviation(function(tensors), before) > NOTICED


def joint_of(**changes: object) -> Joint:
    parts = {"name": "vo", "kind": "value-output", "group": GeneralLinear(4), "heads": 2, "width": 4}
    views = {"plus": (View("v", 0, 2, 4),), "minus": (View("o", 1, 2, 4),)}
    return Joint(**{**parts, **views, **changes})


def test_dim_counts_all_heads_and_parameters_come_once() -> None:
    joint = joint_of(plus=(View("qkv", 0, 2, 4), View("b", 0, 2, 4)), minus=(View("qkv", 0, 2, 4, start=8),))
    assert joint.dim == 2 * 16
    assert joint.parameters() == ("qkv", "b")
    assert len(list(joint.views())) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minus": (View("o", 1, 4, 2),)}, "'vo' has 2 heads of width 4, but the view of 'o' has 4 of width 2"),
        ({"group": GeneralLinear(3)}, r"'vo' has width 4, but its group is GL\(3\)"),
        ({"plus": (), "minus": ()}, "'vo' has no views; name at least one parameter"),
        ({"minus": (View("o", 1, 2, 4, power=2.0),)}, r"'o' has power 2.0 and shift 0.0, .* under GL\(4\)"),
        ({"plus": (View("v", 0, 2, 4, shift=1.0),)}, r"'v' has power 1.0 and shift 1.0, .* use a diagonal group"),
    ],
)
def test_a_joint_whose_parts_disagree_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        joint_of(**changes)


def test_check_shapes_names_the_joint_and_both_sizes() -> None:
    tensors = {"v": torch.zeros(8, 3), "o": torch.zeros(3, 8)}
    joint_of().check_shapes(tensors)
    with pytest.raises(ValueError, match=r"joint 'vo': view of 'o': axis 1 .* has 7 entries, .* disagree in size"):
        joint_of().check_shapes({**tensors, "o": torch.zeros(3, 7)})
    with pytest.raises(ValueError, match="'vo' names the parameter 'o', which the model does not have"):
        joint_of().check_shapes({"v": tensors["v"]})
