"""Preconditioners from the weights: each side of a joint steps where the other side is orthonormal, and comes back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teleport_fast.objectives.base import Move, Objective
from teleport_fast.schedule import Schedule, When
from teleport_fast.symmetry.bucket import Bucket, Element, Split
from teleport_fast.symmetry.groups import DenseGroup, GeneralLinear
from teleport_fast.symmetry.joint import Joint


class Scaled(Objective):
    """ScaledGD as a teleport: P = A₋A₋ᵀ for the writers' step, P⁻¹ = A₊A₊ᵀ for the readers', in the frame "return".

    With SGD: ΔA₊ = −η (A₋A₋ᵀ)⁻¹ G₊, ΔA₋ = −η (A₊A₊ᵀ)⁻¹ G₋. SGD sees P = gᵀg alone; other optimizers see g, so its rotation is
    fixed by the gradients: it starts as the eigenbasis of g⁻ᵀ G₊G₊ᵀ g⁻¹ and follows, by one orthogonal iteration a step,
    C ← `decay` C + (1 − decay) S/tr S of that S. For GL(h) every base optimizer's step is then the same for all
    factorizations of one product A₋ᵀA₊. A side whose partner is zero (LoRA's B before its first step) is left as it is;
    a partner's eigenvalue below `ridge` times the mean one counts as that much. Between the steps at which the schedule
    fires, steps are plain.
    Errors: ValueError if decay is not in [0, 1) or ridge not positive. Source: ScaledGD, arXiv 2005.08898, section 1.1; the
    rotation is our own, tests/objectives/test_scaled.py.

    >>> Scaled().frames
    ('return',)
    """

    name = "scaled"
    directions = ("ascend",)
    frames = ("return",)

    def __init__(self, decay: float = 0.95, ridge: float = 1e-12) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}; 0.95 is the default")
        if not ridge > 0:
            raise ValueError(f"ridge must be positive, got {ridge}; 1e-12 is the default")
        self.decay, self.ridge = decay, ridge
        # bucket and side → (frame, covariance), (joints·heads, h, h) float64 each; a zero covariance: not begun
        self._sides: dict[str, tuple[Tensor, Tensor]] = {}
        # sides whose every covariance has begun: nothing has to be looked at there any more
        self._begun: set[str] = set()

    def default_schedule(self) -> Schedule:
        schedule = When(_always)
        schedule.agrees = True
        return schedule

    def unusable(self, joint: Joint) -> str | None:
        if not (isinstance(joint.group, DenseGroup) and joint.group.holds_stretches):
            return f"{joint.group} holds no dense stretches"
        return None if joint.plus and joint.minus else "the preconditioner of each side is the other, and one is empty"

    def reads(self, bucket: Bucket, descend: bool) -> tuple[tuple[str, str], ...]:
        return ("grams", "parameters"), ("grams", "gradients")

    def decide(self, index: int, bucket: Bucket, sums: Sequence[Tensor], move: Move) -> tuple[Split, Tensor] | None:
        dtype = move.parameters[bucket.joints[0].parameters()[0]].dtype
        weight_plus, weight_minus, grad_plus, grad_minus = sums
        up = self._frame(f"{index}+", bucket.group, weight_minus.double(), grad_plus.double())
        down = self._frame(f"{index}-", bucket.group, weight_plus.double(), grad_minus.double())
        up_t, down_t = torch.linalg.inv(up).mT, torch.linalg.inv(down).mT
        eye = torch.eye(bucket.width, dtype=up.dtype, device=up.device)
        used = torch.linalg.matrix_norm(torch.cat((up, down)) - eye).amax()
        plus, minus = Element("dense", up.to(dtype), up_t.to(dtype)), Element("dense", down_t.to(dtype), down.to(dtype))
        return Split(plus, minus), used

    def _frame(self, key: str, group: object, weight: Tensor, grad: Tensor) -> Tensor:
        """F that makes F⁻ᵀ `weight` F⁻¹ the identity, turned to the eigenbasis of the running F⁻ᵀ `grad` F⁻¹."""
        assert isinstance(group, DenseGroup)
        eye = torch.eye(group.width, dtype=weight.dtype, device=weight.device)
        if key not in self._sides:
            self._sides[key] = eye.expand_as(weight).clone(), torch.zeros_like(weight)
        frame, covariance = self._sides[key]
        inverse = torch.linalg.inv(frame)
        values, vectors = torch.linalg.eigh(group.project(inverse.mT @ weight @ inverse))
        mean = values.mean(-1)[:, None, None]
        roots = values.unsqueeze(-2).maximum(self.ridge * mean).sqrt()
        shrink = torch.where(mean > 0, (vectors / roots) @ vectors.mT, eye)
        frame = torch.where(mean > 0, (vectors * roots) @ vectors.mT, eye) @ frame
        inverse = inverse @ shrink
        seen = group.project(inverse.mT @ grad @ inverse)
        begun, size = _trace(covariance) > 0, _trace(seen)
        covariance = self.decay * (shrink @ covariance @ shrink)
        covariance = torch.where((size > 0) & (mean > 0), covariance + (1 - self.decay) * seen / size, covariance)
        turn = group.orthogonal_factor(covariance)
        if key not in self._begun:
            if isinstance(group, GeneralLinear):
                # a start that all factorizations share: an iteration from the identity would remember the one it began with
                turn = torch.where(begun, turn, torch.linalg.eigh(covariance)[1].flip(-1))
            turn = torch.where(_trace(covariance) > 0, turn, eye)
            if bool(begun.all()):
                self._begun.add(key)
        self._sides[key] = turn.mT @ frame, turn.mT @ covariance @ turn
        return self._sides[key][0]

    def value(self, move: Move) -> Tensor:
        norms = torch._foreach_norm(list(move.gradients.values()))
        return torch.stack([norm.double() for norm in norms]).square().sum()

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{key}{part}": t for key, pair in self._sides.items() for part, t in zip("FC", pair, strict=True)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        keys = {name[:-1] for name in state}
        self._begun = set()
        self._sides = {key: (state[f"{key}F"].clone(), state[f"{key}C"].clone()) for key in sorted(keys)}


def _always(info: object) -> bool:
    return True


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
