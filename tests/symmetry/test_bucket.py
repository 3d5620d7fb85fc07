"""Gradients move contragrediently, squares by the square, and a bucket moves its joints as if one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teleport_fast.experiments.gpt import MLPS, NORMS, POSITIONS
from teleport_fast.symmetry import (
    Diagonal,
    GeneralLinear,
    Group,
    Joint,
    Orthogonal,
    Permutation,
    PositiveDiagonal,
    View,
)
from teleport_fast.symmetry.bucket import COVECTOR, PARAMETER, SQUARE, Bucket, Element, buckets

if TYPE_CHECKING:
    from tests.symmetry.conftest import Trial

EXACT, NOTICED = 1e-11, 1e-3


def random_element(joint: Joint, radius: float = 0.5) -> Element:
    generator = torch.Generator().manual_seed(4)
    return Element.of(joint.group, joint.group.random(joint.heads, radius, generator, torch.float64))


def is_involution(joint: Joint, element: Element) -> bool:
    """Signs and the exchange of two heads are their own inverses."""
    return torch.equal(element.inverse(joint.group).g, element.g)


def clones(tensors: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    return {name: tensors[name].detach().clone() for name in names}


def deviation(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    change = sum(float((got[name] - tensor).square().sum()) for name, tensor in wanted.items())
    return (change / sum(float(tensor.square().sum()) for tensor in wanted.values())) ** 0.5


def check_covariance(trial: Trial) -> None:
    start = clones(trial.tensors, trial.tensors)
    gradients = trial.gradients()
    for joint in trial.symmetries:
        bucket, element = Bucket((joint,)), random_element(joint)
        bucket.move_(element, [(PARAMETER, trial.tensors)])
        wanted = trial.gradients()
        here = {name: wanted[name] for name in joint.parameters()}

        right = clones(gradients, gradients)
        bucket.move_(element, [(COVECTOR, right)])
        assert deviation(right, wanted) <= EXACT, joint.name

        like_parameters, undone = clones(gradients, here), clones(gradients, here)
        bucket.move_(element, [(PARAMETER, like_parameters)])
        bucket.move_(element.inverse(joint.group), [(COVECTOR, undone)])
        if joint.group.holds_stretches:
            assert deviation(like_parameters, here) > NOTICED, joint.name
        if not is_involution(joint, element):
            assert deviation(undone, here) > NOTICED, joint.name
        assert deviation(clones(gradients, here), here) > NOTICED, joint.name
        trial.model.load_state_dict(start, strict=False)


def test_gradients_move_contragrediently(trial: Trial) -> None:
    """Autograd at g·w against moved gradients; moving them like parameters, backwards or not at all is noticed."""
    check_covariance(trial)


configurations = st.fixed_dictionaries(
    {
        "mlp": st.sampled_from(MLPS),
        "norm": st.sampled_from(NORMS),
        "positions": st.sampled_from(POSITIONS),
        "kv_heads": st.sampled_from([None, 2, 1]),
        **{name: st.booleans() for name in ("gains", "bias", "fused_qkv", "tied")},
    }
)


@given(changes=configurations, fold=st.booleans())
@settings(max_examples=12)
def test_gradients_move_contragrediently_in_any_configuration(
    trial_of: Callable[..., Trial], changes: dict[str, object], fold: bool
) -> None:
    check_covariance(trial_of(folded=fold and bool(changes["gains"]) and not changes["tied"], **changes))


def two_layers(width: int, group: Group, power: float = 1.0, shift: float = 0.0) -> Bucket:
    plus, minus = View("up", 0, 1, width, shift=shift), View("down", 1, 1, width, power=power)
    return Bucket((Joint("joint", "up-down", group, 1, width, (plus,), (minus,)),))


def weights(width: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    shapes = {"up": (width, 3), "down": (4, width)}
    return {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def test_dense_elements_act_by_g_and_its_inverse_transpose() -> None:
    bucket, moved, before = two_layers(5, GeneralLinear(5)), weights(), weights()
    element = random_element(bucket.joints[0])
    g, inverse = element.g[0], torch.linalg.inv(element.g[0])
    bucket.move_(element, [(PARAMETER, moved)])
    torch.testing.assert_close(moved, {"up": g @ before["up"], "down": before["down"] @ inverse})
    moved = weights()
    bucket.move_(element, [(COVECTOR, moved)])
    torch.testing.assert_close(moved, {"up": inverse.mT @ before["up"], "down": before["down"] @ g.mT})


def test_a_power_scales_the_consumer_by_it_and_squares_by_twice_the_opposite() -> None:
    bucket, before = two_layers(5, PositiveDiagonal(5), power=2.0), weights()
    element = random_element(bucket.joints[0])
    s = element.g[0]
    for kind, exponent in ((PARAMETER, 1), (COVECTOR, -1), (SQUARE, -2)):
        moved = weights()
        bucket.move_(element, [(kind, moved)])
        wanted = {"up": before["up"] * s[:, None] ** exponent, "down": before["down"] * s ** (-2 * exponent)}
        torch.testing.assert_close(moved, wanted)


def test_second_moments_move_as_the_squares_of_gradients_do() -> None:
    for group in (Diagonal(5), Permutation(5)):
        bucket, gradients = two_layers(5, group), weights()
        squares = {name: gradient.square() for name, gradient in gradients.items()}
        bucket.move_(random_element(bucket.joints[0]), [(COVECTOR, gradients), (SQUARE, squares)])
        torch.testing.assert_close(squares, {name: gradient.square() for name, gradient in gradients.items()})


def test_second_moments_stay_under_a_dense_element_and_squared_elements_carry_the_expectation() -> None:
    """E[(G')²] = (g⁻ᵀ)∘² E[G²] where the entries of G are uncorrelated."""
    bucket, squares = two_layers(5, GeneralLinear(5)), {name: t.square() for name, t in weights().items()}
    element = random_element(bucket.joints[0])
    kept = clones(squares, squares)
    bucket.move_(element, [(SQUARE, kept)])
    assert all(torch.equal(kept[name], squares[name]) for name in squares)
    wanted = {
        "up": torch.linalg.inv(element.g[0]).mT.square() @ squares["up"],
        "down": squares["down"] @ element.g[0].mT.square(),
    }
    bucket.move_(element.squared(), [(COVECTOR, squares)])
    torch.testing.assert_close(squares, wanted)


def test_a_shift_is_kept_by_parameters_and_unknown_to_gradients() -> None:
    """A gain stored as 1 + w: s acts on 1 + w, so w becomes s (1 + w) − 1, and its gradient is divided by s."""
    bucket, before, moved, gradients = two_layers(5, Diagonal(5), shift=1.0), weights(), weights(), weights()
    element = random_element(bucket.joints[0])
    s = element.g[0][:, None]
    bucket.move_(element, [(PARAMETER, moved), (COVECTOR, gradients)])
    torch.testing.assert_close(1 + moved["up"], s * (1 + before["up"]))
    torch.testing.assert_close(gradients["up"], before["up"] / s)
    assert float((moved["up"] - s * before["up"]).abs().min()) > NOTICED


def test_a_permutation_reorders_rows_and_columns_alike() -> None:
    bucket, before = two_layers(5, Permutation(5)), weights()
    order = torch.tensor([[2, 0, 1, 4, 3]])
    for kind in (PARAMETER, COVECTOR, SQUARE):
        moved = weights()
        bucket.move_(Element.of(bucket.group, order), [(kind, moved)])
        torch.testing.assert_close(moved, {"up": before["up"][order[0]], "down": before["down"][:, order[0]]})


@pytest.mark.parametrize("group", [GeneralLinear(5), Orthogonal(5), Diagonal(5), Permutation(5)], ids=str)
def test_the_inverse_element_restores_every_source(group: Group) -> None:
    bucket, tensors, moments = two_layers(5, group, power=1.0), weights(), weights()
    element = random_element(bucket.joints[0])
    sources = [(PARAMETER, tensors), (COVECTOR, moments)]
    bucket.move_(element, sources)
    assert deviation(tensors, weights()) > NOTICED
    bucket.move_(element.inverse(group), sources)
    assert max(deviation(tensors, weights()), deviation(moments, weights())) < 1e-14


@pytest.mark.parametrize("group", [GeneralLinear(5), Diagonal(5), Permutation(5)], ids=str)
def test_names_missing_from_a_source_are_left_out(group: Group) -> None:
    bucket, whole, part = two_layers(5, group), weights(), weights()
    del part["up"]
    element = random_element(bucket.joints[0])
    bucket.move_(element, [(COVECTOR, whole)])
    bucket.move_(element, [(COVECTOR, part), (PARAMETER, {})])
    assert list(part) == ["down"]
    torch.testing.assert_close(part["down"], whole["down"])


def run_of_joints(group: Group, count: int = 3) -> list[Joint]:
    def joint(i: int) -> Joint:
        plus, minus = View(f"{i}.up", 0, 2, 5), View(f"{i}.down", 1, 2, 5)
        return Joint(f"joint{i}", "up-down", group, 2, 5, (plus,), (minus,))

    return [joint(i) for i in range(count)]


@pytest.mark.parametrize("group", [GeneralLinear(5), Diagonal(5), Permutation(5)], ids=str)
@pytest.mark.parametrize("missing", [[], ["1.up"]], ids=["all tensors", "one joint has fewer"])
def test_a_bucket_moves_each_joint_by_its_own_heads(group: Group, missing: list[str]) -> None:
    joints = run_of_joints(group)
    generator = torch.Generator().manual_seed(8)
    shapes = {f"{i}.{part}": shape for i in range(3) for part, shape in (("up", (10, 3)), ("down", (4, 10)))}
    shapes = {name: shape for name, shape in shapes.items() if name not in missing}
    together = {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    singly = clones(together, together)
    (bucket,) = buckets(joints)
    g = group.random(6, 0.5, generator, torch.float64)
    bucket.move_(Element.of(group, g), [(PARAMETER, together)])
    for joint, rows in zip(joints, g.split(2), strict=True):
        Bucket((joint,)).move_(Element.of(group, rows), [(PARAMETER, singly)])
    torch.testing.assert_close(together, singly)


def test_buckets_lists_views_joint_after_joint() -> None:
    (bucket,) = buckets(run_of_joints(GeneralLinear(5)))
    tensors = {f"{i}.{part}": torch.full((10, 10), float(i)) for i in range(3) for part in ("up", "down")}
    assert [float(view.mean()) for view in bucket.plus(tensors)] == [0, 1, 2]
    assert [float(view.mean()) for view in bucket.minus(tensors)] == [0, 1, 2]
    assert bucket.parameters() == ["0.up", "0.down", "1.up", "1.down", "2.up", "2.down"]
    assert (bucket.heads, bucket.width) == (2, 5)


def test_only_joints_of_one_shape_with_disjoint_parameters_share_a_bucket(trial: Trial) -> None:
    found = buckets(trial.symmetries)
    assert sorted(j.name for b in found for j in b.joints) == sorted(j.name for j in trial.symmetries)
    for bucket in found:
        names = list(chain.from_iterable(joint.parameters() for joint in bucket.joints))
        assert len(names) == len(set(names))
        shapes = {(j.kind, j.group, j.heads, len(j.plus), len(j.minus)) for j in bucket.joints}
        assert len(shapes) == 1


def test_joints_that_differ_or_overlap_get_buckets_of_their_own() -> None:
    first, second, third = run_of_joints(GeneralLinear(5))
    overlapping = replace(second, plus=first.plus)
    other_group = replace(third, group=Orthogonal(5))
    more_views = replace(third, plus=(*third.plus, View("bias", 0, 2, 5)))
    squared = replace(third, group=PositiveDiagonal(5), minus=(replace(third.minus[0], power=2.0),))
    assert [len(b.joints) for b in buckets([first, second, third])] == [3]
    for odd in (overlapping, other_group, more_views, squared):
        assert [[j.name for j in b.joints] for b in buckets([first, odd])] == [[first.name], [odd.name]]
    assert [len(b.joints) for b in buckets([first, overlapping, third])] == [2, 1]
