"""The two relations of hidden units: scales tied with exponents, seats permuted together."""

from __future__ import annotations

import pytest
import torch

from teleport_fast.discovery.trace.units import BENT, FIXED, PINNED, POSITIVE, Units


def scale_of(units: Units, a: int, b: int) -> float | None:
    """The exponent e of s_a = s_b ** e, or None where they are not tied."""
    (root_a, e_a), (root_b, e_b) = units.scale(a), units.scale(b)
    return e_a / e_b if root_a == root_b else None


def fixed(units: Units, unit: int) -> bool:
    return bool(units.scale_flags(units.scale(unit)[0]) & FIXED)


def test_exponents_multiply_along_ties_in_any_order() -> None:
    units = Units()
    a, b, c, d = units.new(4).split(1)
    units.tie(c, d, -1.0)
    units.tie(a, b, 2.0)
    units.tie(b, c, 3.0)
    assert scale_of(units, 0, 1) == 2
    assert scale_of(units, 0, 2) == 6
    assert scale_of(units, 0, 3) == -6
    assert len({units.seat(i) for i in range(4)}) == 1
    assert not fixed(units, 0)


def test_a_contradiction_fixes_the_scale_and_leaves_the_seat() -> None:
    units = Units()
    a, b = units.new(2).split(1)
    units.tie(a, b)
    units.tie(a, b)
    assert not fixed(units, 0)
    units.tie(a, b, -1.0)
    assert fixed(units, 0)
    assert fixed(units, 1)
    assert not units.seat_flags(units.seat(0)) & PINNED
    itself = units.new(1)
    units.tie(itself, itself, -1.0)
    assert fixed(units, int(itself))


def test_a_derived_unit_shares_the_seat_and_has_a_power_of_the_scale_or_one_of_its_own() -> None:
    units = Units()
    a = units.new(3)
    square, free = units.derive(a, 2.0), units.derive(a, None)
    assert [scale_of(units, int(u), i) for i, u in enumerate(square)] == [2.0, 2.0, 2.0]
    assert [scale_of(units, int(u), i) for i, u in enumerate(free)] == [None, None, None]
    assert [units.seat(int(u)) for u in free] == [units.seat(i) for i in range(3)]
    assert units.derive(torch.tensor([-1, 0, 0]), None).tolist()[0] == -1


def test_flags_are_those_of_all_that_is_tied() -> None:
    units = Units()
    a, b, c = units.new(3).split(1)
    units.positive(a)
    units.tie(a, b)
    assert units.scale_flags(units.scale(1)[0]) & POSITIVE
    assert units.seat_flags(units.seat(1)) & BENT
    units.pin(c, "told apart")
    units.tie(b, c)
    assert fixed(units, 0)
    assert units.seat_flags(units.seat(0)) & PINNED
    assert units.reasons == {2: "told apart"}


def test_what_meets_an_entry_that_is_no_unit_stays() -> None:
    units = Units()
    a = units.new(2)
    units.tie(a, torch.tensor([-1, 1]))
    assert fixed(units, 0)
    assert not fixed(units, 1)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_blocks_part_units_that_products_treat_apart(order: tuple[int, int]) -> None:
    units = Units()
    a = units.new(4)
    tags = (torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]))
    assert len({units.block(units.seat(i)) for i in range(4)}) == 1
    units.refine(a, tags[order[0]])
    assert len({units.block(units.seat(i)) for i in range(4)}) == 2
    units.refine(a, tags[order[1]])
    assert len({units.block(units.seat(i)) for i in range(4)}) == 4
