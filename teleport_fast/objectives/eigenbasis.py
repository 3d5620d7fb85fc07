"""Rotations to the eigenbasis of the gradient covariance, where an elementwise second moment is the whole one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from teleport_fast.flag import Flag
from teleport_fast.objectives.base import Move, Objective, kept_where
from teleport_fast.ops.covariance import NORMALISE, covariance_
from teleport_fast.symmetry.bucket import Bucket, Element, Split
from teleport_fast.symmetry.groups import DenseGroup
from teleport_fast.symmetry.joint import Joint

TAKES = ("steps", "turns")
# columns of a gradient that are worth a part of their own
LEAST_PART = 32


class Eigenbasis(Objective):
    """Exact rotational teleportation (docs/mathematics.md, own): one warm step of orthogonal iteration at each refresh.

    Every step: C ← β C + (1 − β) Σ G Gᵀ/‖G‖² over a joint's matrices, in the present basis. At a refresh: Q R = qr(C)
    with diag R > 0, tensors go to the basis Q (g = Qᵀ), C ← Qᵀ C Q. Under a rotary embedding Q is the best angle of each
    plane, under LayerNorm it keeps the ones vector. Fixed points are the eigenbases of C. Related: ARO, arXiv 2602.09006.

    decay: β, per gradient that is taken up. normalise: what G Gᵀ is divided by: the "tensor"'s own ‖G‖², that of all
    tensors of the "joint", or "none". takes: gradients of all "steps", or of the "turns" alone, which costs C's share of
    a step only there. parts: every gradient that is taken up gives one of so many parts of its columns (of 32 at least), the
    next one the next part, at a `parts`-th of the cost. iterations: steps of the orthogonal iteration in one refresh.
    Errors: ValueError for a value out of range. Source: own derivation, checked by tests/objectives/test_eigenbasis.py.
    """

    name = "eigenbasis"
    directions = ("ascend",)
    holds = True
    stretches = False
    adds = False

    def __init__(
        self,
        decay: float = 0.95,
        normalise: str = "tensor",
        takes: str = "steps",
        parts: int = 4,
        iterations: int = 1,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}; 0.95 is the default")
        for name, value, allowed in (("normalise", normalise, NORMALISE), ("takes", takes, TAKES)):
            if value not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {value!r}; {allowed[0]!r} is the default"
                )
        for name, count, usual in (("parts", parts, 4), ("iterations", iterations, 1)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {count!r}; {usual} is the default")
        self.decay, self.normalise, self.takes = decay, normalise, takes
        self.parts, self.iterations = parts, iterations
        self.reads_tensors = takes == "turns"
        self.covariances: dict[int, Tensor] = {}
        self._next_part: dict[int, int] = {}
        # gradients that may turn out void, and the parts as they were before them
        self._unsettled: list[tuple[Flag, dict[int, int]]] = []

    def unusable(self, joint: Joint) -> str | None:
        if not joint.group.holds_rotations:
            return f"{joint.group} holds no rotations"
        if not any(view.counts for view in joint.views()):
            return "no matrix of this joint counts in its gradient covariance"
        return None

    def observe(self, index: int, bucket: Bucket, gradients: Mapping[str, Tensor]) -> None:
        if self.takes == "steps":
            self._take_up(index, bucket, gradients)

    def _take_up(self, index: int, bucket: Bucket, gradients: Mapping[str, Tensor]) -> None:
        part = self.next_part(index)
        counted = [
            [_part(view.of(gradients[view.parameter]), part, self.parts) for view in joint.views() if view.counts]
            for joint in bucket.joints
        ]
        first = counted[0][0]  # unusable() leaves no joint without one
        covariance = self.covariances.get(index)
        if covariance is None:
            dtype = torch.promote_types(first.dtype, torch.float32)
            shape = (len(bucket.joints) * bucket.heads, bucket.width, bucket.width)
            covariance = self.covariances[index] = torch.zeros(shape, dtype=dtype, device=first.device)
        if len({len(tensors) for tensors in counted}) == 1:
            covariance_(covariance, list(chain(*counted)), self.decay, len(bucket.joints), self.normalise)
            return
        for rows, tensors in zip(covariance.split(bucket.heads), counted, strict=True):
            covariance_(rows, tensors, self.decay, 1, self.normalise)

    def next_part(self, index: int) -> int:
        """Which part of its columns bucket `index` gives now; the next time it is the next one."""
        self._settle()
        part = self._next_part.get(index, 0)
        self._next_part[index] = (part + 1) % self.parts
        return part

    def take_in(self, index: int, mean: Tensor) -> None:
        """C ← β C + (1 − β) `mean` of bucket `index`, (joints·heads, h, h): Σ G Gᵀ/‖G‖² that was summed elsewhere."""
        covariance = self.covariances.setdefault(index, torch.zeros_like(mean))
        covariance.mul_(self.decay).add_(mean, alpha=1 - self.decay)

    def element(self, index: int, bucket: Bucket, move: Move) -> tuple[Element | Split, Tensor] | None:
        if self.takes == "turns":
            if index in self.covariances:
                self.covariances[index] = self.covariances[index].clone()
            self._take_up(index, bucket, move.gradients)
        return self.decide(index, bucket, (), move)

    def decide(self, index: int, bucket: Bucket, sums: Sequence[Tensor], move: Move) -> tuple[Element, Tensor] | None:
        covariance = self.covariances.get(index)
        if covariance is None:
            return None
        assert isinstance(bucket.group, DenseGroup)
        turn: Tensor | None = None
        for _ in range(self.iterations):
            q = bucket.group.turn_to_eigenbasis(_shifted(covariance))
            covariance = q.mT @ covariance @ q
            turn = q if turn is None else turn @ q
        assert turn is not None
        self.covariances[index] = covariance
        return Element("dense", turn.mT, turn.mT), _rotation_size(turn)

    def value(self, move: Move) -> Tensor:
        """The diagonal's share of ‖C‖²_F over all joints, in [0, 1]; 1 in an eigenbasis."""
        if not self.covariances:
            return torch.zeros(())
        whole = sum(c.square().sum() for c in self.covariances.values())
        inside = sum(c.diagonal(dim1=-2, dim2=-1).square().sum() for c in self.covariances.values())
        assert isinstance(whole, Tensor) and isinstance(inside, Tensor)
        return torch.where(whole > 0, inside / whole, 0.0)

    def unless(self, void: Tensor, work: Callable[[], None]) -> None:
        """The covariances are gated where they lie; which part comes next is set right when the host has heard of it."""
        before, parts = {index: c.clone() for index, c in self.covariances.items()}, dict(self._next_part)
        work()
        self.covariances = kept_where(void, before, self.covariances)
        if parts != self._next_part:
            self._unsettled.append((Flag(void), parts))

    def _settle(self) -> None:
        for void, parts in reversed(self._unsettled):
            if void.is_set():
                self._next_part = parts
        self._unsettled = []

    def state_dict(self) -> dict[str, Tensor]:
        self._settle()
        kept = {str(index): covariance.clone() for index, covariance in self.covariances.items()}
        if self.parts > 1:
            kept |= {f"part.{index}": torch.tensor(part) for index, part in self._next_part.items()}
        return kept

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._unsettled = []
        parts = {key: value for key, value in state.items() if key.startswith("part.")}
        self._next_part = {int(key.removeprefix("part.")): int(value) for key, value in parts.items()}
        self.covariances = {int(key): value.clone() for key, value in state.items() if key not in parts}


