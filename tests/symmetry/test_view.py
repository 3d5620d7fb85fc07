"""A view shows exactly the entries that its formula names, as an alias, whatever the tensor's storage looks like."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from teleport_fast.symmetry.view import View

# name: (shape of the parameter, view)
LAYOUTS: dict[str, tuple[tuple[int, ...], View]] = {
    "rows of a linear layer, one head": ((6, 5), View("w", 0, 1, 6)),
    "rows of value, per head": ((6, 5), View("w", 0, 3, 2)),
    "columns of output, per head": ((5, 6), View("w", 1, 3, 2)),
    "values inside a fused qkv": ((18, 5), View("w", 0, 3, 2, start=12)),
    "queries that share a key, grouped": ((12, 5), View("w", 0, 2, 3, repeats=2)),
    "output columns that share a value, grouped": ((5, 12), View("w", 1, 2, 3, repeats=2)),
    "bias": ((6,), View("w", 0, 3, 2)),
    "grouped bias inside a fused qkv": ((20,), View("w", 0, 2, 3, start=2, repeats=2)),
    "q, k, v interleaved per head (NeoX)": ((18, 5), View("w", 0, 3, 2, start=2, head_stride=6)),
    "units strided, heads inside": ((6, 5), View("w", 0, 3, 2, head_stride=1, width_stride=3)),
    "stored transposed, in × out (Conv1D)": ((5, 18), View("w", 1, 3, 2, start=6)),
    "convolution, output channels": ((6, 4, 3, 2), View("w", 0, 1, 6)),
    "convolution, input channels": ((4, 6, 3, 2), View("w", 1, 1, 6)),
    "experts stacked in 3-D, middle axis": ((4, 6, 3), View("w", 1, 1, 6)),
    "negative axis": ((5, 6), View("w", -1, 3, 2)),
    "one unit": ((3, 5), View("w", 0, 3, 1)),
}
every_layout = pytest.mark.parametrize(("shape", "view"), LAYOUTS.values(), ids=LAYOUTS.keys())


def by_the_formula(tensor: Tensor, view: View) -> Tensor:
    """(heads, width, repeats · everything else) by advanced indexing: a copy, made from the docstring's formula."""
    heads, units, repeats = torch.arange(view.heads), torch.arange(view.width), torch.arange(view.repeats)
    index = (
        view.start
        + heads[:, None, None] * view.head_stride
        + units[:, None] * view.width_stride
        + repeats * view.repeat_stride
    )
    return tensor.movedim(view.axis, 0)[index].flatten(2)


def storages(tensor: Tensor) -> list[Tensor]:
    """The same values with every order of axes in memory, and at an offset in a larger storage."""
    orders = itertools.permutations(range(tensor.ndim))
    permuted = [tensor.permute(o).contiguous().permute(torch.tensor(o).argsort().tolist()) for o in orders]
    larger = torch.zeros(*(n + 1 for n in tensor.shape), dtype=tensor.dtype)
    inner = larger[tuple(slice(1, None) for _ in tensor.shape)]
    inner.copy_(tensor)
    return [*permuted, inner] if tensor.ndim <= 2 else permuted


def numbered(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape)


@every_layout
def test_a_view_shows_what_its_formula_names(shape: tuple[int, ...], view: View) -> None:
    alias = view.of(numbered(*shape))
    assert alias.ndim == 4
    assert alias.shape[:2] == (view.heads, view.width)
    assert torch.equal(alias.flatten(2), by_the_formula(numbered(*shape), view))


@every_layout
def test_the_storage_order_does_not_matter(shape: tuple[int, ...], view: View) -> None:
    """A gradient may be stored transposed or channels-last while its parameter is not."""
    shown = 0
    for tensor in storages(numbered(*shape)):
        try:
            alias = view.of(tensor)
        except ValueError as error:
            assert "make it contiguous" in str(error)
            continue
        shown += 1
        assert torch.equal(alias.flatten(2), by_the_formula(tensor, view))
    assert shown >= len(shape)


@every_layout
def test_a_view_is_an_alias(shape: tuple[int, ...], view: View) -> None:
    tensor = numbered(*shape).double()
    before = tensor.clone()
    alias = view.of(tensor)
    assert alias.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    alias.neg_().sub_(1)
    assert torch.equal(by_the_formula(tensor, view), -by_the_formula(before, view) - 1)
    assert int((tensor != before).sum()) == view.heads * view.width * alias[0, 0].numel()


@given(data=st.data())
@settings(max_examples=40)
def test_any_view_that_fits_agrees_with_its_formula(data: st.DataObject) -> None:
    heads, width, repeats = (data.draw(st.integers(1, 4)) for _ in range(3))
    view = View("w", data.draw(st.integers(0, 1)), heads, width, start=data.draw(st.integers(0, 3)), repeats=repeats)
    shape = [data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))]
    shape[view.axis] = view.extent + data.draw(st.integers(0, 3))
    for tensor in storages(numbered(*shape)):
        assert torch.equal(view.of(tensor).flatten(2), by_the_formula(tensor, view))


@given(heads=st.integers(1, 4), width=st.integers(1, 4), repeats=st.integers(1, 4), start=st.integers(0, 3))
@settings(max_examples=40)
def test_extent_is_one_past_the_last_index(heads: int, width: int, repeats: int, start: int) -> None:
    view = View("w", 0, heads, width, start, repeats=repeats)
    assert view.extent == start + heads * width * repeats
    assert int(view.of(numbered(view.extent)).max()) == view.extent - 1
    with pytest.raises(ValueError, match="disagree in size"):
        view.of(numbered(view.extent - 1))


