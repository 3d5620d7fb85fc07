"""The condition number of an element: that of its worst head, whatever its form."""

from __future__ import annotations

import pytest
import torch

from teleport_fast.symmetry import GeneralLinear
from teleport_fast.symmetry.bucket import Element, Split
from teleport_fast.symmetry.condition import condition_numbers


def test_it_is_torchs_of_the_worst_head() -> None:
    group = GeneralLinear(5)
    g = group.random(3, 0.5, dtype=torch.float64) * torch.tensor([1.0, 7.0, 0.1], dtype=torch.float64)[:, None, None]
    assert float(Element.of(group, g).condition()) == pytest.approx(float(torch.linalg.cond(g).max()))
    assert float(Element.of(group, g).condition()) > 1.01


def test_a_rotation_has_one_and_a_stretched_one_has_its_stretch() -> None:
    rotation = torch.linalg.qr(torch.randn(2, 6, 6, dtype=torch.float64))[0]
    stretched = rotation * torch.tensor([1.0, 1, 1, 1, 1, 5], dtype=torch.float64)
    assert float(Element.of(GeneralLinear(6), rotation).condition()) == pytest.approx(1)
    assert float(Element.of(GeneralLinear(6), torch.cat([rotation, stretched])).condition()) == pytest.approx(5)


def test_diagonals_permutations_and_sides() -> None:
    diagonal = Element("diagonal", torch.tensor([[1.0, -4.0, 2.0], [9.0, 9.0, 27.0]]))
    assert float(diagonal.condition()) == 4
    assert float(Element("permutation", torch.tensor([[1, 0]])).condition()) == 1
    assert float(Split(diagonal, Element("diagonal", torch.tensor([[7.0, 1.0]]))).condition()) == 7


def test_half_precision_is_widened() -> None:
    g = torch.diag(torch.tensor([300.0, 1.0])).bfloat16()[None]
    condition = condition_numbers(g).amax()
    assert condition.dtype == torch.float32 and float(condition) == 300


def test_an_element_goes_where_its_tensors_lie() -> None:
    group, there = GeneralLinear(3), torch.device("meta")
    element = Element.of(group, group.random(2, 0.5))
    assert element.to(torch.device("cpu")) is element
    moved = element.to(there)
    assert moved.g_inverse_t is not None
    assert [moved.form, moved.g.device, moved.g_inverse_t.device] == ["dense", there, there]
    diagonal = Element("diagonal", torch.ones(2, 3)).to(there)
    assert (diagonal.g.device, diagonal.g_inverse_t) == (there, None)
    sides = Split(element, element).to(there)
    assert (sides.plus.g.device, sides.minus.g.device) == (there, there)