class RandomRotation(Objective):
    """The control for `Eigenbasis`: turns as often, to random bases; anything that only turning does shows here too."""

    name = "random"
    reads_tensors = False
    directions = ("ascend",)
    holds = True
    stretches = False

    def unusable(self, joint: Joint) -> str | None:
        return None if joint.group.holds_rotations else f"{joint.group} holds no rotations"

    def decide(self, index: int, bucket: Bucket, sums: Sequence[Tensor], move: Move) -> tuple[Element, Tensor] | None:
        like = move.parameters[bucket.joints[0].parameters()[0]]
        shape = (len(bucket.joints) * bucket.heads, bucket.width, bucket.width)
        noise = torch.randn(shape, generator=move.generator, dtype=torch.promote_types(like.dtype, torch.float32))
        assert isinstance(bucket.group, DenseGroup)
        q = bucket.group.orthogonal_factor(noise.to(like.device))
        return Element("dense", q.mT, q.mT), _rotation_size(q)

    def value(self, move: Move) -> Tensor:
        norms = torch._foreach_norm(list(move.gradients.values()), 1)
        return torch.stack([norm.double() for norm in norms]).sum()


def part_of_columns(view: Tensor, part: int, parts: int) -> tuple[int, slice] | None:
    """The axis and entries of one of so many parts of a view's columns (heads, h, outer, inner); None: all of them.

    Fewer parts where they would be too narrow. Columns that lie apart are dealt out in turn: neighbours in a vocabulary are
    alike, and a part of rare ones would count as much as one of common ones. Columns that lie side by side in memory are cut
    into runs.
    """
    axis = 3 if view.shape[3] >= view.shape[2] else 2
    columns = view.shape[axis]
    parts = min(parts, columns // LEAST_PART)
    if parts < 2:
        return None
    part %= parts
    if view.stride(axis) != 1:
        return axis, slice(part, columns, parts)
    return axis, slice(columns * part // parts, columns * (part + 1) // parts, 1)


def _part(view: Tensor, part: int, parts: int) -> Tensor:
    found = part_of_columns(view, part, parts)
    if found is None:
        return view
    axis, entries = found
    return view[:, :, :, entries] if axis == 3 else view[:, :, entries]


def _shifted(covariance: Tensor) -> Tensor:
    """C + 100 eps of its mean eigenvalue: directions that no gradient has seen stay, instead of turning by rounding."""
    mean = covariance.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    shifted = covariance.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(mean, alpha=100 * torch.finfo(covariance.dtype).eps)
    return shifted


def _rotation_size(q: Tensor) -> Tensor:
    """‖Q − I‖_F of the largest turn: the length of log Q to first order, without a logarithm."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    sizes: Tensor = torch.linalg.matrix_norm(q - eye)
    return sizes.amax()
