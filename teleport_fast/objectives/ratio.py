"""One scale per joint as objective: what a ratio of learning rates between readers and writers is (LoRA+)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from teleport_fast.objectives.base import Move, Objective
from teleport_fast.schedule import Once, Schedule
from teleport_fast.symmetry.bucket import Bucket, Element
from teleport_fast.symmetry.joint import Joint


class Ratio(Objective):
    """Scales every joint once by s = √ratio: A₊ → s A₊, A₋ → A₋/s.

    In the frame "return" an optimizer of rate η whose steps ignore the gradient's scale (Adam, sign) then has the rates
    η/s for writers and η s for readers: AdamW becomes LoRA+ of that ratio, with eps·s for writers and eps/s for readers;
    both decay by η·weight_decay, as without a move. SGD has η/s² and η s². In the frame "stay" the same steps are taken at rescaled weights.
    Errors: ValueError if ratio is not positive and finite. Source: LoRA+ [arXiv 2402.12354] equation 5 for the ratio; that it
    is a teleport is our own derivation, tests/objectives/test_ratio.py.

    >>> Ratio(4.0).scale
    2.0
    """

    name = "ratio"
    directions = ("ascend",)
    holds = True
    measures = "parameters"
    reads_tensors = False

    def __init__(self, ratio: float = 16.0) -> None:
        if not 0 < ratio < math.inf:
            raise ValueError(f"ratio must be positive and finite, got {ratio}; 16 is the default")
        self.ratio, self.scale = ratio, math.sqrt(ratio)
        self._moved: set[int] = set()

    def default_schedule(self) -> Schedule:
        return Once()

    def unusable(self, joint: Joint) -> str | None:
        if not joint.group.holds_stretches:
            return f"{joint.group} holds no scale"
        return None if joint.plus and joint.minus else "a ratio needs tensors on both sides of the joint"

    def decide(self, index: int, bucket: Bucket, sums: Sequence[Tensor], move: Move) -> tuple[Element, Tensor] | None:
        if index in self._moved:
            return None
        self._moved.add(index)
        like = move.parameters[bucket.joints[0].parameters()[0]]
        dtype = torch.promote_types(like.dtype, torch.float32)
        s = torch.full((len(bucket.joints) * bucket.heads, bucket.width), self.scale, dtype=dtype, device=like.device)
        return Element("diagonal", s), s.new_tensor(abs(math.log(self.scale)))

    def value(self, move: Move) -> Tensor:
        norms = torch._foreach_norm(list(move.parameters.values()))
        return torch.stack([norm.double() for norm in norms]).square().sum()

    def state_dict(self) -> dict[str, Tensor]:
        return {"moved": torch.tensor(sorted(self._moved), dtype=torch.int64)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._moved = set(state["moved"].tolist())
