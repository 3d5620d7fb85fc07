"""Symmetries: moves that can be undone, are checked before anything moves, and can be drawn, selected, stored, read."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from teleport_fast.symmetry import Diagonal, GeneralLinear, Joint, Orthogonal, Rotary, Symmetries, View
from teleport_fast.symmetry.symmetries import Finding, named_tensors

if TYPE_CHECKING:
    from tests.symmetry.conftest import Trial

VALUE_OUTPUT, QUERY_KEY = "blocks.0.attention.value-output", "blocks.0.attention.query-key"


@pytest.fixture
def relu2(trial_of: Callable[..., Trial]) -> Iterator[Trial]:
    return trial_of("relu2")


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}


def same(model: nn.Module, weights: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, weights[name]) for name, tensor in named_tensors(model).items())


def furthest(model: nn.Module, weights: dict[str, Tensor]) -> float:
    return max(float((t.detach() - weights[name]).abs().max()) for name, t in named_tensors(model).items())


def inverse(symmetries: Symmetries, elements: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: symmetries[name].group.inverse(g) for name, g in reversed(list(elements.items()))}


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float64, 1e-13), (torch.float32, 1e-6)], ids=str)
def test_apply_then_inverse_restores_the_weights(trial: Trial, dtype: torch.dtype, exact: float) -> None:
    model = trial.model.to(dtype)
    before, elements = snapshot(model), trial.symmetries.random(radius=0.5)
    trial.symmetries.apply_(model, elements)
    assert furthest(model, before) > 1e-2
    trial.symmetries.apply_(model, inverse(trial.symmetries, elements))
    size = max(float(weight.abs().max()) for weight in before.values())
    assert furthest(model, before) <= exact * max(1.0, size)


def test_float32_models_keep_their_function_to_float32_resolution(trial: Trial) -> None:
    trial.model.float()
    before = trial.logits()
    trial.symmetries.apply_(trial.model, trial.symmetries.random(radius=0.5))
    after = trial.logits()
    assert after.dtype == torch.float32
    assert float((after - before).norm() / before.norm()) < 1e-4


def test_apply_moves_parameters_and_nothing_else(relu2: Trial) -> None:
    model = relu2.model
    model(relu2.ids).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    identities = {name: id(p) for name, p in model.named_parameters()}
    relu2.symmetries.apply_(model, relu2.symmetries.random())
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters() if p.grad is not None)
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


def test_a_single_heads_element_needs_no_head_axis(relu2: Trial) -> None:
    twin = copy.deepcopy(relu2.model)
    g = relu2.symmetries.random()["residual"]
    relu2.symmetries.apply_(relu2.model, {"residual": g})
    relu2.symmetries.apply_(twin, {"residual": g[0]})
    assert same(twin, snapshot(relu2.model))


def bad_elements(symmetries: Symmetries) -> dict[str, tuple[type[Exception], str, dict[str, Tensor]]]:
    good = symmetries.random()
    singular = good[VALUE_OUTPUT].clone()
    singular[1] = 0
    one_head = good[VALUE_OUTPUT][:1]
    crooked = good["residual"].clone()
    crooked[0, 0, 0] += 0.1
    negative = good["blocks.0.mlp.up-down"].neg()
    not_finite = good[VALUE_OUTPUT].clone()
    not_finite[0, 0, 0] = float("inf")
    return {
        "unknown joint": (KeyError, "no joint named 'residul'; the joints are ", {"residul": good["residual"]}),
        "shape": (ValueError, r"must have shape \(4, 4, 4\) for GL\(4\), got \(1, 4, 4\)", {VALUE_OUTPUT: one_head}),
        "singular": (ValueError, f"'{VALUE_OUTPUT}' is singular; pass an invertible element", {VALUE_OUTPUT: singular}),
        "not finite": (ValueError, "has a non-finite entry", {VALUE_OUTPUT: not_finite}),
        "not orthogonal": (ValueError, "'residual' must be orthogonal, its deviation", {"residual": crooked}),
        "wrong sign": (ValueError, "must have positive entries", {"blocks.0.mlp.up-down": negative}),
        "no permutation": (ValueError, "must be an int64 permutation", {"blocks.0.mlp.neurons": torch.zeros(1, 12)}),
    }


@pytest.mark.parametrize(
    "case", ["unknown joint", "shape", "singular", "not finite", "not orthogonal", "wrong sign", "no permutation"]
)
def test_nothing_moves_unless_every_element_is_right(relu2: Trial, case: str) -> None:
    error, message, wrong = bad_elements(relu2.symmetries)[case]
    before = snapshot(relu2.model)
    good = {QUERY_KEY: relu2.symmetries.random()[QUERY_KEY]}
    with pytest.raises(error, match=message):
        relu2.symmetries.apply_(relu2.model, {**good, **wrong})
    assert same(relu2.model, before)
    relu2.symmetries.apply_(relu2.model, good)
    assert not same(relu2.model, before)


def test_elements_outside_the_group_are_refused(trial_of: Callable[..., Trial]) -> None:
    """What would break the function by design of the model: GL under rotary, a stream under LayerNorm off its ones."""
    rotary, layernorm = trial_of("rotary-bias"), trial_of("tied-layernorm")
    dense = GeneralLinear(4).random(4, 0.5, dtype=torch.float64)
    assert isinstance(rotary.symmetries[QUERY_KEY].group, Rotary)
    with pytest.raises(ValueError, match="must commute with the rotary embedding"):
        rotary.symmetries.apply_(rotary.model, {QUERY_KEY: dense})
    with pytest.raises(ValueError, match="must keep the vector of ones"):
        turn = Orthogonal(16).random(1, 0.5, dtype=torch.float64)
        layernorm.symmetries.apply_(layernorm.model, {"residual": turn})


def test_a_model_that_does_not_fit_is_refused(relu2: Trial) -> None:
    relu2.model.blocks[1].mlp.down = nn.Linear(11, 16).double()
    before, elements = snapshot(relu2.model), relu2.symmetries.random()
    with pytest.raises(ValueError, match=r"joint 'blocks.1.mlp.up-down': view of .*has 11 entries.* disagree in size"):
        relu2.symmetries.apply_(relu2.model, elements)
    assert same(relu2.model, before)
    with pytest.raises(ValueError, match="which the model does not have; run find_symmetries on this model again"):
        relu2.symmetries.apply_(nn.Linear(4, 4), elements)


def test_random_elements_repeat_and_do_not_depend_on_the_other_joints(relu2: Trial) -> None:
    first, again = relu2.symmetries.random(), relu2.symmetries.random()
    alone = relu2.symmetries.select(["value-output"]).random()
    assert list(first) == [joint.name for joint in relu2.symmetries]
    assert all(torch.equal(g, again[name]) for name, g in first.items())
    assert all(torch.equal(g, first[name]) for name, g in alone.items())
    one, two = (VALUE_OUTPUT.replace("0", str(i)) for i in (0, 1))
    assert not torch.equal(first[one], first[two])


def test_a_generator_decides_the_draw_and_leaves_torchs_own_alone(relu2: Trial) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    draws = [relu2.symmetries.random(generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0][VALUE_OUTPUT], draws[1][VALUE_OUTPUT])
    assert not torch.equal(draws[0][VALUE_OUTPUT], draws[2][VALUE_OUTPUT])
    assert torch.equal(torch.get_rng_state(), state)


def test_random_elements_have_the_groups_form_and_the_wanted_dtype(trial: Trial) -> None:
    for name, g in trial.symmetries.random(dtype=torch.float32).items():
        joint = trial.symmetries[name]
        assert torch.equal(joint.group.check(g, joint.heads, name), g)
        assert g.dtype == (torch.int64 if joint.group.form == "permutation" else torch.float32)


@pytest.mark.parametrize("radius", [0.0, -0.5, float("inf"), float("nan")])
def test_the_radius_must_be_positive_and_finite(relu2: Trial, radius: float) -> None:
    with pytest.raises(ValueError, match=f"radius must be positive and finite, got {radius}"):
        relu2.symmetries.random(radius=radius)


def test_symmetries_are_a_collection_of_joints(relu2: Trial) -> None:
    symmetries = relu2.symmetries
    assert len(symmetries) == len(list(symmetries)) == 11
    assert VALUE_OUTPUT in symmetries
    assert "value-output" not in symmetries
    assert symmetries[VALUE_OUTPUT].kind == "value-output"
    assert symmetries.dim == sum(joint.dim for joint in symmetries) == 2 * (64 + 64 + 12) + 120


def test_joints_are_selected_by_kind_name_or_question(relu2: Trial) -> None:
    symmetries = relu2.symmetries
    assert [j.name for j in symmetries.select(["residual", VALUE_OUTPUT])] == [VALUE_OUTPUT, "residual"]
    assert [j.kind for j in symmetries.select("neurons")] == ["neurons", "neurons"]
    assert {j.kind for j in symmetries.select(lambda joint: joint.heads > 1)} == {"value-output", "query-key"}
    assert symmetries.select("neurons").findings == symmetries.findings
    assert symmetries.select("neurons").parameter("blocks.0.mlp.up.weight") is not None
    with pytest.raises(ValueError, match=r"keep names no joint and no kind: \['residul'\]; kinds here are \['heads', 'neurons'"):
        symmetries.select(["residual", "residul"])


def test_names_are_unique(relu2: Trial) -> None:
    joint = relu2.symmetries["residual"]
    with pytest.raises(ValueError, match="joints must have distinct names"):
        Symmetries((joint, joint))


def test_symmetries_know_live_parameters_and_do_not_keep_the_model(relu2: Trial) -> None:
    symmetries, name = relu2.symmetries, "blocks.0.mlp.up.weight"
    assert symmetries.parameter(name) is relu2.model.blocks[0].mlp.up.weight
    assert symmetries.parameter("no such name") is None
    assert symmetries.select(lambda joint: True).parameter(name) is relu2.model.blocks[0].mlp.up.weight
    del relu2.model
    gc.collect()
    assert symmetries.parameter(name) is None


def test_a_parameter_that_was_exchanged_is_found_beside_the_first_one(relu2: Trial) -> None:
    """As fully_shard exchanges it."""
    symmetries, up, name = relu2.symmetries, relu2.model.blocks[0].mlp.up, "blocks.0.mlp.up.weight"
    first, up.weight = up.weight, nn.Parameter(torch.zeros_like(up.weight))
    for of in (symmetries, symmetries.select(["residual"])):
        assert [id(found) for found in of.candidates(name)] == [id(first), id(up.weight)]
    assert list(symmetries.candidates("no such name")) == []


@pytest.mark.parametrize("travel", [lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_symmetries_travel_without_the_model(relu2: Trial, travel: Callable[[Symmetries], Symmetries]) -> None:
    arrived = travel(relu2.symmetries)
    assert arrived.joints == relu2.symmetries.joints
    assert arrived.explain() == relu2.symmetries.explain()
    assert arrived.parameter("blocks.0.mlp.up.weight") is None
    before = relu2.logits()
    arrived.apply_(relu2.model, arrived.random())
    assert float((relu2.logits() - before).norm() / before.norm()) < 1e-12


def test_verify_proves_good_joints_and_catches_one_made_wrong_by_hand(trial: Trial) -> None:
    assert trial.symmetries.verify(trial.model, trial.ids).ok
    joint = trial.symmetries["blocks.0.mlp.neurons"]
    wrong = replace(joint, plus=(replace(joint.plus[0], axis=1), *joint.plus[1:]))
    report = Symmetries((wrong, trial.symmetries[VALUE_OUTPUT])).verify(trial.model, trial.ids)
    assert [proof.ok for proof in report] == [False, True]
    assert not report
    assert report.max_deviation > 1e-3


def test_explain_says_what_was_found_and_why_not(trial_of: Callable[..., Trial]) -> None:
    text = trial_of(mlp="gelu", gains=True, tied=True).symmetries.explain()
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert "GL(4)" in lines[VALUE_OUTPUT]
    assert lines[VALUE_OUTPUT].endswith("found")
    assert "rejected: the activation is not homogeneous" in lines["blocks.0.mlp.up-down"]
    assert "rejected: gain of 'blocks.0.norm1' is not folded; call fold_norm_gains_" in lines["residual"]
    assert "a tied head keeps its gain" in lines["norm.readers"]
    assert text.splitlines()[-1] == "14 joints, 320 continuous dimensions"


def test_explain_marks_what_nobody_proved() -> None:
    views = (View("up", 0, 1, 3),), (View("down", 1, 1, 3),)
    joint = Joint("by hand", "up-down", Diagonal(3), 1, 3, *views)
    text = Symmetries((joint,), (Finding("extra", "Conv2d", "skipped", "no builder knows its role"),)).explain()
    assert "by hand  up-down  diagonal(3)  1      3    unproven   found" in text
    assert ["extra", "Conv2d", "skipped:", "no", "builder", "knows", "its", "role"] in [line.split() for line in text.splitlines()]
    measured = Symmetries((joint,), (Finding("by hand", "up-down", "found", "up to eps", 3e-7), Finding("no", "x", "rejected", "wrong", 0.25)))
    rows = [line.split() for line in measured.explain().splitlines()]
    assert ["by", "hand", "up-down", "diagonal(3)", "1", "3", "3e-07", "found:", "up", "to", "eps"] in rows
    assert ["no", "x", "2e-01", "rejected:", "wrong"] in rows
    assert "skipped: no builder knows its role" in text
    assert "0 joints, 0 continuous dimensions" in Symmetries(()).explain()


def test_shown_in_one_line_however_many_parameters_there_are(trial: Trial) -> None:
    assert repr(trial.symmetries) == f"Symmetries({len(trial.symmetries)} joints, {trial.symmetries.dim} continuous dimensions)"
    wide = Joint("wide", "residual", Diagonal(3), 1, 3, tuple(View(f"w{i}", 0, 1, 3) for i in range(6)), (View("down", 1, 1, 3),))
    few = replace(wide, plus=wide.plus[:5])
    assert "plus=[w0, w1, w2, w3, 1 more]" in repr(few) and "plus=[w0, w1, w2, w3]" in repr(replace(wide, plus=wide.plus[:4]))
    assert repr(wide) == "Joint('wide', kind='residual', group=diagonal(3), heads=1, plus=[w0, w1, w2, w3, 2 more], minus=[down])"


def test_elements_that_are_no_mapping_are_refused(trial: Trial) -> None:
    with pytest.raises(TypeError, match=r"elements must be a dict .*, got list; symmetries.random\(\) gives one"):
        trial.symmetries.apply_(trial.model, [torch.eye(2)])  # type: ignore[arg-type]
