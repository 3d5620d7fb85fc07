"""Copies of the weights outside the optimizer (EMA, SWA, a reference) that move when the weights do."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from teleport_fast.distributed.layout import described
from teleport_fast.plan import Plan
from teleport_fast.symmetry.bucket import PARAMETER, Bucket, Element, Split
from teleport_fast.symmetry.joint import Joint
from teleport_fast.writes import Write

# What averaging, compiling and data-parallel wrappers put before a parameter's name.
PREFIXES = ("module.", "_orig_mod.")


class Tracked:
    """The tracked copies of one teleporter. Modules are held weakly, and their tensors looked up at each move."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._joints: list[Joint] = [joint for bucket in plan.buckets for joint in bucket.joints]
        self._copies: OrderedDict[int, Any] = OrderedDict()

    def add(self, copy: nn.Module | Mapping[str, Tensor]) -> RemovableHandle:
        tensors = _named(copy)
        for joint in self._joints:
            for name in (*joint.parameters(), *joint.buffers()):
                if name not in tensors:
                    raise ValueError(
                        f"copy has no tensor {name!r}, which joint {joint.name!r} moves; "
                        f"pass the averaged model, or a mapping with the model's own names"
                    )
            joint.check_shapes(described(tensors))
        handle = RemovableHandle(self._copies)
        self._copies[handle.id] = weakref.ref(copy) if isinstance(copy, nn.Module) else lambda: copy
        return handle

    def __bool__(self) -> bool:
        return bool(self._copies)

    def writes(self, bucket: Bucket, element: Element | Split) -> list[Write]:
        """What moves every copy that is still there."""
        writes: list[Write] = []
        for number, copy in list(self._copies.items()):
            found = copy()
            if found is None:
                del self._copies[number]
                continue
            tensors = _named(found)
            device = tensors[bucket.parameters()[0]].device
            writes += self._plan.place.writes(bucket, element.to(device), [(PARAMETER, tensors)])
        return writes


def _named(copy: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the model's own names, without the prefixes of wrappers."""
    of_module = (copy.named_buffers(), copy.named_parameters()) if isinstance(copy, nn.Module) else (copy.items(),)
    found = dict(chain(*of_module))
    named = {}
    for name, tensor in found.items():
        plain = name
        while plain.startswith(PREFIXES):
            plain = plain.removeprefix("module.").removeprefix("_orig_mod.")
        named[name] = tensor
        named.setdefault(plain, tensor)
    return named
