"""Dense groups: their elements, algebras and dimensions are what the mathematics says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from teleport_fast.symmetry.groups import DenseGroup, GeneralLinear, Orthogonal, Rotary

RADIUS, HEADS = 0.5, 3
GROUPS = [
    GeneralLinear(5),
    Orthogonal(5),
    Orthogonal(6, fixes_ones=True),
    Rotary(6, rotary=6, layout="half"),
    Rotary(6, rotary=6, layout="interleaved"),
    Rotary(7, rotary=4, layout="half"),
    Rotary(7, rotary=4, layout="interleaved"),
]
every_group = pytest.mark.parametrize("group", GROUPS, ids=str)
rotary_groups = pytest.mark.parametrize("group", [g for g in GROUPS if isinstance(g, Rotary)], ids=str)


def logarithm(g: Tensor) -> Tensor:
    """log g by its series, which converges for ‖g − I‖ < 1: e^0.5 − 1 = 0.65 here."""
    x = g - torch.eye(g.shape[-1], dtype=g.dtype)
    power, total = x.clone(), x.clone()
    for k in range(2, 140):
        power = -power @ x
        total += power / k
    return total


def noise(group: DenseGroup) -> Tensor:
    return torch.randn(HEADS, group.width, group.width, dtype=torch.float64)


def draw(group: DenseGroup) -> Tensor:
    return group.random(HEADS, RADIUS, torch.Generator().manual_seed(2), torch.float64)


def planes(group: Rotary) -> list[tuple[int, int]]:
    half = group.rotary // 2
    return [(i, i + half) if group.layout == "half" else (2 * i, 2 * i + 1) for i in range(half)]


def rotary_matrix(group: Rotary, position: float) -> Tensor:
    """What a rotary embedding does to a head at one position: plane i turns by position · 100^(−i/planes)."""
    matrix = torch.eye(group.width, dtype=torch.float64)
    for i, (a, b) in enumerate(planes(group)):
        angle = torch.tensor(position * 100 ** (-2 * i / group.rotary), dtype=torch.float64)
        matrix[a, a] = matrix[b, b] = angle.cos()
        matrix[b, a], matrix[a, b] = angle.sin(), -angle.sin()
    return matrix


@every_group
def test_a_random_element_lies_at_the_radius_in_every_factor(group: DenseGroup) -> None:
    algebra = logarithm(draw(group))
    torch.testing.assert_close(group.project(algebra), algebra, rtol=0, atol=1e-13)
    if isinstance(group, Rotary):
        lengths = [torch.hypot(algebra[:, a, a], algebra[:, b, a]) for a, b in planes(group)]
        if group.rotary < group.width:
            lengths.append(torch.linalg.matrix_norm(algebra[:, group.rotary :, group.rotary :]))
    else:
        lengths = [torch.linalg.matrix_norm(algebra)]
    torch.testing.assert_close(torch.stack(lengths), torch.full((len(lengths), HEADS), RADIUS, dtype=torch.float64))


@every_group
def test_the_projection_is_orthogonal(group: DenseGroup) -> None:
    matrix, inside = noise(group), group.project(noise(group))
    projected = group.project(matrix)
    torch.testing.assert_close(group.project(projected), projected, rtol=0, atol=1e-14)
    assert ((matrix - projected) * inside).sum((1, 2)).abs().max() < 1e-13


@every_group
def test_dim_is_the_rank_of_the_algebra(group: DenseGroup) -> None:
    units = torch.eye(group.width**2, dtype=torch.float64).unflatten(1, (group.width, group.width))
    assert group.dim == int(torch.linalg.matrix_rank(group.project(units).flatten(1)))


@every_group
def test_the_inverse_undoes_and_the_identity_does_nothing(group: DenseGroup) -> None:
    g = draw(group)
    identity = group.identity(HEADS, torch.float64)
    torch.testing.assert_close(g @ group.inverse(g), identity, rtol=0, atol=1e-13)
    assert torch.equal(identity @ g, g)


@every_group
def test_products_stay_in_the_group(group: DenseGroup) -> None:
    product = draw(group) @ group.random(HEADS, 1.5, torch.Generator().manual_seed(3), torch.float64)
    assert torch.equal(group.check(product, HEADS, "joint"), product)


@pytest.mark.parametrize(
    "group", [g for g in GROUPS if not isinstance(g, GeneralLinear)], ids=lambda group: f"{group} is proper"
)
def test_a_general_matrix_is_not_in_a_proper_subgroup(group: DenseGroup) -> None:
    g = GeneralLinear(group.width).random(HEADS, RADIUS, torch.Generator().manual_seed(2), torch.float64)
    with pytest.raises(ValueError, match="element of joint 'joint' must"):
        group.check(g, HEADS, "joint")


@rotary_groups
def test_rotary_elements_commute_with_the_embedding_and_not_with_the_other_layout(group: Rotary) -> None:
    g = draw(group)
    other = Rotary(group.width, group.rotary, "half" if group.layout == "interleaved" else "interleaved")
    right, wrong = rotary_matrix(group, 3.0), rotary_matrix(other, 3.0)
    assert (g @ right - right @ g).abs().max() < 1e-14
    assert (g @ wrong - wrong @ g).abs().max() > 1e-2


@rotary_groups
def test_the_rotary_algebra_is_all_that_commutes(group: Rotary) -> None:
    """The matrices that commute with one generic position, counted numerically, have the group's dimension."""
    eye = torch.eye(group.width, dtype=torch.float64)
    r = rotary_matrix(group, 1.0)
    equations = torch.kron(r, eye) - torch.kron(eye, r.mT.contiguous())
    commutant = group.width**2 - int(torch.linalg.matrix_rank(equations))
    assert commutant == group.dim


