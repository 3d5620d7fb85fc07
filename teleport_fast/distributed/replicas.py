"""Ranks that hold the same whole tensors (DistributedDataParallel): what may differ between them is the first one's word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from teleport_fast.distributed.reduce import broadcast_
from teleport_fast.objectives import Move, Objective
from teleport_fast.schedule import Schedule, StepInfo
from teleport_fast.symmetry.bucket import Bucket, Element, Split
from teleport_fast.whole import Found, Whole

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Replicas(Whole):
    """Every rank decides from its own gradients, which are the same; the first rank's elements and decisions are taken.

    Source: own; tests/distributed/checks_replicas.py.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    def fires(self, schedule: Schedule, info: StepInfo) -> bool:
        fires = schedule.fires(info)
        if schedule.agrees:
            return fires
        word = torch.tensor(float(fires))
        self._first_of(word)
        return bool(word)

    def elements(
        self, objective: Objective, serving: Sequence[tuple[int, Bucket]], move: Move
    ) -> Iterator[tuple[int, Bucket, Found]]:
        for index, bucket, found in super().elements(objective, serving, move):
            if found is None:
                yield index, bucket, None
                continue
            element, used = found
            yield index, bucket, (self._of_first(element), used)

    def _of_first(self, element: Element | Split) -> Element | Split:
        if isinstance(element, Split):
            plus, minus = self._of_first(element.plus), self._of_first(element.minus)
            assert isinstance(plus, Element) and isinstance(minus, Element)
            return Split(plus, minus)
        g, inverse = element.g.contiguous(), element.g_inverse_t
        self._first_of(g)
        if inverse is not None:
            inverse = g if element.turns else inverse.contiguous()
            if inverse is not g:
                self._first_of(inverse)
        return Element(element.form, g, inverse)

    def _first_of(self, tensor: Tensor) -> None:
        import torch.distributed as dist

        device_type = "cuda" if dist.get_backend(self._group) == "nccl" else tensor.device.type
        arrived = broadcast_(tensor, 0, self._group, device_type)
        if arrived is not tensor:
            tensor.copy_(arrived)
