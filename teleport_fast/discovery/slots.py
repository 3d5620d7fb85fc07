"""Layers and slots: which axes of which tensors a layer writes and reads, however its class stores them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Layer:
    """A layer as tensors with an axis: `rows` hold its outputs (weight, bias, …), `columns` its inputs.

    `heads` is the axis of a batch of equal layers (the experts of a 3-D tensor), None for a single one.
    """

    rows: tuple[tuple[Tensor, int], ...]
    columns: tuple[tuple[Tensor, int], ...]
    in_features: int
    out_features: int
    heads: int | None = None


Layout = Callable[[nn.Module], "Layer | None"]
_LAYOUTS: list[Layout] = []


def layout(function: Layout) -> Layout:
    """Register how a class of layers stores its weight; the layout registered last is asked first."""
    _LAYOUTS.insert(0, function)
    return function


def layer_of(module: object) -> Layer | None:
    """The module as a Layer, or None for what no layout knows or whose weight is computed (parametrizations)."""
    if not isinstance(module, nn.Module):
        return None
    for known in _LAYOUTS:
        layer = known(module)
        if layer is not None:
            held = (tensor for tensor, _ in (*layer.rows, *layer.columns))
            return layer if all(isinstance(tensor, nn.Parameter) for tensor in held) else None
    return None


def matrix(weight: Tensor, bias: Tensor | None, out_axis: int = 0) -> Layer:
    """The Layer of one 2-D weight and its bias."""
    rows = ((weight, out_axis),) if bias is None else ((weight, out_axis), (bias, 0))
    return Layer(rows, ((weight, 1 - out_axis),), weight.shape[1 - out_axis], weight.shape[out_axis])


@layout
def linear(module: nn.Module) -> Layer | None:
    return matrix(module.weight, module.bias) if isinstance(module, nn.Linear) else None


@layout
def conv1d(module: nn.Module) -> Layer | None:
    """GPT-2's Conv1D: a linear layer whose weight is stored (inputs, outputs)."""
    weight = getattr(module, "weight", None)
    if type(module).__name__ != "Conv1D" or not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        return None
    return matrix(weight, getattr(module, "bias", None), out_axis=1)


@dataclass(frozen=True)
class Slot:
    """A part of a layer's outputs: rows `start … start + size`, head after head `head_stride` apart (0: adjacent).

    `tensors` is the layer itself where the module alone does not tell it (experts, routers).
    """

    layer: str
    module: nn.Module
    start: int
    size: int
    head_stride: int = 0
    tensors: Layer | None = None

    @property
    def parts(self) -> Layer:
        known = self.tensors or layer_of(self.module)
        if known is None:
            raise TypeError(f"no layout is registered for {type(self.module).__name__} ({self.layer})")
        return known

    @property
    def in_features(self) -> int:
        return self.parts.in_features

    @property
    def out_features(self) -> int:
        return self.parts.out_features

    @property
    def weight(self) -> Tensor:
        return self.parts.rows[0][0]


def slot_of(name: str, module: nn.Module) -> Slot | None:
    """The whole output of a layer, or None for a module that is no layer."""
    known = layer_of(module)
    return None if known is None else Slot(name, module, 0, known.out_features)
