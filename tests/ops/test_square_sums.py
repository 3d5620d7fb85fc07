"""square_sums is Σ x² and Σ |x| by rows on every backend, instruction set, dtype and layout, and differentiable."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teleport_fast.ops import square_sums
from teleport_fast.ops.backend import availability, set_backend

SIZES = [0, 1, 3, 7, 8, 63, 64, 65, 127, 128]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def plain(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.flatten(2)
    wide = x if x.dtype == torch.float64 else x.float()
    return wide.square().sum(2), wide.abs().sum(2)


def assert_as_accurate_as_torch(x: Tensor, exact) -> None:
    truth = exact(x) ** 2, np.abs(exact(x))
    for ours, theirs, entries in zip(square_sums([x]), plain(x), truth, strict=True):
        sums = entries.sum(2)
        assert ours.shape == x.shape[:2] and ours.dtype == theirs.dtype and not ours.isnan().any()
        if sums.size:
            error, allowed = (np.abs(t.double().numpy() - sums).max() for t in (ours, theirs))
            assert error <= 2 * allowed + torch.finfo(ours.dtype).eps * sums.max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_torchs_own_at_every_width(way, dtype, layout, exact):
    for size in SIZES:
        assert_as_accurate_as_torch(layout(torch.randn(2, size, 18).to(dtype)), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_torchs_own_at_every_number_of_columns(way, dtype, layout, exact):
    for size in [*SIZES, 600, 9000]:
        assert_as_accurate_as_torch(layout(torch.randn(3, 5, size).to(dtype)), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h", [2, 5, 31])
def test_narrow_joints_with_many_columns_are_summed_as_accurately(way, dtype, h, exact):
    assert_as_accurate_as_torch(torch.randn(5003, h, 1).to(dtype).transpose(0, 2), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs, taps", [(3, 9), (130, 9), (1030, 2), (40, 25)])
def test_short_runs_of_columns_are_summed_as_accurately(way, dtype, inputs, taps, exact):
    # A convolution's weight read along its inputs: rows of `taps` contiguous columns, side by side.
    assert_as_accurate_as_torch(torch.randn(2, 30, inputs, taps).to(dtype).transpose(1, 2), exact)


def test_every_entry_is_written(way, nan_filled_memory):
    for shape in ((2, 5, 0), (2, 5, 3), (0, 5, 3), (2, 0, 3)):
        squares, l1 = square_sums([torch.ones(shape)])
        assert bool((squares == shape[2]).all()) and bool((l1 == shape[2]).all())


def test_nothing_outside_the_view_is_read(way):
    around = torch.full((5, 11, 23), float("nan"))
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        size = [around.shape[order.index(d)] for d in range(3)]
        view = around.permute([order.index(d) for d in range(3)])[1:-1, 1:-1, 1:-1]
        view.fill_(-2.0)
        squares, l1 = square_sums([view])
        columns = size[2] - 2
        assert squares.unique().tolist() == [4.0 * columns] and l1.unique().tolist() == [2.0 * columns]
        view.fill_(float("nan"))


def test_each_joints_views_add_up(way):
    tensors = [torch.randn(2, 4, *n) for n in ((3,), (20,), (2, 5), (0,), (7,), (9, 1))]
    squares, l1 = square_sums(tensors, joints=3)
    for joint in range(3):
        pair = [plain(t) for t in tensors[2 * joint : 2 * joint + 2]]
        torch.testing.assert_close(squares[2 * joint : 2 * joint + 2], pair[0][0] + pair[1][0])
        torch.testing.assert_close(l1[2 * joint : 2 * joint + 2], pair[0][1] + pair[1][1])
    # The order of the joints matters: in another order the sums are others.
    assert not torch.allclose(square_sums(tensors[::-1], joints=3)[0], squares)


def test_dtypes_of_one_call_may_differ(way):
    tensors = [torch.full((1, 2, 3), -2.0).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    squares, l1 = square_sums(tensors)
    assert squares.tolist() == [[36.0, 36.0]] and l1.tolist() == [[18.0, 18.0]]


@pytest.mark.parametrize("special", [float("inf"), float("nan")])
def test_only_rows_with_non_finite_entries_become_non_finite(way, special, layout):
    x = torch.randn(1, 9, 40)
    x[0, 3, 17] = special
    for sums in square_sums([layout(x)]):
        assert (~sums.isfinite()).nonzero().tolist() == [[0, 3]]


def test_rows_of_a_shared_entry_read_it_again(way):
    squares, l1 = square_sums([torch.full((2, 3, 1), -3.0).expand(2, 3, 50)])
    assert squares.unique().tolist() == [450.0] and l1.unique().tolist() == [150.0]


def test_bits_do_not_depend_on_the_number_of_threads(cpp_way, layout):
    x = torch.randn(3, 33, 3000)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(torch.stack(square_sums([layout(x), x])))
    torch.set_num_threads(before)
    assert all(torch.equal(other, results[0]) for other in results[1:])


@settings(max_examples=80)
@given(data=st.data())
def test_cpp_equals_the_reference_on_any_shape(data):
    if availability("cpp") is not True:
        pytest.skip(str(availability("cpp")))
    heads, h, dtype = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40)), data.draw(st.sampled_from(DTYPES))
    shape = [heads, h, *data.draw(st.lists(st.integers(0, 90), min_size=1, max_size=2))]
    order = data.draw(st.permutations(range(len(shape))))
    x = torch.randn([shape[d] for d in order]).to(dtype).permute([order.index(d) for d in range(len(shape))])
    sums = {}
    for backend in ("reference", "cpp"):
        with set_backend(backend):
            sums[backend] = square_sums([x])
    torch.testing.assert_close(sums["cpp"], sums["reference"])


def test_gradients_of_any_order_match_finite_differences(way):
    tensors = [torch.randn(2, 3, *n, dtype=torch.float64, requires_grad=True) for n in ((4,), (2, 2), (1,), (5,))]
    with torch.no_grad():
        for tensor in tensors:
            tensor += tensor.sign()  # away from the kink of |x|

    def sums(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return square_sums(tensors, joints=2)

    assert torch.autograd.gradcheck(sums, tensors)
    assert torch.autograd.gradgradcheck(sums, tensors)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(way, requires_grad):
    tensors = [t.requires_grad_(requires_grad) for t in (torch.randn(2, 3, 4), torch.randn(2, 2, 3).mT)]
    torch.library.opcheck(torch.ops.teleport_fast.square_sums.default, (tensors, 2))


def test_compiles_without_a_graph_break(way):
    def fn(x: Tensor, y: Tensor) -> Tensor:
        squares, l1 = square_sums([x.sin(), y.mT])
        return squares + l1

    inputs = torch.randn(2, 4, 3), torch.randn(2, 5, 4)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), fn(*inputs))


@pytest.mark.parametrize(
    "tensors, joints, error, words",
    [
        ([], 1, ValueError, ["0 tensors"]),
        ([torch.ones(1, 3, 4)] * 3, 2, ValueError, ["2 equal run(s)", "3 tensors"]),
        ([torch.ones(1, 3, 4)], 0, ValueError, ["0 equal run(s)"]),
        ([torch.ones(1, 3, 4), torch.ones(1, 2, 4)], 1, ValueError, ["(1, 3, 4)", "(1, 2, 4)", "tensors[1]"]),
        ([torch.ones(1, 3, 4), torch.ones(1, 3, 4).double()], 1, ValueError, ["torch.float64", "torch.float32"]),
        ([torch.ones(1, 3)], 1, ValueError, ["(heads, h, n)", "(1, 3)"]),
        ([torch.ones(1, 3, 4).int()], 1, TypeError, ["tensors[0]", "torch.int32"]),
        ([torch.ones(1, 3, 4), torch.ones(1, 3, 4, device="meta")], 1, ValueError, ["cpu", "meta"]),
    ],
)
def test_bad_input_names_the_argument_and_both_shapes(tensors, joints, error, words):
    with pytest.raises(error) as caught:
        square_sums(tensors, joints)
    assert all(word in str(caught.value) for word in ["square_sums", *words])
