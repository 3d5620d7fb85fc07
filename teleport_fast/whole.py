"""How a process that holds whole tensors measures, decides and moves; `distributed.Shards` does it where many ranks hold parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from teleport_fast.norm import clipping, total_norm
from teleport_fast.objectives import Move, Objective
from teleport_fast.schedule import Schedule, StepInfo
from teleport_fast.symmetry.bucket import Bucket, Element, Split
from teleport_fast.symmetry.joint import Joint
from teleport_fast.writes import Write

Source = tuple[str, Mapping[str, Tensor]]
Found = tuple[Element | Split, Tensor] | None


class Whole:
    """Everything that an engine asks of all entries of its tensors; one process has them all."""

    sharded = False

    def refuses(self, objective: Objective, joint: Joint, parameters: Mapping[str, Tensor]) -> str | None:
        """Why a joint of these parameters cannot serve where they lie, or None."""
        return None

    def settled(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """The parameter's gradient, laid out as the parameter is."""
        return gradient

    def fires(self, schedule: Schedule, info: StepInfo) -> bool:
        return schedule.fires(info)

    def any_nonzero(self, tensors: Iterable[Tensor]) -> bool:
        return any(bool(tensor.any()) for tensor in tensors)

    def first_not_finite(self, tensors: Mapping[str, Tensor]) -> str | None:
        """The name of the first tensor with an entry that is not finite."""
        return next((name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), None)

    def verdict(self, found: Tensor) -> Tensor:
        """A scaler's verdict on this process' gradients, as one on all gradients."""
        return found

    def norm(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return total_norm(tensors)

    def clipping(self, gradients: Iterable[Tensor], measured: Mapping[str, Tensor], max_norm: float | None) -> list[Write]:
        return clipping(gradients, measured, max_norm)

    def value(self, objective: Objective, move: Move) -> Tensor:
        return objective.value(move)

    def observe(self, objective: Objective, serving: Sequence[tuple[int, Bucket]], gradients: Mapping[str, Tensor]) -> None:
        for index, bucket in serving:
            objective.observe(index, bucket, gradients)

    def elements(
        self, objective: Objective, serving: Sequence[tuple[int, Bucket]], move: Move
    ) -> Iterator[tuple[int, Bucket, Found]]:
        """Each bucket's element; none of these buckets reads what another moves, or none of them has moved."""
        for index, bucket in serving:
            yield index, bucket, objective.element(index, bucket, move)

    def writes(self, bucket: Bucket, element: Element | Split, sources: Sequence[Source]) -> list[Write]:
        """The calls that move the sources; nothing is written before the first of them."""
        return bucket.writes(element, sources)


WHOLE = Whole()
