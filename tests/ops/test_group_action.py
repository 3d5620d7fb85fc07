"""group_action moves A₊ by g and A₋ by g⁻ᵀ on every backend, dtype and layout, and touches nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teleport_fast.ops import gram_difference, group_action, group_action_
from teleport_fast.ops.backend import availability, set_backend

SIZES = [0, 1, 3, 7, 8, 63, 64, 65, 127, 128]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def near_identity(heads: int, h: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.eye(h, dtype=dtype) + torch.randn(heads, h, h, dtype=dtype) / (3 * max(h, 1) ** 0.5)


def rms(error: np.ndarray) -> float:
    return float(np.sqrt((error**2).mean())) if error.size else 0.0


def assert_as_accurate_as_torch(A: Tensor, exact) -> None:
    g = near_identity(A.shape[0], A.shape[1], accumulation(A.dtype))
    truth = exact(g) @ exact(A)
    theirs = g.to(A.dtype) @ A.flatten(2)
    group_action_(A, [], g)
    error, allowed = (rms(exact(t) - truth) for t in (A, theirs))
    # One rounding is granted where torch happens to be exact.
    assert error <= 2 * allowed + torch.finfo(A.dtype).eps * rms(truth), f"{A.shape}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_torchs_own_at_every_width(way, dtype, layout, exact):
    for h in SIZES:
        assert_as_accurate_as_torch(layout(torch.randn(2, h, 18).to(dtype)), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_torchs_own_at_every_number_of_columns(way, dtype, layout, exact):
    for n in (*SIZES, 600):
        assert_as_accurate_as_torch(layout(torch.randn(3, 5, n).to(dtype)), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h, n", [(5, 6), (16, 64), (33, 70)])
def test_nothing_outside_the_view_is_touched(way, dtype, h, n):
    # Heads, rows and columns of the view are every second of a larger tensor; all else is a sentinel.
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        sizes = (2, h, n)
        around = torch.full([2 * sizes[d] + 3 for d in order], 7.0, dtype=dtype)
        view = around.permute([order.index(d) for d in range(3)])[1:-2:2, 1:-2:2, 1:-2:2]
        dense = around.permute([order.index(d) for d in range(3)])[1 : 1 + 2, 1 : 1 + h, 1 : 1 + n]
        for inside in (view, dense):
            around.fill_(7.0)
            A = torch.randn(sizes).to(dtype)
            inside.copy_(A)
            g = near_identity(2, h, accumulation(dtype))
            group_action_(inside, [], g)
            torch.testing.assert_close(inside, (g @ A.to(g.dtype)).to(dtype), rtol=2e-2, atol=2e-2)
            inside.fill_(7.0)
            assert bool((around == 7.0).all())


def test_plus_moves_by_g_and_minus_by_its_inverse_transpose(way):
    plus, minus, g = torch.randn(2, 4, 5), torch.randn(2, 4, 3, 2), near_identity(2, 4)
    moved_plus, moved_minus = group_action(plus, minus, g)
    torch.testing.assert_close(moved_plus, g @ plus)
    torch.testing.assert_close(moved_minus.flatten(2), torch.linalg.inv(g).mT @ minus.flatten(2))
    # What the two layers compute together does not change; moved by g on both sides it does.
    torch.testing.assert_close(moved_minus.flatten(2).mT @ moved_plus, minus.flatten(2).mT @ plus)
    wrong = (g @ minus.flatten(2)).mT @ moved_plus
    assert not torch.allclose(wrong, minus.flatten(2).mT @ plus, rtol=1e-3, atol=1e-3)


def test_gradients_moved_contragrediently_give_the_objective_at_g(way):
    # J at g·w from moved gradients equals tr(P⁻¹S₊) + tr(P S₋), P = gᵀg.
    G_plus, G_minus, g = torch.randn(2, 4, 5), torch.randn(2, 4, 6), near_identity(2, 4)
    P = g.mT @ g
    wanted = torch.einsum("bij,bjk,bik->b", torch.linalg.inv(P), G_plus, G_plus)
    wanted = wanted + torch.einsum("bij,bjk,bik->b", P, G_minus, G_minus)
    group_action_(G_minus, G_plus, g)
    torch.testing.assert_close(gram_difference(G_plus, G_minus)[1], wanted, rtol=1e-4, atol=1e-4)


def test_in_place_and_functional_agree_and_an_inverse_may_be_given(way):
    plus, minus, g = torch.randn(2, 4, 5), torch.randn(2, 4, 3), near_identity(2, 4)
    moved_plus, moved_minus = group_action(plus, minus, g)
    assert not torch.equal(plus, moved_plus)
    group_action_(plus, minus, g, torch.linalg.inv(g).mT)
    torch.testing.assert_close(plus, moved_plus)
    torch.testing.assert_close(minus, moved_minus)


def test_each_joint_of_a_call_gets_its_own_heads_of_g(way):
    g = near_identity(6, 4)
    tensors = [torch.randn(2, 4, n) for n in (3, 20, 1, 0, 7, 9)]
    wanted = [g[2 * (i // 2) : 2 * (i // 2) + 2] @ t for i, t in enumerate(tensors)]
    group_action_(tensors, [], g, joints=3)
    for tensor, expected in zip(tensors, wanted, strict=True):
        torch.testing.assert_close(tensor, expected)


def test_dtypes_of_one_call_may_differ(way):
    tensors = [torch.ones(1, 2, 3).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    group_action_(tensors, [], torch.tensor([[[2.0, 0.0], [1.0, 1.0]]]))
    for tensor in tensors:
        assert tensor.float().tolist() == [[[2.0] * 3, [2.0] * 3]]


def test_views_of_the_same_memory_move_one_after_the_other(way):
    # A square layer that reads and writes one space: W → g W, then its columns by g⁻ᵀ, so W → g W g⁻¹.
    W, g = torch.randn(70, 70), near_identity(1, 70)
    wanted = g[0] @ W @ torch.linalg.inv(g[0])
    group_action_(W[None], W.mT[None], g)
    torch.testing.assert_close(W, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("special", [float("inf"), float("nan")])
def test_only_columns_with_non_finite_entries_become_non_finite(way, special):
    A = torch.randn(1, 9, 40)
    A[0, 3, 17] = special
    group_action_(A, [], near_identity(1, 9))
    assert not A[0, :, 17].isfinite().any()
    A[0, :, 17] = 0
    assert A.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_half_precision_is_to_nearest_even(way, dtype):
    # Times one: every finite value comes back, subnormals and infinities included. Times 1 + 2^-12: as torch rounds it.
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    values = values[~values.isnan()]
    A = values.clone().view(1, 1, -1)
    for scale in (1.0, 1 + 2**-12, 1 - 2**-9, 3.0):
        A.copy_(values.view(1, 1, -1))
        group_action_(A, [], torch.full((1, 1, 1), scale))
        assert torch.equal(A.flatten(), (values.float() * scale).to(dtype))


def test_bits_do_not_depend_on_the_number_of_threads(cpp_way, layout):
    A, g = torch.randn(3, 33, 2000), near_identity(3, 33)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        moved = layout(A)
        group_action_(moved, [], g)
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
    stored = torch.randn([shape[d] for d in order]).to(dtype)
    back = [order.index(d) for d in range(len(shape))]
    g = near_identity(heads, h, accumulation(dtype))
    moved = {}
    for backend in ("reference", "cpp"):
        moved[backend] = stored.clone()
        with set_backend(backend):
            group_action_([], moved[backend].permute(back), g, g)
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-12, torch.bfloat16: 4e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(moved["cpp"], moved["reference"], rtol=tolerance, atol=tolerance)


def test_gradients_of_any_order_match_finite_differences(way):
    plus, minus = (torch.randn(2, 3, *n, dtype=torch.float64, requires_grad=True) for n in ((4,), (2, 2)))
    g = near_identity(2, 3, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(group_action, (plus, minus, g))
    assert torch.autograd.gradgradcheck(group_action, (plus, minus, g))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_of_the_functional_op(way, requires_grad):
    inputs = torch.randn(2, 3, 4), torch.randn(2, 2, 3).mT, near_identity(2, 3)
    inputs = tuple(t.requires_grad_(requires_grad) for t in inputs)
    torch.library.opcheck(torch.ops.teleport_fast.group_action.default, inputs)


@pytest.mark.parametrize("with_inverse", [False, True])
def test_opcheck_of_the_in_place_op(way, with_inverse):
    g = near_identity(4, 3)
    plus, minus = [torch.randn(2, 3, 4), torch.randn(2, 3, 5)], [torch.randn(2, 3, 1), torch.randn(2, 3, 2, 2)]
    inverse = torch.linalg.inv(g).mT if with_inverse else None
    torch.library.opcheck(torch.ops.teleport_fast.group_action_.default, (plus, minus, g, inverse, 2))


def test_compiles_without_a_graph_break(way):
    def functional(plus: Tensor, minus: Tensor, g: Tensor) -> Tensor:
        moved_plus, moved_minus = group_action(plus.sin(), minus, g)
        return moved_minus.mT @ moved_plus

    def in_place(plus: Tensor, minus: Tensor, g: Tensor) -> Tensor:
        plus, minus = plus.sin(), minus.clone()
        group_action_([plus], [minus], g)
        return minus.mT @ plus

    inputs = torch.randn(2, 4, 3), torch.randn(2, 4, 5), near_identity(2, 4)
    for fn in (functional, in_place):
        compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs), fn(*inputs))


def test_autograd_notices_the_move(way):
    w = torch.randn(1, 3, 4, requires_grad=True)
    loss = w.square().sum()
    with torch.no_grad():
        group_action_(w, [], near_identity(1, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_recording_gradients_in_place_is_refused():
    w = torch.randn(1, 3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        group_action_(w, [], near_identity(1, 3))


def test_inference_tensors_move_too(way):
    with torch.inference_mode():
        A = torch.ones(1, 1, 2)
        group_action_(A, [], torch.full((1, 1, 1), 2.0))
    assert A.tolist() == [[[2.0, 2.0]]]


@pytest.mark.parametrize(
    "view",
    [torch.ones(1, 3, 1).expand(1, 3, 4), torch.ones(10).as_strided((1, 3, 4), (0, 2, 1))],
    ids=["expanded", "sliding"],
)
def test_views_whose_entries_share_memory_are_refused(view):
    with pytest.raises(ValueError, match="share memory"):
        group_action_(view, [], torch.ones(1, 3, 3))


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"g": torch.ones(2, 3, 3)}, ValueError, ["g must be (1, 3, 3)", "(2, 3, 3)", "(1, 3, 4)"]),
        ({"g_inverse_t": torch.ones(1, 3, 2)}, ValueError, ["g_inverse_t", "(1, 3, 2)"]),
        ({"g": torch.ones(1, 3, 3).int()}, TypeError, ["g must be a floating tensor", "torch.int32"]),
        ({"minus": torch.ones(1, 2, 4)}, ValueError, ["plus[0]", "minus[0]", "(1, 3, 4)", "(1, 2, 4)"]),
        ({"joints": 2}, ValueError, ["joints=2"]),
        ({"minus": torch.ones(1, 3, 4).double()}, ValueError, ["float64"]),
    ],
)
def test_bad_input_names_the_argument_and_both_shapes(change, error, words):
    arguments = {"plus": torch.ones(1, 3, 4), "minus": torch.ones(1, 3, 2), "g": torch.eye(3)[None], **change}
    with pytest.raises(error) as caught:
        group_action_(**arguments)
    assert all(word in str(caught.value) for word in ["group_action_", *words])


def test_a_singular_g_is_refused():
    with pytest.raises(torch.linalg.LinAlgError):
        group_action(torch.ones(1, 2, 3), torch.ones(1, 2, 3), torch.ones(1, 2, 2))
