"""Whisper's front: two 1-D convolutions with an activation between, whose channels are neurons."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from teleport_fast.discovery.roles import Mlp, builder, join
from teleport_fast.discovery.slots import Layer, Slot


@builder
def convolutions(name: str, module: nn.Module) -> Iterator[Mlp]:
    """Children `conv1` and `conv2`, plain Conv1d, the second reading what the first writes."""
    first, second = getattr(module, "conv1", None), getattr(module, "conv2", None)
    if not isinstance(first, nn.Conv1d) or not isinstance(second, nn.Conv1d) or first.groups != 1 or second.groups != 1:
        return
    if second.in_channels == first.out_channels:
        up, down = _slot(join(name, "conv1"), first), _slot(join(name, "conv2"), second)
        yield Mlp(join(name, "conv1"), up, down, chain=True)


def _slot(name: str, conv: nn.Conv1d) -> Slot:
    rows: tuple[tuple[Tensor, int], ...] = ((conv.weight, 0),)
    rows += () if conv.bias is None else ((conv.bias, 0),)
    layer = Layer(rows, ((conv.weight, 1),), conv.in_channels, conv.out_channels)
    return Slot(name, conv, 0, conv.out_channels, tensors=layer)
