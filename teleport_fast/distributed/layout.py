"""Where a parameter lies: which rows and columns of it this rank holds, and over which ranks a sum along them must go."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


@dataclass(frozen=True)
class Run:
    """Global indices start … stop − 1 of one dimension, which lie from `offset` on in the local part."""

    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Over:
    """The ranks that a sum goes over: some dimensions of a mesh; none where every rank has the whole sum already."""

    mesh: DeviceMesh | None = None
    dims: tuple[int, ...] = ()

    @property
    def groups(self) -> tuple[ProcessGroup, ...]:
        """One group where the dimensions span the world, else one per dimension, to be reduced over in turn."""
        import torch.distributed as dist

        if self.mesh is None or not self.dims:
            return ()
        if len(self.dims) > 1 and self.size == dist.get_world_size():
            return (cast("ProcessGroup", dist.group.WORLD),)
        return tuple(self.mesh.get_group(dim) for dim in self.dims)

    @property
    def size(self) -> int:
        """How many ranks the sum has."""
        size = 1
        for dim in self.dims:
            assert self.mesh is not None
            size *= self.mesh.size(dim)
        return size


@dataclass(frozen=True)
class Layout:
    """What this rank holds of a tensor of `shape`: all of it where `mesh` is None, else what the placements give it.

    Shard(d) cuts dimension d as torch.chunk does (the last parts may be short or empty); _StridedShard, which fully_shard
    puts on what tensor parallelism cut before, as torch does. Partial placements have no part of their own: ValueError.
    Source: own; tests/distributed/test_layout.py holds every part against what `distribute_tensor` gives.

    >>> whole = layout_of(torch.zeros(4, 3))
    >>> whole.runs[0], whole.over(0, 1).size
    ((Run(start=0, stop=4, offset=0),), 1)
    """

    shape: tuple[int, ...]
    mesh: DeviceMesh | None = None
    placements: tuple[Placement, ...] = ()

    def cutting(self, *dims: int) -> tuple[int, ...]:
        """The mesh dimensions over which one of the tensor's dimensions `dims` is cut."""
        wanted = {dim % len(self.shape) for dim in dims} if self.shape else set()
        return tuple(
            m
            for m, placement in enumerate(self.placements)
            if _cuts(placement) and cast(Any, placement).dim in wanted and self.mesh is not None and self.mesh.size(m) > 1
        )

    def over(self, *dims: int) -> Over:
        """The ranks over which a sum along the tensor's dimensions `dims` must be reduced."""
        return Over(self.mesh, self.cutting(*dims))

    @property
    def everywhere(self) -> Over:
        """The ranks over which a sum of all entries must be reduced."""
        return self.over(*range(len(self.shape)))

    @cached_property
    def runs(self) -> tuple[tuple[Run, ...], ...]:
        """For each dimension the global indices that this rank holds, as runs; () where it holds none."""
        return self.runs_at(self.coordinate)

    @property
    def coordinate(self) -> tuple[int, ...]:
        """This rank's place in the mesh. Errors: ValueError where it is not in it."""
        if self.mesh is None:
            return ()
        found = self.mesh.get_coordinate()
        if found is None:
            raise ValueError(f"this rank is not in {self.mesh}: it holds nothing of a tensor of shape {self.shape}")
        return tuple(found)

    def runs_at(self, coordinate: tuple[int, ...]) -> tuple[tuple[Run, ...], ...]:
        """`runs` of the rank that has this place in the mesh."""
        sizes = () if self.mesh is None else tuple(self.mesh.shape)
        return tuple(
            _runs(
                size,
                tuple(
                    (int(getattr(placement, "split_factor", 1)), sizes[m], coordinate[m])
                    for m, placement in enumerate(self.placements)
                    if _cuts(placement) and cast(Any, placement).dim == dim
                ),
            )
            for dim, size in enumerate(self.shape)
        )

    def boundaries(self, dim: int) -> tuple[int, ...]:
        """Where the parts of all ranks begin and end on one dimension, ends of the tensor left out."""
        found: set[int] = set()
        cutting = self.cutting(dim)
        for place in _places(tuple(self.mesh.size(m) for m in cutting) if self.mesh is not None else ()):
            coordinate = [0] * len(self.placements)
            for m, index in zip(cutting, place, strict=True):
                coordinate[m] = index
            for run in self.runs_at(tuple(coordinate))[dim % len(self.shape)]:
                found |= {run.start, run.stop}
        return tuple(sorted(found - {0, self.shape[dim]}))

    def counts(self, widest: DeviceMesh | None = None) -> bool:
        """Whether this rank is the one that puts its part into a sum over all ranks of `widest`: the first of the replicas.

        widest: the mesh that the sum goes over, this tensor's own by default; what lies on a part of it (a plain tensor, a
        DTensor on the data-parallel slice of a 2-D mesh) is the same on all ranks along the other dimensions.
        """
        own = () if self.mesh is None else self.coordinate
        if any(own[m] for m, placement in enumerate(self.placements) if not _cuts(placement)):
            return False
        if widest is None or widest is self.mesh:
            return True
        inside = set() if self.mesh is None else set(self.mesh.mesh.flatten().tolist())
        return not any(_index(widest, dim) for dim in range(widest.ndim) if not inside.issuperset(_line(widest, dim)))


