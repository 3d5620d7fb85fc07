"""A part of a view's columns, by global index, as this rank holds it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from teleport_fast.distributed.layout import Layout
from teleport_fast.objectives.eigenbasis import part_of_columns
from teleport_fast.symmetry.view import View


@dataclass(frozen=True)
class Taken:
    """The entries of one dimension of a tensor that are taken, by global index."""

    dim: int
    entries: slice

    def of(self, piece: Tensor, local: Tensor, layout: Layout) -> Tensor:
        """Of a view (heads, h, outer, inner) of this rank's part `local`, which lies by `layout`, the columns that are taken."""
        size, step = local.shape[self.dim], local.stride(self.dim)
        axis = next((a for a in (3, 2) if piece.shape[a] == size and piece.stride(a) == step), 3)
        spans = [self._inside(run.start, run.stop, run.offset) for run in layout.runs[self.dim]]
        if size == 1:  # a dimension of one entry is no axis of the piece
            return piece if any(spans) else piece[:, :, :, :0]
        parts = [_sliced(piece, axis, span) for span in spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, axis)

    def _inside(self, start: int, stop: int, offset: int) -> range:
        """Local indices of the taken entries among global ones start … stop − 1, which lie from `offset` on."""
        first = self.entries.start
        if first < start:
            first += -(-(start - first) // self.entries.step) * self.entries.step
        return range(first - start + offset, min(self.entries.stop, stop) - start + offset, self.entries.step)


def _sliced(piece: Tensor, axis: int, span: range) -> Tensor:
    entries = slice(span.start, span.stop, span.step) if span else slice(0, 0)
    return piece[:, :, :, entries] if axis == 3 else piece[:, :, entries]


def taken(view: View, tensor: Tensor, part: int, parts: int) -> Taken | None:
    """What one process takes of this view's columns as its part, or None: all, or a choice that no one dimension holds.

    tensor: the whole, or a DTensor. Where columns run over several dimensions of the tensor at once (a convolution's), all
    ranks take all of them.
    """
    whole = view.of(torch.empty_strided(tensor.shape, tensor.stride(), device="meta"))
    found = part_of_columns(whole, part, parts)
    if found is None:
        return None
    axis, entries = found
    for dim in range(tensor.dim()):
        if dim != view.axis % tensor.dim() and (tensor.shape[dim], tensor.stride(dim)) == (whole.shape[axis], whole.stride(axis)):
            return Taken(dim, entries)
    return None
