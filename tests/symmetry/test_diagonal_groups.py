"""Diagonals and permutations: signs, radius, inverses, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from teleport_fast.symmetry.diagonal_groups import Diagonal, Permutation, PositiveDiagonal, Signs
from teleport_fast.symmetry.groups import Group

diagonals = pytest.mark.parametrize("group", [Diagonal(40), PositiveDiagonal(40), Diagonal(1)], ids=str)


@diagonals
def test_every_entry_lies_at_the_radius(group: Diagonal) -> None:
    s = group.random(2, 0.7, torch.Generator().manual_seed(0), torch.float64)
    torch.testing.assert_close(s.abs().log().abs(), torch.full_like(s, 0.7))
    assert torch.equal(group.check(s, 2, "joint"), s)


def test_only_the_signed_group_draws_signs() -> None:
    generator = torch.Generator().manual_seed(0)
    assert bool((Diagonal(40).random(1, 0.5, generator) < 0).any())
    assert bool((PositiveDiagonal(40).random(1, 0.5, generator) > 0).all())
    assert bool((PositiveDiagonal(40).random(1, 0.5, generator) < 1).any())


@diagonals
def test_the_inverse_of_a_diagonal_undoes_it(group: Diagonal) -> None:
    s = group.random(2, 0.7, dtype=torch.float64)
    torch.testing.assert_close(s * group.inverse(s), group.identity(2, torch.float64))


def test_a_diagonal_has_one_dimension_per_unit_and_a_permutation_none() -> None:
    assert (Diagonal(7).dim, PositiveDiagonal(7).dim, Permutation(7).dim) == (7, 7, 0)
    assert Diagonal(7) != PositiveDiagonal(7)


@given(width=st.integers(2, 30), heads=st.integers(1, 4), seed=st.integers(0, 1000))
def test_a_random_permutation_moves_every_unit(width: int, heads: int, seed: int) -> None:
    group = Permutation(width)
    g = group.random(heads, 0.5, torch.Generator().manual_seed(seed))
    assert torch.equal(group.check(g, heads, "joint"), g)
    assert not bool((g == torch.arange(width)).any())


@given(width=st.integers(1, 12), seed=st.integers(0, 1000))
def test_the_inverse_of_a_permutation_undoes_it(width: int, seed: int) -> None:
    g = torch.randperm(width, generator=torch.Generator().manual_seed(seed))[None]
    rows = torch.randn(1, width)
    there = rows.gather(1, g)
    assert torch.equal(there.gather(1, Permutation(width).inverse(g)), rows)


def test_a_permutation_of_one_unit_is_the_identity() -> None:
    assert Permutation(1).random(3, 0.5).tolist() == [[0], [0], [0]]
    assert Permutation(3).identity(2).tolist() == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize(
    ("group", "g", "message"),
    [
        (Diagonal(2), torch.ones(2, 2, 2), r"must have shape \(2, 2\) for diagonal\(2\), got \(2, 2, 2\)"),
        (Diagonal(2), torch.tensor([[-3.0, 1.0], [0.0, 1.0]]), "non-zero entries .*, got 0.0"),
        (PositiveDiagonal(2), torch.tensor([[3.0, 1.0], [1.0, -2.0]]), "positive entries .*, got -2.0"),
        (PositiveDiagonal(2), torch.tensor([[3.0, 1.0], [1.0, 0.0]]), "positive entries .*, got 0.0"),
        (Diagonal(2), torch.tensor([[1.0, float("inf")], [1.0, 1.0]]), "non-finite entry"),
        (Diagonal(2), torch.tensor([[1, 2], [1, 1]]), "must be a floating tensor"),
        (Permutation(2), torch.tensor([[0, 1], [1, 1]]), r"int64 permutation of 0\.\.1 per head"),
        (Permutation(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), "int64 permutation"),
        (Permutation(2), torch.tensor([[1, 0]]), r"must have shape \(2, 2\)"),
        (Signs(2), torch.ones(3), r"must have shape \(2, 2\) for signs\(2\)"),
    ],
)
def test_check_names_what_is_wrong(group: Diagonal, g: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group.check(g, 2, "joint")
    with pytest.raises(ValueError, match="element of joint 'by name' "):
        group.check(g, 2, "by name")


@pytest.mark.parametrize("group", [Diagonal(9), PositiveDiagonal(9), Signs(9), Permutation(9)], ids=str)
def test_a_generator_decides_the_draw_alone(group: Group) -> None:
    draws = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        draws.append(group.random(3, 0.5, torch.Generator().manual_seed(0)))
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], group.random(3, 0.5, torch.Generator().manual_seed(1)))


def test_a_signed_diagonal_takes_negative_entries() -> None:
    g = torch.tensor([-2.0, 0.5])
    assert torch.equal(Diagonal(2).check(g, 1, "joint"), g[None])


def test_signs_are_one_or_minus_one_and_never_all_one() -> None:
    for width in (1, 2, 5):
        g = Signs(width).random(64, 0.5, torch.Generator().manual_seed(0), torch.float64)
        assert set(g.flatten().tolist()) <= {-1.0, 1.0}
        assert bool((g == -1).any(1).all())
        assert torch.equal(Signs(width).check(g, 64, "joint"), g)
    assert Signs(5).dim == 0
    assert not Signs(5).holds_stretches
    with pytest.raises(ValueError, match="must have entries 1 or -1 for signs"):
        Signs(2).check(torch.tensor([[1.0, 2.0]]), 1, "joint")
