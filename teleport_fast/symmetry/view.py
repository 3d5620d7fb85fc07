"""A view names the entries of one parameter that a joint acts on; a description that never holds a tensor."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True, repr=False)
class View:
    """How one parameter shows a joint of `heads` heads and `width` units.

    Entry (head, unit, repeat) of the joint sits on the parameter's `axis` at
    `start + head·head_stride + unit·width_stride + repeat·repeat_stride`; all other axes are columns.
    `repeats` is head sharing (grouped queries), `power` k makes a diagonal s act as sᵏ (ReLU²: the consumer has k = 2),
    `shift` c makes the action fall on parameter + c (norm gains stored as 1 + w), `counts` says whether the tensor's
    gradient enters the joint's gradient covariance (embedding tables, heads and vectors do not).
    With `head_axis` the heads lie along an axis of their own (experts of a 3-D tensor, groups of a convolution): head i
    has the `head_size` entries from `head_start + i·head_stride` on.
    """

    parameter: str
    axis: int
    heads: int
    width: int
    start: int = 0
    head_stride: int = -1
    width_stride: int = 1
    repeats: int = 1
    repeat_stride: int = -1
    power: float = 1.0
    shift: float = 0.0
    counts: bool = True
    head_axis: int | None = None
    head_start: int = 0
    head_size: int = 1

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width < 1 or self.repeats < 1:
            raise ValueError(
                f"view of {self.parameter!r}: heads, width and repeats must be positive, "
                f"got {self.heads}, {self.width}, {self.repeats}"
            )
        if self.start < 0 or self.width_stride < 1:
            raise ValueError(
                f"view of {self.parameter!r}: start must be at least 0 and width_stride at least 1, "
                f"got {self.start}, {self.width_stride}"
            )
        for name, stride in self._usual_strides().items():
            if getattr(self, name) < 0:
                object.__setattr__(self, name, stride)

    def _usual_strides(self) -> dict[str, int]:
        """Repeats and heads that follow each other without a gap."""
        heads = self.width * self.repeats if self.head_axis is None else self.head_size
        return {"repeat_stride": self.width, "head_stride": heads}

    def __repr__(self) -> str:
        """As it is written by hand: what is as usual is left out."""
        usual = {one.name: one.default for one in fields(self)} | self._usual_strides()
        given = ((one.name, getattr(self, one.name)) for one in fields(self))
        return f"View({', '.join(f'{name}={value!r}' for name, value in given if value != usual[name])})"

    @property
    def extent(self) -> int:
        """One past the last index that the view uses on its axis."""
        return (
            self.start
            + (0 if self.head_axis is not None else (self.heads - 1) * self.head_stride)
            + (self.width - 1) * self.width_stride
            + (self.repeats - 1) * self.repeat_stride
            + 1
        )

    def meets(self, other: View) -> bool:
        """Whether the two views of one parameter share an entry; True where they lie along different axes."""
        if self.axis != other.axis or self.head_axis is not None or other.head_axis is not None:
            return True
        return self.start < other.extent and other.start < self.extent and not self._indices().isdisjoint(other._indices())

    def _indices(self) -> set[int]:
        heads = range(self.start, self.start + self.heads * self.head_stride, self.head_stride) if self.head_stride else (self.start,)
        repeats = [r * self.repeat_stride for r in range(self.repeats)]
        return {head + unit * self.width_stride + repeat for head in heads for unit in range(self.width) for repeat in repeats}

    def of(self, tensor: Tensor) -> Tensor:
        """The strided alias (heads, width, outer, inner) of a tensor that has the parameter's shape.

        Works for a parameter, its gradient and its optimizer state alike; never copies.
        Errors: ValueError if the axis is missing or too short, or if the columns need more than two strides.
        """
        sizes, strides, offset = _layout(self, tuple(tensor.shape), tensor.stride())
        return torch.as_strided(tensor, sizes, strides, tensor.storage_offset() + offset)


@lru_cache(maxsize=4096)
def _layout(
    view: View, shape: tuple[int, ...], stride: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    if not -len(shape) <= view.axis < len(shape):
        raise ValueError(f"view of {view.parameter!r}: axis {view.axis} does not exist in a tensor of shape {shape}")
    axis = view.axis % len(shape)
    if view.extent > shape[axis]:
        raise ValueError(
            f"view of {view.parameter!r}: axis {axis} of shape {shape} has {shape[axis]} entries, but "
            f"{view.heads} heads of width {view.width} need {view.extent}; the joint's tensors disagree in size"
        )
    unit, head_step, offset = stride[axis], view.head_stride * stride[axis], view.start * stride[axis]
    if view.head_axis is not None:
        if not 0 <= view.head_axis < len(shape) or view.head_axis == axis:
            raise ValueError(f"view of {view.parameter!r}: heads cannot lie on axis {view.head_axis} of shape {shape}")
        if view.head_start + (view.heads - 1) * view.head_stride + view.head_size > shape[view.head_axis]:
            raise ValueError(f"view of {view.parameter!r}: axis {view.head_axis} of shape {shape} has no {view.heads} heads")
        head_step = view.head_stride * stride[view.head_axis]
        offset += view.head_start * stride[view.head_axis]
    others = [
        (a, view.head_size if a == view.head_axis else shape[a], stride[a]) for a in range(len(shape)) if a != axis
    ]
    repeats = (axis, view.repeats, view.repeat_stride * unit)
    merged = _merge([repeats, *others])
    if len(merged) > 2:  # where one unit spans the whole axis, the repeats join their neighbours
        merged = _merge(sorted([repeats, *others]))
    if len(merged) > 2:
        raise ValueError(
            f"view of {view.parameter!r}: a tensor of shape {shape} and strides {stride} needs {len(merged)} column "
            f"strides, at most 2 are supported; make it contiguous"
        )
    merged = [(1, 1)] * (2 - len(merged)) + merged
    sizes = (view.heads, view.width, merged[0][0], merged[1][0])
    strides = (head_step, view.width_stride * unit, merged[0][1], merged[1][1])
    return sizes, strides, offset


def _merge(columns: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """(axis, size, stride) triples as the fewest (size, stride) pairs in that order."""
    merged: list[tuple[int, int]] = []
    for _, size, step in columns:
        if size == 1:
            continue
        if merged and merged[-1][1] == size * step:
            merged[-1] = (merged[-1][0] * size, step)
        else:
            merged.append((size, step))
    return merged
