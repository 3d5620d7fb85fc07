"""The groups that act on a joint: their Lie algebras, their random elements, and how far a radius reaches.

An element of a joint with `heads` equal heads of width h is a tensor with one row of numbers per head:
    dense groups (GL, O, rotary)   g (heads, h, h)
    diagonal groups                g (heads, h), the diagonal
    permutations                   g (heads, h) int64: row i of the result is row g[i]
A radius bounds every independent factor of the group by itself: the Frobenius norm of log g for a dense
block of one head, |log s| for each entry of a diagonal, the modulus of the logarithm for each rotary plane.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group(ABC):
    """A subgroup of GL(width); `form` says how its elements are stored."""

    width: int

    form = "dense"
    holds_rotations = False
    holds_stretches = True

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}; drop joints of width 0")

    @property
    @abstractmethod
    def dim(self) -> int:
        """Continuous dimensions of one head."""

    @abstractmethod
    def random(
        self, heads: int, radius: float, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """A random element, each factor at distance `radius` from the identity; a permutation moves every unit."""

    @abstractmethod
    def inverse(self, g: Tensor) -> Tensor:
        """g⁻¹ in the group's own form."""

    def identity(self, heads: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.eye(self.width, dtype=dtype).expand(heads, -1, -1).clone()

    def check(self, g: Tensor, heads: int, joint: str) -> Tensor:
        """Return g with its head axis, or say what is wrong with it.

        Errors: ValueError if the shape is not the one of the group's form or an entry is not finite.
        """
        shape = (heads, self.width, self.width) if self.form == "dense" else (heads, self.width)
        if heads == 1 and tuple(g.shape) == shape[1:]:
            g = g.unsqueeze(0)
        if tuple(g.shape) != shape:
            raise ValueError(f"element of joint {joint!r} must have shape {shape} for {self}, got {tuple(g.shape)}")
        if self.form != "permutation" and not g.is_floating_point():
            raise ValueError(f"element of joint {joint!r} must be a floating tensor for {self}, got {g.dtype}")
        if g.is_floating_point() and not bool(torch.isfinite(g).all()):
            raise ValueError(f"element of joint {joint!r} has a non-finite entry; pass a finite invertible element")
        return g


@dataclass(frozen=True)
class DenseGroup(Group):
    """Groups whose elements are matrices; `project` is the orthogonal projection on the Lie algebra."""

    @abstractmethod
    def project(self, matrix: Tensor) -> Tensor:
        """The element of the Lie algebra nearest to `matrix` (heads, h, h) in the Frobenius norm."""

    def orthogonal_factor(self, matrix: Tensor) -> Tensor:
        """Q of `matrix = Q R` with diag R > 0, within the group's rotations; (heads, h, h)."""
        raise ValueError(f"{self} holds no rotations; use a joint whose group does")

    def turn_to_eigenbasis(self, covariance: Tensor) -> Tensor:
        """Q, a rotation of the group, towards the basis where Qᵀ C Q is diagonal, for C (heads, h, h) symmetric.

        One step of orthogonal iteration from the present basis, which is what C is expressed in.
        """
        return self.orthogonal_factor(covariance)

    def scale_to(self, algebra: Tensor, radius: float, only_down: bool = False) -> Tensor:
        """`algebra` with every factor's norm set to `radius` (`only_down`: where it is larger); zero stays zero."""
        return algebra * _rescale(torch.linalg.matrix_norm(algebra, keepdim=True), radius, only_down)

    def factor_norm(self, algebra: Tensor) -> Tensor:
        """The largest norm over the factors of an algebra element, a 0-d tensor."""
        return torch.linalg.matrix_norm(algebra).amax() if algebra.numel() else algebra.new_zeros(())

    def inverse(self, g: Tensor) -> Tensor:
        inverse: Tensor = torch.linalg.inv(g)
        return inverse

    def random(
        self, heads: int, radius: float, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        noise = torch.randn(heads, self.width, self.width, generator=generator, dtype=torch.float64)
        element: Tensor = torch.linalg.matrix_exp(self.scale_to(self.project(noise), radius))
        return element.to(dtype)


@dataclass(frozen=True)
class GeneralLinear(DenseGroup):
    """GL(h): every invertible matrix (V–O, Q–K without rotary embedding, LoRA B·A)."""

    holds_rotations = True

    @property
    def dim(self) -> int:
        return self.width**2

    def project(self, matrix: Tensor) -> Tensor:
        return matrix

    def orthogonal_factor(self, matrix: Tensor) -> Tensor:
        return _positive_qr(matrix)

    def __str__(self) -> str:
        return f"GL({self.width})"


@dataclass(frozen=True)
class Orthogonal(DenseGroup):
    """O(h), or the rotations of O(h) that keep the vector of ones (a residual stream under LayerNorm)."""

    fixes_ones: bool = False

    holds_rotations = True
    holds_stretches = False

    @property
    def dim(self) -> int:
        free = self.width - 1 if self.fixes_ones else self.width
        return free * (free - 1) // 2

    def project(self, matrix: Tensor) -> Tensor:
        if self.fixes_ones:
            matrix = matrix - matrix.mean(-1, keepdim=True)
            matrix = matrix - matrix.mean(-2, keepdim=True)
        return (matrix - matrix.mT) / 2

    def orthogonal_factor(self, matrix: Tensor) -> Tensor:
        if not self.fixes_ones:
            return _positive_qr(matrix)
        inner = _positive_qr(_reflect_ones(matrix)[..., 1:, 1:])
        q = torch.zeros_like(matrix)
        q[..., 0, 0] = 1.0
        q[..., 1:, 1:] = inner
        return _reflect_ones(q)

    def inverse(self, g: Tensor) -> Tensor:
        return g.mT

    def check(self, g: Tensor, heads: int, joint: str) -> Tensor:
        g = super().check(g, heads, joint)
        wide = g.double()
        error = float((wide @ wide.mT - torch.eye(self.width, dtype=wide.dtype, device=g.device)).abs().amax())
        if error > 64 * torch.finfo(g.dtype).eps * self.width**0.5:
            raise ValueError(
                f"element of joint {joint!r} must be orthogonal, its deviation from orthogonality is {error:.1e}; "
                f"take the Q of its QR decomposition"
            )
        if self.fixes_ones and float((wide.sum(-1) - 1).abs().amax()) > 64 * torch.finfo(g.dtype).eps * self.width**0.5:
            raise ValueError(
                f"element of joint {joint!r} must keep the vector of ones (LayerNorm's mean); "
                f"take group.orthogonal_factor of a matrix"
            )
        return g

    def __str__(self) -> str:
        return f"O({self.width}) fixing ones" if self.fixes_ones else f"O({self.width})"


@dataclass(frozen=True)
class Rotary(DenseGroup):
    """What commutes with a rotary embedding: one complex number per rotated plane, GL on the part that is not rotated.

    `rotary` leading dimensions are rotated; layout "half" pairs (i, i + rotary/2), "interleaved" (2i, 2i + 1).
    """

    rotary: int = 0
    layout: str = "half"

    holds_rotations = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layout not in ("half", "interleaved"):
            raise ValueError(f"layout must be 'half' or 'interleaved', got {self.layout!r}")
        if self.rotary % 2 or not 0 < self.rotary <= self.width:
            raise ValueError(f"rotary must be even and in 2..{self.width}, got {self.rotary}")

    @property
    def dim(self) -> int:
        return self.rotary + (self.width - self.rotary) ** 2

    def _planes(self) -> tuple[slice, slice]:
        if self.layout == "half":
            return slice(0, self.rotary // 2), slice(self.rotary // 2, self.rotary)
        return slice(0, self.rotary, 2), slice(1, self.rotary, 2)

    def _split(self, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Real and imaginary part of every plane's nearest complex number, and the block that is not rotated."""
        i, j = self._planes()
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        lower, upper = matrix[..., j, i].diagonal(dim1=-2, dim2=-1), matrix[..., i, j].diagonal(dim1=-2, dim2=-1)
        rest = matrix[..., self.rotary :, self.rotary :]
        return (diagonal[..., i] + diagonal[..., j]) / 2, (lower - upper) / 2, rest

    def _join(self, real: Tensor, imaginary: Tensor, rest: Tensor) -> Tensor:
        i, j = self._planes()
        out = real.new_zeros(*real.shape[:-1], self.width, self.width)
        out[..., i, i].diagonal(dim1=-2, dim2=-1).copy_(real)
        out[..., j, j].diagonal(dim1=-2, dim2=-1).copy_(real)
        out[..., j, i].diagonal(dim1=-2, dim2=-1).copy_(imaginary)
        out[..., i, j].diagonal(dim1=-2, dim2=-1).copy_(-imaginary)
        out[..., self.rotary :, self.rotary :] = rest
        return out

    def project(self, matrix: Tensor) -> Tensor:
        return self._join(*self._split(matrix))

    def scale_to(self, algebra: Tensor, radius: float, only_down: bool = False) -> Tensor:
        real, imaginary, rest = self._split(algebra)
        factor = _rescale(torch.hypot(real, imaginary), radius, only_down)
        return self._join(real * factor, imaginary * factor, super().scale_to(rest, radius, only_down))

    def factor_norm(self, algebra: Tensor) -> Tensor:
        real, imaginary, rest = self._split(algebra)
        return torch.maximum(torch.hypot(real, imaginary).amax(), super().factor_norm(rest))

    def orthogonal_factor(self, matrix: Tensor) -> Tensor:
        i, j = self._planes()
        first = matrix.diagonal(dim1=-2, dim2=-1)[..., i]
        angle = torch.atan2(matrix[..., j, i].diagonal(dim1=-2, dim2=-1), first)
        return self._join(angle.cos(), angle.sin(), _positive_qr(matrix[..., self.rotary :, self.rotary :]))

    def turn_to_eigenbasis(self, covariance: Tensor) -> Tensor:
        """The best angle of every plane, at most π/4; the part that is not rotated takes a step of the iteration.

        With [[a, b], [b, d]] the plane's covariance, tan 2θ = 2b / (a − d) makes it diagonal at once; of the two such
        bases up to order the nearer one is taken (Jacobi's inner rotation), since second moments stay behind.
        """
        i, j = self._planes()
        diagonal = covariance.diagonal(dim1=-2, dim2=-1)
        spread = diagonal[..., i] - diagonal[..., j]
        b = covariance[..., j, i].diagonal(dim1=-2, dim2=-1)
        angle = torch.atan2(torch.where(spread < 0, -2 * b, 2 * b), spread.abs()) / 2
        return self._join(angle.cos(), angle.sin(), _positive_qr(covariance[..., self.rotary :, self.rotary :]))

    def check(self, g: Tensor, heads: int, joint: str) -> Tensor:
        g = super().check(g, heads, joint)
        # the group is the invertible part of its own algebra, so membership is being one's own projection
        outside = float((g - self.project(g)).abs().amax())
        if outside > 64 * torch.finfo(g.dtype).eps * float(g.abs().amax()):
            raise ValueError(
                f"element of joint {joint!r} must commute with the rotary embedding, it is off by {outside:.1e} "
                f"for {self}; pass group.project(g)"
            )
        return g

    def __str__(self) -> str:
        partial = f" of {self.rotary}" if self.rotary < self.width else ""
        return f"rotary({self.width}){partial} {self.layout}"


def _rescale(norm: Tensor, radius: float, only_down: bool) -> Tensor:
    factor = torch.where(norm > 0, radius / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0.0)
    return factor.clamp_max(1.0) if only_down else factor


def _positive_qr(matrix: Tensor) -> Tensor:
    q: Tensor
    q, r = torch.linalg.qr(matrix)
    return q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype).unsqueeze(-2)


def _reflect_ones(matrix: Tensor) -> Tensor:
    """H M H with the Householder reflection H that exchanges ones/√width and the first basis vector."""
    width = matrix.shape[-1]
    if width == 1:
        return matrix
    u = torch.full((width,), 1 / math.sqrt(width), dtype=matrix.dtype, device=matrix.device)
    u[0] -= 1.0
    u = u / u.norm() * math.sqrt(2)
    half = matrix - (matrix @ u).unsqueeze(-1) * u
    reflected: Tensor = half - u.unsqueeze(-1) * (u @ half).unsqueeze(-2)
    return reflected
