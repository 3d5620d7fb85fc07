"""Groups without rotations: diagonals, which scale the units of a joint, and permutations, which reorder them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from teleport_fast.symmetry.groups import Group


@dataclass(frozen=True)
class Diagonal(Group):
    """Diagonal matrices with entries of any non-zero sign (gated MLPs, norm gains and their readers)."""

    form = "diagonal"
    signs = True

    @property
    def dim(self) -> int:
        return self.width

    def identity(self, heads: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(heads, self.width, dtype=dtype)

    def inverse(self, g: Tensor) -> Tensor:
        return g.reciprocal()

    def random(
        self, heads: int, radius: float, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        side = torch.randint(2, (heads, self.width), generator=generator) * 2 - 1
        scale = torch.exp(side.double() * radius)
        if self.signs:
            scale = scale * (torch.randint(2, (heads, self.width), generator=generator) * 2 - 1)
        return scale.to(dtype)

    def check(self, g: Tensor, heads: int, joint: str) -> Tensor:
        g = super().check(g, heads, joint)
        bad = (g == 0) if self.signs else (g <= 0)
        if bool(bad.any()):
            wanted = "non-zero" if self.signs else "positive"
            first = float(g[bad][0])
            raise ValueError(f"element of joint {joint!r} must have {wanted} entries for {self}, got {first}")
        return g

    def __str__(self) -> str:
        return f"diagonal({self.width})"


@dataclass(frozen=True)
class PositiveDiagonal(Diagonal):
    """Diagonal matrices with positive entries (ReLU, LeakyReLU, PReLU, ReLU² and other homogeneous activations)."""

    signs = False

    def __str__(self) -> str:
        return f"positive diagonal({self.width})"


@dataclass(frozen=True)
class Signs(Diagonal):
    """Diagonal matrices with entries ±1 (units that only a norm's gain or a residual stream tells apart)."""

    holds_stretches = False

    @property
    def dim(self) -> int:
        return 0

    def random(
        self, heads: int, radius: float, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        signs = torch.randint(2, (heads, self.width), generator=generator) * 2 - 1
        signs[:, 0] = torch.where((signs == 1).all(1), -1, signs[:, 0])  # the draw is never the identity
        return signs.to(dtype)

    def check(self, g: Tensor, heads: int, joint: str) -> Tensor:
        g = super().check(g, heads, joint)
        if bool((g.abs() != 1).any()):
            raise ValueError(f"element of joint {joint!r} must have entries 1 or -1 for {self}; pass its signs")
        return g

    def __str__(self) -> str:
        return f"signs({self.width})"


@dataclass(frozen=True)
class Permutation(Group):
    """Permutations of the joint's units (any pointwise activation)."""

    form = "permutation"
    holds_stretches = False

    @property
    def dim(self) -> int:
        return 0

    def identity(self, heads: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.arange(self.width).expand(heads, -1).clone()

    def inverse(self, g: Tensor) -> Tensor:
        return g.argsort(-1)

    def random(
        self, heads: int, radius: float, generator: torch.Generator | None = None, dtype: torch.dtype = torch.int64
    ) -> Tensor:
        # a cyclic shift of a shuffle is conjugate to a shift, so no unit stays: the draw is never the identity
        shuffle = torch.stack([torch.randperm(self.width, generator=generator) for _ in range(heads)])
        moved = torch.empty_like(shuffle)
        return moved.scatter_(1, shuffle, shuffle.roll(1, dims=1))

    def check(self, g: Tensor, heads: int, joint: str) -> Tensor:
        g = super().check(g, heads, joint)
        if g.dtype != torch.int64 or not torch.equal(g.sort(-1).values, self.identity(heads).to(g.device)):
            raise ValueError(f"element of joint {joint!r} must be an int64 permutation of 0..{self.width - 1} per head")
        return g

    def __str__(self) -> str:
        return f"permutation({self.width})"
