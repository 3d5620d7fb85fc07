"""Sums over the columns of a bucket's views, from which objectives decide; where columns lie on many ranks, they add up."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from teleport_fast.ops.gram_difference import gram_difference
from teleport_fast.ops.square_sums import square_sums


def grams(plus: list[Tensor], minus: list[Tensor], joints: int) -> tuple[Tensor, Tensor]:
    """S₊ and S₋ of a bucket, (joints·heads, h, h) each: the two halves of `gram_difference`."""
    if not plus:
        gram_minus = gram_difference([], minus, joints)[0]
        return torch.zeros_like(gram_minus), gram_minus
    gram_plus = -gram_difference(plus, [], joints)[0]
    return gram_plus, gram_difference([], minus, joints)[0] if minus else torch.zeros_like(gram_plus)


def row_sums(
    plus: list[Tensor], minus: list[Tensor], joints: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`square_sums` of both sides, each (squares, l1) of (joints·heads, h); a side without tensors has zeros."""
    if not plus:
        below = square_sums(minus, joints)
        return (torch.zeros_like(below[0]), torch.zeros_like(below[1])), below
    above = square_sums(plus, joints)
    return above, square_sums(minus, joints) if minus else (torch.zeros_like(above[0]), torch.zeros_like(above[1]))


def _difference(plus: list[Tensor], minus: list[Tensor], joints: int) -> tuple[Tensor, ...]:
    return (gram_difference(plus, minus, joints)[0],)


def _squares(plus: list[Tensor], minus: list[Tensor], joints: int) -> tuple[Tensor, ...]:
    return tuple(squares for squares, _ in row_sums(plus, minus, joints))


def _l1(plus: list[Tensor], minus: list[Tensor], joints: int) -> tuple[Tensor, ...]:
    return tuple(l1 for _, l1 in row_sums(plus, minus, joints))


# name → (how many tensors, their dimensions after joints·heads, the sum): S₋ − S₊; S₊ and S₋; Σ x² and Σ |x| of both sides by row
SUMS: dict[str, tuple[int, int, Callable[[list[Tensor], list[Tensor], int], tuple[Tensor, ...]]]] = {
    "difference": (1, 2, _difference),
    "grams": (2, 2, grams),
    "squares": (2, 1, _squares),
    "l1": (2, 1, _l1),
}