def test_channels_last_weights_need_no_copy() -> None:
    weight = nn.Conv2d(4, 6, 3).weight.detach().to(memory_format=torch.channels_last)
    for view in (View("w", 0, 1, 6), View("w", 1, 1, 4)):
        assert torch.equal(view.of(weight).flatten(2), by_the_formula(weight, view))


def test_a_parameter_keeps_its_graph_when_its_gradient_is_viewed() -> None:
    layer = nn.Linear(4, 6)
    layer(torch.randn(3, 4)).sum().backward()
    assert layer.weight.grad is not None
    View("weight", 0, 2, 3).of(layer.weight.grad).zero_()
    assert float(layer.weight.grad.abs().sum()) == 0
    assert layer.weight.requires_grad


@pytest.mark.parametrize(
    ("view", "shape", "message"),
    [
        (View("w", 0, 3, 4), (10, 5), r"'w': axis 0 of shape \(10, 5\) has 10 entries, but 3 heads of width 4 need 12"),
        (View("w", 1, 2, 2, start=2), (5, 5), "has 5 entries, but 2 heads of width 2 need 6; .* disagree in size"),
        (View("w", 0, 2, 2, repeats=2), (7, 5), "has 7 entries, but 2 heads of width 2 need 8"),
        (View("w", 2, 1, 4), (4, 4), r"axis 2 does not exist in a tensor of shape \(4, 4\)"),
        (View("w", 1, 1, 4), (4,), r"axis 1 does not exist in a tensor of shape \(4,\)"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_with_both_sizes(
    view: View, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        view.of(numbered(*shape))


def test_columns_that_need_three_strides_are_refused() -> None:
    tensor = numbered(4, 3, 5, 2).permute(0, 2, 1, 3)
    with pytest.raises(ValueError, match="needs 3 column strides, at most 2 are supported; make it contiguous"):
        View("w", 0, 2, 2).of(tensor[:, :, :, :1].expand(4, 5, 3, 2)[:, ::2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 0}, "must be positive, got 0, 2, 1"),
        ({"width": 0}, "must be positive, got 1, 0, 1"),
        ({"repeats": 0}, "must be positive, got 1, 2, 0"),
        ({"start": -1}, "start must be at least 0 .*got -1, 1"),
        ({"width_stride": 0}, "width_stride at least 1, got 0, 0"),
    ],
)
def test_impossible_views_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        View("w", 0, **{"heads": 1, "width": 2, **arguments})


def test_heads_on_an_axis_of_their_own() -> None:
    """Experts of a 3-D tensor: head e is tensor[e], its units a part of another axis."""
    tensor = torch.arange(2 * 6 * 5.0).reshape(2, 6, 5)
    rows = View("experts", 1, 2, 3, start=3, head_axis=0).of(tensor)
    assert torch.equal(rows.flatten(2), tensor[:, 3:])
    columns = View("experts", 2, 2, 5, head_axis=0).of(tensor)
    assert torch.equal(columns.flatten(2), tensor.transpose(1, 2))


@pytest.mark.parametrize(("axis", "heads"), [(1, 2), (3, 2), (0, 3)])
def test_heads_that_do_not_lie_there_are_refused(axis: int, heads: int) -> None:
    with pytest.raises(ValueError, match="view of 'experts': "):
        View("experts", 1, heads, 3, head_axis=axis).of(torch.zeros(2, 6, 5))


@pytest.mark.parametrize("view", [view for _, view in LAYOUTS.values()], ids=LAYOUTS)
def test_a_view_is_shown_as_it_is_written_and_read_back_the_same(view: View) -> None:
    assert eval(repr(view)) == view
    assert "power" not in repr(view) and "power=2" in repr(replace(view, power=2))


def test_what_is_as_usual_is_not_shown() -> None:
    assert repr(View("w", 0, 2, 3, repeats=2)) == "View(parameter='w', axis=0, heads=2, width=3, repeats=2)"
    assert repr(View("w", 1, 2, 3, head_axis=0, head_size=4)) == "View(parameter='w', axis=1, heads=2, width=3, head_axis=0, head_size=4)"


SMALL = st.builds(
    lambda axis, heads, width, start, step, unit, repeats: View("w", axis, heads, width, start, step, unit, repeats, 1),
    st.integers(0, 1), st.integers(1, 3), st.integers(1, 3), st.integers(0, 6), st.integers(0, 4), st.integers(1, 3), st.integers(1, 2),
)  # fmt: skip


@given(SMALL, SMALL)
def test_two_views_meet_where_they_show_a_common_entry(one: View, other: View) -> None:
    seen = [set(view.of(numbered(24, 24)).flatten().tolist()) for view in (one, other)]
    if one.axis == other.axis:
        assert one.meets(other) == bool(seen[0] & seen[1])
    else:
        assert one.meets(other)


def test_views_with_heads_on_an_axis_of_their_own_are_taken_to_meet() -> None:
    plain, apart = View("w", 1, 2, 3), View("w", 1, 2, 3, start=9, head_axis=0)
    assert plain.meets(apart) and apart.meets(plain)
    assert not plain.meets(replace(plain, start=9))
