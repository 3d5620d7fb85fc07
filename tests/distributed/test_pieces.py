"""Pieces of a view: those of all ranks show every entry of the view once, whatever the cuts."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard

from teleport_fast.distributed.layout import Layout, Run, layout_of
from teleport_fast.distributed.pieces import _pieces, is_cut, pieces, uncut
from teleport_fast.symmetry.view import View

VIEWS = {
    "heads": (View("w", 0, heads=3, width=4), (12, 5)),
    "readers": (View("w", 1, heads=3, width=4), (5, 12)),
    "offset": (View("w", 0, heads=2, width=3, start=4), (13, 2)),
    "shared heads": (View("w", 1, heads=2, width=3, repeats=2), (4, 12)),
    "interleaved": (View("w", 0, heads=3, width=4, head_stride=1, width_stride=3), (12, 3)),
    "repeats inside": (View("w", 1, heads=1, width=4, width_stride=3, repeats=3, repeat_stride=1), (2, 12)),
    "experts": (View("w", 1, heads=4, width=3, head_axis=0), (4, 3, 5)),
    "groups": (View("w", 1, heads=2, width=5, head_axis=0, head_size=3), (6, 5)),
    "vector": (View("w", 0, heads=1, width=7), (7,)),
}


def cuts(size: int, parts: int) -> list[int]:
    return [0, *sorted(random.choices(range(size + 1), k=parts - 1)), size]


def shown(view: View, shape: tuple[int, ...], parts: tuple[int, ...]) -> Tensor:
    """How often each (head, unit) of the view is shown with its own entries, over all ranks of a grid of cuts."""
    whole = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)
    target = view.of(whole)
    counts = torch.zeros(view.heads, view.width)
    sums = torch.zeros(view.heads, view.width)
    edges = [cuts(size, n) for size, n in zip(shape, parts, strict=True)]
    for place in torch.cartesian_prod(*[torch.arange(n) for n in parts]).view(-1, len(parts)).tolist():
        spans = [(edges[d][i], edges[d][i + 1]) for d, i in enumerate(place)]
        runs = [(Run(a, b, 0),) if a < b else () for a, b in spans]
        local = whole[tuple(slice(a, b) for a, b in spans)].clone()
        for piece in _pieces(view, Layout(shape), runs):
            alias = piece.view.of(local)
            rows, units = slice(*piece.heads), slice(*piece.units)
            assert alias.shape[:2] == target[rows, units].shape[:2]
            counts[rows, units] += alias.shape[2] * alias.shape[3]
            sums[rows, units] += alias.sum((2, 3))
    assert torch.equal(sums, target.sum((2, 3)))
    return counts / (target.shape[2] * target.shape[3])


@pytest.mark.parametrize("name", VIEWS)
def test_pieces_of_all_ranks_show_every_entry_once(name: str) -> None:
    view, shape = VIEWS[name]
    for _ in range(20):
        parts = tuple(random.randint(1, 3) for _ in shape)
        assert torch.equal(shown(view, shape, parts), torch.ones(view.heads, view.width)), parts


def test_a_piece_at_another_place_would_show_other_entries() -> None:
    """The control: a view that starts one entry later fails the same comparison."""
    view, shape = VIEWS["heads"]
    whole = torch.arange(60.0).view(shape)
    piece = next(iter(_pieces(view, Layout(shape), [(Run(4, 12, 0),), (Run(0, 5, 0),)])))
    assert piece.heads == (1, 3)
    local = whole[4:12]
    assert torch.equal(piece.view.of(local), view.of(whole)[1:3])
    assert not torch.equal(replace(piece.view, start=1, heads=1).of(local), view.of(whole)[1:2])


def test_a_whole_tensor_has_its_view_as_its_only_piece() -> None:
    for view, shape in VIEWS.values():
        (piece,) = pieces(view, layout_of(torch.zeros(shape)))
        assert (piece.view, piece.heads, piece.units) == (view, (0, view.heads), (0, view.width))


def test_partial_sums_have_no_layout(monkeypatch: Any) -> None:
    import teleport_fast.distributed.layout as layout

    fake = SimpleNamespace(placements=(SimpleNamespace(is_partial=lambda: True),), device_mesh=None)
    monkeypatch.setattr(layout, "as_dtensor", lambda tensor: fake)
    with pytest.raises(ValueError, match="redistribute it"):
        layout.layout_of(torch.zeros(2))


class Grid:
    """A mesh as layouts ask for it: sizes alone, without processes."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def size(self, dim: int) -> int:
        return self.shape[dim]


def placed(view: View, shape: tuple[int, ...], mesh: tuple[int, ...], *placements: Any) -> tuple[str, ...]:
    layout = Layout(shape, Grid(*mesh), placements)  # type: ignore[arg-type]
    assert is_cut(view, layout)
    found = uncut([view], layout)
    assert not is_cut(view, replace(layout, placements=found))
    return tuple(repr(placement).partition("(")[0] + str(getattr(placement, "dim", "")) for placement in found)


def test_a_cut_through_heads_goes_to_a_dimension_that_nothing_cuts() -> None:
    heads = View("w", 0, heads=3, width=4)
    assert placed(heads, (12, 6), (2,), Shard(0)) == ("Shard1",)
    assert placed(heads, (12,), (2,), Shard(0)) == ("Replicate",)  # no other dimension
    assert placed(heads, (12, 6), (2, 2), Shard(0), Shard(1)) == ("Replicate", "Shard1")  # the other one is cut already
    assert placed(heads, (12, 6), (3, 2), Shard(0), Shard(0)) == ("Shard0", "Shard1")  # 3 parts alone keep whole heads


def test_of_two_cuts_through_heads_one_moves_and_the_other_gathers() -> None:
    heads = View("w", 0, heads=3, width=4)
    assert placed(heads, (12, 6), (2, 2), Shard(0), Shard(0)) == ("Shard1", "Replicate")
    assert placed(heads, (12,), (2, 2), Shard(0), Shard(0)) == ("Replicate", "Replicate")


def test_a_strided_cut_never_outlives_the_cut_that_it_counts_over() -> None:
    heads = View("w", 0, heads=3, width=4)
    assert placed(heads, (12, 6), (2, 2), _StridedShard(0, split_factor=2), Shard(0)) == ("Shard1", "Replicate")