def as_dtensor(tensor: Tensor) -> DTensor | None:
    """The tensor itself where it is a DTensor; no part of torch is loaded to see that it is not."""
    module = sys.modules.get("torch.distributed.tensor")
    return cast("DTensor", tensor) if module is not None and isinstance(tensor, module.DTensor) else None


def layout_of(tensor: Tensor) -> Layout:
    """Where a tensor lies. Errors: ValueError for a DTensor whose entries are partial sums."""
    dtensor = as_dtensor(tensor)
    if dtensor is None:
        return Layout(tuple(tensor.shape))
    if any(placement.is_partial() for placement in dtensor.placements):
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} has placements {dtensor.placements}: its parts are partial sums; "
            f"redistribute it to Replicate() or Shard() first"
        )
    return Layout(tuple(tensor.shape), dtensor.device_mesh, tuple(dtensor.placements))


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds, an alias: writing into it writes into the tensor."""
    dtensor = as_dtensor(tensor)
    return tensor if dtensor is None else dtensor._local_tensor


def described(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with one that lies on many ranks as its whole shape without storage: views can be laid on it."""
    return {
        name: tensor if as_dtensor(tensor) is None else torch.empty_strided(tensor.shape, tensor.stride(), device="meta")
        for name, tensor in tensors.items()
    }


def written(tensors: Iterable[Tensor]) -> None:
    """Tell autograd of DTensors whose local parts were written: a step between forward and backward raises then, as it should."""
    torch.autograd.graph.increment_version([tensor for tensor in tensors if as_dtensor(tensor) is not None])


def widest_mesh(layouts: Iterable[Layout]) -> DeviceMesh | None:
    """The mesh of the most ranks, the first of equals; None where every tensor is plain."""
    found: DeviceMesh | None = None
    for layout in layouts:
        if layout.mesh is not None and (found is None or layout.mesh.size() > found.size()):
            found = layout.mesh
    return found


def _cuts(placement: Placement) -> bool:
    return placement.is_shard() or type(placement).__name__ == "_StridedShard"


@lru_cache(maxsize=4096)
def _runs(size: int, cuts: tuple[tuple[int, int, int], ...]) -> tuple[Run, ...]:
    """Cuts are (split factor, parts, index) from left to right: each of `split factor` chunks is cut into so many parts."""
    indices = torch.arange(size)
    for factor, parts, index in cuts:
        indices = torch.cat([_chunk(chunk, parts, index) for chunk in _chunks(indices, factor)])
    if not len(indices):
        return ()
    breaks = ((indices.diff() != 1).nonzero().flatten() + 1).tolist()
    starts, ends = [0, *breaks], [*breaks, len(indices)]
    return tuple(Run(int(indices[a]), int(indices[b - 1]) + 1, a) for a, b in zip(starts, ends, strict=True))


def _chunks(indices: Tensor, parts: int) -> list[Tensor]:
    return [_chunk(indices, parts, index) for index in range(parts)]


def _chunk(indices: Tensor, parts: int, index: int) -> Tensor:
    step = -(-len(indices) // parts)
    return indices[index * step : (index + 1) * step]


def _places(sizes: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
    if not sizes:
        yield ()
        return
    for first in range(sizes[0]):
        for rest in _places(sizes[1:]):
            yield (first, *rest)


def _index(mesh: DeviceMesh, dim: int) -> int:
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    return int(coordinate[dim])


def _line(mesh: DeviceMesh, dim: int) -> list[int]:
    """The ranks along one dimension of the mesh, through this rank."""
    place: list[Any] = [_index(mesh, d) for d in range(mesh.ndim)]
    place[dim] = slice(None)
    ranks: list[int] = mesh.mesh[tuple(place)].tolist()
    return ranks
