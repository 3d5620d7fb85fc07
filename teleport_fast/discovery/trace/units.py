"""Hidden units as the trace sees them: which scales are tied to which, and which units must be moved together."""

from __future__ import annotations

import torch
from torch import Tensor

# what is known of a unit's scale, and of its place among the others
FIXED, POSITIVE = 1, 2
PINNED, BENT, LINKED, MIXED = 1, 2, 4, 8


class Units:
    """Two relations on hidden units, numbered from 0; -1 in a tensor of units stands for an entry that is no unit.

    Scales: s_u = s_root ** exponent, a weighted union-find; FIXED: s = 1, POSITIVE: only s > 0 passes what comes after.
    Seats: units in one seat are permuted together; PINNED: not at all, BENT: something acts on single units, so that no
    dense matrix passes; LINKED: contracted with other units (queries and keys), MIXED: passed through attention. A seat's
    block separates units that a batched product treats apart (heads, groups of a convolution).
    Source: own derivation; the numeric probe decides about every joint that comes of it.
    """

    def __init__(self) -> None:
        self._scale: list[int] = []
        self._exponent: list[float] = []
        self._seat: list[int] = []
        self._scale_flags: list[int] = []
        self._seat_flags: list[int] = []
        self._block: list[int] = []
        self._blocks: dict[tuple[int, int], int] = {}
        self.reasons: dict[int, str] = {}

    def new(self, count: int) -> Tensor:
        first = len(self._seat)
        ids = range(first, first + count)
        self._scale += ids
        self._seat += ids
        self._exponent += [1.0] * count
        for flags in (self._scale_flags, self._seat_flags, self._block):
            flags += [0] * count
        return torch.arange(first, first + count)

    def scale(self, unit: int) -> tuple[int, float]:
        """(root, exponent) of a unit's scale."""
        path, exponent = [], 1.0
        while self._scale[unit] != unit:
            path.append(unit)
            unit = self._scale[unit]
        for at in reversed(path):
            exponent *= self._exponent[at]
            self._scale[at], self._exponent[at] = unit, exponent
        return unit, exponent

    def seat(self, unit: int) -> int:
        root = unit
        while self._seat[root] != root:
            root = self._seat[root]
        while self._seat[unit] != root:
            self._seat[unit], unit = root, self._seat[unit]
        return root

    def scale_flags(self, root: int) -> int:
        return self._scale_flags[root]

    def seat_flags(self, root: int) -> int:
        return self._seat_flags[root]

    def block(self, root: int) -> int:
        return self._block[root]

    def tie(self, a: Tensor, b: Tensor, exponent: float = 1.0) -> None:
        """a and b move together, s_a = s_b ** exponent; one that meets no unit is pinned."""
        if exponent != 1:
            same = (
                a.expand(torch.broadcast_shapes(a.shape, b.shape))[a.expand_as(b) == b] if a.ndim == b.ndim else a[:0]
            )
            self.fix(same, "its scale would have to be its own inverse or power")
        for u, v in _pairs(a, b):
            if u < 0 or v < 0:
                self.pin(torch.tensor([max(u, v)]), "it meets entries that do not move")
                continue
            self._tie_scale(u, v, exponent)
            self._tie_seat(u, v)

    def together(self, a: Tensor, b: Tensor) -> None:
        """a and b sit in one seat; their scales are their own. One that meets no unit keeps its place."""
        for u, v in _pairs(a, b):
            if u < 0 or v < 0:
                self.mark(torch.tensor([max(u, v)]), PINNED | BENT)
                continue
            self._tie_seat(u, v)

    def derive(self, a: Tensor, exponent: float | None) -> Tensor:
        """A new unit in the seat of each of a; its scale is s_a ** exponent, or free for None. Shape as a."""
        flat, inverse = torch.unique(a, return_inverse=True)
        fresh = self.new(len(flat))
        for old, young in zip(flat.tolist(), fresh.tolist(), strict=True):
            if old < 0:
                continue
            self._tie_seat(young, old)
            if exponent is not None:
                self._tie_scale(young, old, exponent)
        return torch.where(flat < 0, flat, fresh)[inverse]

    def fix(self, a: Tensor, reason: str) -> None:
        """The scale of a is one."""
        for u in _each(a):
            root, _ = self.scale(u)
            self._scale_flags[root] |= FIXED
            self.reasons.setdefault(u, reason)

    def pin(self, a: Tensor, reason: str) -> None:
        """a does not move at all."""
        self.fix(a, reason)
        self.mark(a, PINNED | BENT)

    def mark(self, a: Tensor, flags: int) -> None:
        for u in _each(a):
            self._seat_flags[self.seat(u)] |= flags

    def positive(self, a: Tensor) -> None:
        """Only positive scales pass (ReLU and its like), and nothing dense."""
        for u in _each(a):
            self._scale_flags[self.scale(u)[0]] |= POSITIVE
        self.mark(a, BENT)

    def refine(self, a: Tensor, tags: Tensor) -> None:
        """Units with different tags are treated apart; a unit with several has its first."""
        first: dict[int, int] = {}
        coded = torch.unique((a * 2**20 + tags)[a >= 0])
        for u, tag in zip((coded // 2**20).tolist(), (coded % 2**20).tolist(), strict=True):
            root = self.seat(u)
            first[root] = min(tag, first.get(root, tag))
        for root, tag in first.items():
            self._block[root] = self._intern(self._block[root], tag)

    def _intern(self, block: int, tag: int) -> int:
        return self._blocks.setdefault((block, tag), len(self._blocks) + 1)

    def _tie_scale(self, u: int, v: int, exponent: float) -> None:
        (root_u, e_u), (root_v, e_v) = self.scale(u), self.scale(v)
        if root_u == root_v:
            if e_u != e_v * exponent:
                self._scale_flags[root_u] |= FIXED
                self.reasons.setdefault(u, "its scale would have to be its own inverse or power")
            return
        self._scale[root_u], self._exponent[root_u] = root_v, e_v * exponent / e_u
        self._scale_flags[root_v] |= self._scale_flags[root_u]

    def _tie_seat(self, u: int, v: int) -> None:
        root_u, root_v = self.seat(u), self.seat(v)
        if root_u == root_v:
            return
        self._seat[root_u] = root_v
        self._seat_flags[root_v] |= self._seat_flags[root_u]
        ours, theirs = self._block[root_u], self._block[root_v]
        if ours != theirs:
            self._block[root_v] = (
                ours or theirs if not (ours and theirs) else self._intern(min(ours, theirs), max(ours, theirs))
            )


def _pairs(a: Tensor, b: Tensor) -> list[tuple[int, int]]:
    """Distinct pairs of different units."""
    a, b = torch.broadcast_tensors(a, b)
    differ = a != b
    coded = torch.unique((a[differ] + 1) * 2**32 + b[differ] + 1)
    return list(zip((coded // 2**32 - 1).tolist(), (coded % 2**32 - 1).tolist(), strict=True))


def _each(a: Tensor) -> list[int]:
    return [u for u in torch.unique(a).tolist() if u >= 0]
