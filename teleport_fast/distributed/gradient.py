"""Tensors brought into the layout of a parameter: its gradient, and what a checkpoint holds of its state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teleport_fast.distributed.layout import Layout, as_dtensor, local_part


def gradient_part(parameter: Tensor) -> Tensor:
    """This rank's part of the gradient, where it holds that part of the parameter; an alias where it lies so already.

    Tensor parallelism may leave the gradient of a copied parameter as summands; laying it out as the parameter is a
    collective then, which torch's own optimizers do as well.
    """
    gradient: Any = parameter.grad
    assert gradient is not None
    own: Any = as_dtensor(parameter)
    if own is not None and gradient.placements != own.placements:
        gradient = gradient.redistribute(own.device_mesh, own.placements)
    return local_part(gradient)


def in_layout(tensor: Tensor, layout: Layout) -> Tensor:
    """A tensor of a checkpoint in this layout: what every rank has whole is cut, a DTensor in another is a collective.

    >>> in_layout(torch.ones(2), Layout((2,)))
    tensor([1., 1.])
    """
    found: Any = as_dtensor(tensor)
    if found is not None and found.device_mesh == layout.mesh:
        whole: Tensor = found if found.placements == layout.placements else found.redistribute(layout.mesh, layout.placements)
        return whole
    whole = tensor if found is None else found.full_tensor()
    if layout.mesh is None:
        return whole
    for dim, runs in enumerate(layout.runs):
        pieces = [whole.narrow(dim, run.start, run.stop - run.start) for run in runs]
        whole = torch.cat(pieces, dim) if pieces else whole.narrow(dim, 0, 0)
    return from_part(whole, layout)


def from_part(part: Tensor, layout: Layout) -> Tensor:
    """The DTensor of which this rank holds `part`, an alias of it."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size(layout.shape)
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, layout.mesh, layout.placements, run_check=False, shape=shape, stride=strides)