def test_a_stream_under_layernorm_keeps_its_ones() -> None:
    ones = torch.ones(6, 1, dtype=torch.float64)
    keeps, moves = draw(Orthogonal(6, fixes_ones=True)), draw(Orthogonal(6))
    assert (keeps @ ones - ones).abs().max() < 1e-14
    assert (moves @ ones - ones).abs().max() > 1e-2


@every_group
def test_the_orthogonal_factor_is_a_rotation_of_the_group(group: DenseGroup) -> None:
    wide = torch.randn(HEADS, group.width, 3 * group.width, dtype=torch.float64)
    q = group.orthogonal_factor(wide @ wide.mT)
    torch.testing.assert_close(q @ q.mT, group.identity(HEADS, torch.float64), rtol=0, atol=1e-13)
    assert torch.equal(group.check(q, HEADS, "joint"), q)
    eye = group.identity(HEADS, torch.float64)
    torch.testing.assert_close(group.orthogonal_factor(2 * eye), eye, rtol=0, atol=1e-14)


@pytest.mark.parametrize("group", [GeneralLinear(5), Orthogonal(5)], ids=str)
def test_the_orthogonal_factor_leaves_a_triangle_with_positive_diagonal(group: DenseGroup) -> None:
    matrix = noise(group)
    r = group.orthogonal_factor(matrix).mT @ matrix
    assert r.tril(-1).abs().max() < 1e-13
    assert r.diagonal(dim1=-2, dim2=-1).min() > 0


@every_group
def test_scaling_sets_every_factor_and_only_down_leaves_short_ones(group: DenseGroup) -> None:
    algebra = group.project(noise(group))
    torch.testing.assert_close(group.factor_norm(group.scale_to(algebra, 0.3)), torch.tensor(0.3, dtype=torch.float64))
    assert group.factor_norm(algebra) > 0.3
    torch.testing.assert_close(group.scale_to(algebra, 100.0, only_down=True), algebra)
    short = group.scale_to(algebra, 0.3, only_down=True)
    torch.testing.assert_close(group.factor_norm(short), torch.tensor(0.3, dtype=torch.float64))
    zero = torch.zeros_like(algebra)
    assert torch.equal(group.scale_to(zero, 0.3), zero)


@every_group
def test_the_same_generator_gives_the_same_element_in_the_wanted_dtype(group: DenseGroup) -> None:
    assert torch.equal(draw(group), draw(group))
    single = group.random(HEADS, RADIUS, torch.Generator().manual_seed(2))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, draw(group).float())


def test_width_one_is_a_sign_or_a_scale() -> None:
    assert GeneralLinear(1).dim == 1
    assert float(GeneralLinear(1).random(1, RADIUS, dtype=torch.float64).log().abs()) == pytest.approx(RADIUS)
    for group in (Orthogonal(1), Orthogonal(1, fixes_ones=True)):
        assert group.dim == 0
        assert group.random(1, RADIUS).tolist() == [[[1.0]]]
        assert group.orthogonal_factor(torch.full((1, 1, 1), 3.0)).tolist() == [[[1.0]]]


@every_group
def test_check_adds_the_head_axis_of_a_single_head(group: DenseGroup) -> None:
    g = group.random(1, RADIUS, dtype=torch.float64)
    assert torch.equal(group.check(g[0], 1, "joint"), g)


@every_group
def test_check_names_what_is_wrong(group: DenseGroup) -> None:
    h = group.width
    with pytest.raises(ValueError, match=rf"shape \(3, {h}, {h}\) for .*, got \(2, {h}, {h}\)"):
        group.check(draw(group)[:2], HEADS, "joint")
    broken = draw(group)
    broken[1, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="'joint' has a non-finite entry"):
        group.check(broken, HEADS, "joint")
    with pytest.raises(ValueError, match=r"must be a floating tensor .*, got torch.int64"):
        group.check(draw(group).long(), HEADS, "joint")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GeneralLinear(0), "width must be at least 1, got 0"),
        (lambda: Rotary(6, rotary=5), "rotary must be even and in 2..6, got 5"),
        (lambda: Rotary(6, rotary=8), "rotary must be even and in 2..6, got 8"),
        (lambda: Rotary(6), "rotary must be even and in 2..6, got 0"),
        (lambda: Rotary(6, rotary=6, layout="neox"), "layout must be 'half' or 'interleaved', got 'neox'"),
    ],
)
def test_impossible_groups_are_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()
