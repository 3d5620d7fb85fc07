"""diagonal_action_ multiplies rows by powers of their scales on every backend, instruction set, dtype and layout, and touches nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teleport_fast.ops import diagonal_action_, square_sums
from teleport_fast.ops.backend import availability, set_backend

SIZES = [0, 1, 3, 7, 8, 63, 64, 65, 127, 128]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def scales(heads: int, h: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(heads, h, dtype=dtype).div(3).exp()


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_as_accurate_as_torch(A: Tensor, exponent: float, shift: float, exact) -> None:
    s = scales(A.shape[0], A.shape[1], wide(A.dtype))
    factor = exact(s[..., None]) ** np.longdouble(exponent)
    truth = (exact(A) + shift) * factor - shift
    theirs = ((A.flatten(2) + shift) * s[..., None].pow(exponent).to(A.dtype)) - shift
    diagonal_action_(A, s, [exponent], [shift])
    assert not A.isnan().any()
    if truth.size:
        error, allowed = (np.abs(exact(t) - truth).max() for t in (A, theirs))
        assert error <= 2 * allowed + torch.finfo(A.dtype).eps * np.abs(truth).max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_torchs_own_at_every_width(way, dtype, layout, exact):
    for size in SIZES:
        assert_as_accurate_as_torch(layout(torch.randn(2, size, 18).to(dtype)), -2.0, 0.0, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_torchs_own_at_every_number_of_columns(way, dtype, layout, exact):
    for size in [*SIZES, 600]:
        assert_as_accurate_as_torch(layout(torch.randn(3, 5, size).to(dtype)), 1.0, 0.5, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h", [2, 5, 31])
def test_narrow_joints_with_many_columns_are_moved_as_accurately(way, dtype, h, exact):
    assert_as_accurate_as_torch(torch.randn(5003, h, 1).to(dtype).transpose(0, 2), -1.0, 0.5, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs, taps", [(3, 9), (130, 9), (1030, 2), (40, 25)])
def test_short_runs_of_columns_are_moved_as_accurately(way, dtype, inputs, taps, exact):
    # A convolution's weight read along its inputs: rows of `taps` contiguous columns, side by side.
    assert_as_accurate_as_torch(torch.randn(2, 30, inputs, taps).to(dtype).transpose(1, 2), -1.0, 0.0, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h, n", [(5, 6), (33, 70)])
def test_nothing_outside_the_view_is_touched(way, dtype, h, n):
    # Heads, rows and columns of the view are every second of a larger tensor, or a dense corner; all else is a sentinel.
    sizes = (2, h, n)
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        around = torch.full([2 * sizes[d] + 3 for d in order], 7.0, dtype=dtype)
        turned = around.permute([order.index(d) for d in range(3)])
        for inside in (turned[1:-2:2, 1:-2:2, 1:-2:2], turned[1:3, 1 : 1 + h, 1 : 1 + n]):
            around.fill_(7.0)
            inside.fill_(1.5)
            diagonal_action_(inside, torch.full((2, h), 2.0))
            assert bool((inside == 3.0).all())
            inside.fill_(7.0)
            assert bool((around == 7.0).all())


def test_a_joints_product_is_kept_by_opposite_exponents(way):
    plus, minus, s = torch.randn(2, 4, 5), torch.randn(2, 4, 3, 2), scales(2, 4)
    product = minus.flatten(2).mT @ plus
    diagonal_action_([plus, minus], s, [1.0, -1.0])
    torch.testing.assert_close(minus.flatten(2).mT @ plus, product)
    diagonal_action_([plus, minus], s, [1.0, 1.0])
    assert not torch.allclose(minus.flatten(2).mT @ plus, product, rtol=1e-2, atol=1e-2)


def test_gradients_moved_contragrediently_give_the_sums_at_s(way):
    G, s = torch.randn(2, 4, 5), scales(2, 4)
    squares, l1 = square_sums([G])
    diagonal_action_(G, s, [-1.0])
    moved_squares, moved_l1 = square_sums([G])
    torch.testing.assert_close(moved_squares, squares / s.square())
    torch.testing.assert_close(moved_l1, l1 / s)


def test_each_tensor_of_a_run_has_its_own_exponent_and_shift_and_each_joint_its_own_scales(way):
    s = scales(6, 4)
    tensors = [torch.randn(2, 4, n) for n in (3, 20, 1, 0, 7, 9)]
    exponents, shifts = [1.0, -2.0], [1.0, 0.0]
    wanted = []
    for i, tensor in enumerate(tensors):
        factor = s[2 * (i // 2) : 2 * (i // 2) + 2, :, None].pow(exponents[i % 2])
        wanted.append((tensor + shifts[i % 2]) * factor - shifts[i % 2])
    singly = [tensor.clone() for tensor in tensors]
    diagonal_action_(tensors, s, exponents, shifts, joints=3)
    diagonal_action_(singly, s, exponents * 3, shifts * 3, joints=3)
    for tensor, single, expected in zip(tensors, singly, wanted, strict=True):
        torch.testing.assert_close(tensor, expected)
        assert torch.equal(tensor, single)


def test_small_entries_survive_a_shift(way):
    # 1 + w loses what lies under 1e-7; the move of a gain must not.
    A = torch.full((1, 1, 40), 1e-9)
    diagonal_action_(A, torch.ones(1, 1), [1.0], [1.0])
    if way != "reference":
        assert A.unique().tolist() == [torch.tensor(1e-9).item()]


def test_dtypes_of_one_call_may_differ(way):
    tensors = [torch.ones(1, 2, 3).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    diagonal_action_(tensors, torch.tensor([[2.0, 0.5]]).double(), [2.0] * 3)
    for tensor in tensors:
        assert tensor.float().tolist() == [[[4.0] * 3, [0.25] * 3]]


def test_negative_scales_take_whole_powers(way):
    A = torch.ones(1, 2, 3)
    diagonal_action_([A, A], torch.tensor([[-2.0, -0.5]]), [2.0, -1.0])
    assert A[..., 0].tolist() == [[-2.0, -0.5]]


def test_views_of_the_same_memory_move_one_after_the_other(way):
    W, s = torch.randn(700, 700), scales(1, 700)
    wanted = s[0, :, None] * W / s[0]
    diagonal_action_([W[None], W.mT[None]], s, [1.0, -1.0])
    torch.testing.assert_close(W, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_half_precision_is_to_nearest_even(way, dtype):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    values = values[~values.isnan()]
    for scale in (1.0, 1 + 2**-12, 1 - 2**-9, 3.0):
        A = values.clone().view(1, 1, -1)
        diagonal_action_(A, torch.full((1, 1), scale))
        assert torch.equal(A.flatten().view(torch.int16), (values.float() * scale).to(dtype).view(torch.int16))


def test_bits_do_not_depend_on_the_number_of_threads(cpp_way, layout):
    A, s = torch.randn(3, 33, 2000), scales(3, 33)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        moved = layout(A)
        diagonal_action_(moved, s)
        results.append(moved)
    torch.set_num_threads(before)
    assert all(torch.equal(other, results[0]) for other in results[1:])


@settings(max_examples=60)
@given(data=st.data())
def test_cpp_equals_the_reference_on_any_shape(data):
    if availability("cpp") is not True:
        pytest.skip(str(availability("cpp")))
    heads, h, dtype = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40)), data.draw(st.sampled_from(DTYPES))
    shape = [heads, h, *data.draw(st.lists(st.integers(0, 90), min_size=1, max_size=2))]
    order = data.draw(st.permutations(range(len(shape))))
    stored, s = torch.randn([shape[d] for d in order]).to(dtype), scales(heads, h)
    moved = {}
    for backend in ("reference", "cpp"):
        moved[backend] = stored.clone()
        with set_backend(backend):
            diagonal_action_(moved[backend].permute([order.index(d) for d in range(len(shape))]), s, [-1.0])
    assert torch.equal(moved["cpp"], moved["reference"])


def test_opcheck(way):
    tensors = [torch.randn(2, 3, 4), torch.randn(2, 3, 5), torch.randn(2, 3, 1), torch.randn(2, 3, 2, 2)]
    arguments = (tensors, scales(4, 3), [1.0, -1.0, 2.0, 0.0], [0.0, 1.0, 0.0, 0.0], 2)
    torch.library.opcheck(torch.ops.teleport_fast.diagonal_action_.default, arguments)


def test_compiles_without_a_graph_break(way):
    def fn(plus: Tensor, minus: Tensor, s: Tensor) -> Tensor:
        plus, minus = plus.sin(), minus.clone()
        diagonal_action_([plus, minus], s, [1.0, -2.0])
        return minus.mT @ plus

    inputs = torch.randn(2, 4, 3), torch.randn(2, 4, 5), scales(2, 4)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), fn(*inputs))


def test_autograd_notices_the_move(way):
    w = torch.randn(1, 3, 4, requires_grad=True)
    loss = w.square().sum()
    with torch.no_grad():
        diagonal_action_(w, scales(1, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_recording_gradients_in_place_is_refused():
    with pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        diagonal_action_(torch.randn(1, 3, 4, requires_grad=True), scales(1, 3))


def test_inference_tensors_move_too(way):
    with torch.inference_mode():
        A = torch.ones(1, 1, 2)
        diagonal_action_(A, torch.full((1, 1), 2.0))
    assert A.tolist() == [[[2.0, 2.0]]]


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"tensors": []}, ValueError, ["0 tensors"]),
        ({"joints": 2}, ValueError, ["2 equal run(s)", "1 tensors"]),
        ({"s": torch.ones(2, 3)}, ValueError, ["s must be (1, 3)", "(2, 3)", "(1, 3, 4)"]),
        ({"s": torch.ones(1, 3, device="meta")}, ValueError, ["s is on meta", "cpu"]),
        ({"s": torch.ones(1, 3).int()}, TypeError, ["s must be a floating tensor", "torch.int32"]),
        ({"exponents": [1.0, 2.0]}, ValueError, ["exponents must be 1 values", "got 2"]),
        ({"shifts": []}, ValueError, ["shifts must be 1 values", "got 0"]),
        ({"tensors": torch.ones(1, 3, 4).int()}, TypeError, ["tensors[0]", "torch.int32"]),
        ({"tensors": torch.ones(1, 3, 1).expand(1, 3, 4)}, ValueError, ["share memory"]),
    ],
)
def test_bad_input_names_the_argument_and_both_shapes(change, error, words):
    arguments = {"tensors": torch.ones(1, 3, 4), "s": torch.ones(1, 3), **change}
    with pytest.raises(error) as caught:
        diagonal_action_(**arguments)
    assert all(word in str(caught.value) for word in ["diagonal_action_", *words])
