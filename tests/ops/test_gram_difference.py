"""gram_difference equals S₋ − S₊ and tr S₊ + tr S₋ on every backend, instruction set, dtype and memory layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from teleport_fast.ops import gram_difference
from teleport_fast.ops.backend import availability, set_backend

SIZES = [0, 1, 3, 7, 8, 63, 64, 65, 127, 128]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms(error: np.ndarray) -> float:
    return float(np.sqrt((error**2).mean())) if error.size else 0.0


def assert_as_accurate_as_torch(plus: Tensor, minus: Tensor, exact) -> None:
    D, J = gram_difference(plus, minus)
    P, M = exact(plus), exact(minus)
    D_exact = M @ M.swapaxes(1, 2) - P @ P.swapaxes(1, 2)
    J_exact = (P * P).sum((1, 2)) + (M * M).sum((1, 2))
    # torch's own, at the storage dtype: two products and a subtraction.
    p, m = plus.flatten(2), minus.flatten(2)
    D_torch = m @ m.mT - p @ p.mT
    J_torch = p.square().sum((1, 2)) + m.square().sum((1, 2))
    for ours, theirs, truth in ((D, D_torch, D_exact), (J, J_torch, J_exact)):
        assert ours.dtype == accumulation(plus.dtype) and tuple(ours.shape) == truth.shape
        error, allowed = (rms(t.double().numpy() - truth) for t in (ours, theirs))
        # One rounding is granted where torch happens to be exact.
        assert error <= 2 * allowed + torch.finfo(ours.dtype).eps * rms(truth), f"{plus.shape} {minus.shape}"
    assert torch.equal(D, D.mT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_torchs_own_at_every_width(way, dtype, layout, exact, nan_filled_memory):
    for h in SIZES:
        plus, minus = (layout(torch.randn(2, h, n).to(dtype)) for n in (9, 30))
        assert_as_accurate_as_torch(plus, minus, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_torchs_own_at_every_number_of_columns(way, dtype, layout, exact, nan_filled_memory):
    for n in (*SIZES, 1000):
        plus, minus = (layout(torch.randn(3, 5, columns).to(dtype)) for columns in (n, 12))
        assert_as_accurate_as_torch(plus, minus, exact)


@pytest.mark.parametrize("h", [5, 16, 17, 32, 70])
def test_many_columns_are_split_and_added_up(way, h, layout, exact):
    # Odd sizes over several panels and several parts per head; 5 and 16 fit one vector, 32 is a whole strip of AVX-512.
    plus, minus = (layout(torch.randn(2, h, n)) for n in (1155, 2310))
    assert_as_accurate_as_torch(plus, minus, exact)


def test_grams_of_one_joints_tensors_add_up_and_joints_stay_apart(way):
    shapes = [(2, 6, 5), (2, 6, 2, 3), (2, 6, 1), (2, 6, 0)]
    plus = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    minus = [torch.randn(shape, dtype=torch.float64) for shape in reversed(shapes)]
    D, J = gram_difference(plus, minus, joints=2)
    for joint in range(2):
        run = slice(2 * joint, 2 * joint + 2)
        P, M = (torch.cat([t.flatten(2) for t in side[run]], 2) for side in (plus, minus))
        rows = slice(2 * joint, 2 * joint + 2)
        torch.testing.assert_close(D[rows], M @ M.mT - P @ P.mT)
        torch.testing.assert_close(J[rows], P.square().sum((1, 2)) + M.square().sum((1, 2)))


def test_dtypes_of_one_call_may_differ(way):
    plus = [torch.randn(1, 4, 6).to(dtype) for dtype in (torch.float32, torch.bfloat16)]
    minus = [torch.randn(1, 4, 6).half()]
    D, _ = gram_difference(plus, minus)
    M, P = minus[0].float(), torch.cat([t.float() for t in plus], 2)
    torch.testing.assert_close(D, M @ M.mT - P @ P.mT)


def test_one_side_may_be_missing(way):
    G = torch.randn(2, 4, 5)
    torch.testing.assert_close(gram_difference([], G)[0], G @ G.mT)
    torch.testing.assert_close(gram_difference(G, [])[0], -(G @ G.mT))


def test_swapped_sides_change_the_sign(way):
    # Negative control: an op that ignored which side is which would pass tests of |D| and J.
    plus, minus = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    D, J = gram_difference(plus, minus)
    D_swapped, J_swapped = gram_difference(minus, plus)
    torch.testing.assert_close(D_swapped, -D)
    torch.testing.assert_close(J_swapped, J)
    assert not torch.allclose(D, D_swapped)


def test_non_finite_gradients_are_seen_in_j(way):
    plus, minus = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    plus[1, 2, 3] = float("nan")
    minus[0, 0, 0] = float("inf")
    _, J = gram_difference(plus, minus)
    assert J[0].isinf() and J[1].isnan()


@pytest.mark.parametrize("heads, h, n", [(1, 96, 3000), (5, 40, 700), (64, 8, 300)])
def test_bits_do_not_depend_on_the_number_of_threads(cpp_way, heads, h, n, layout):
    plus, minus = layout(torch.randn(heads, h, n)), layout(torch.randn(heads, h, n))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(gram_difference(plus, minus))
    torch.set_num_threads(before)
    for D, J in results[1:]:
        assert torch.equal(D, results[0][0]) and torch.equal(J, results[0][1])


@settings(max_examples=60)
@given(data=st.data())
def test_cpp_equals_the_reference_on_any_shape(data):
    if availability("cpp") is not True:
        pytest.skip(str(availability("cpp")))
    heads, h = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    joints, dtype = data.draw(st.integers(1, 3)), data.draw(st.sampled_from(DTYPES))

    def side() -> list[Tensor]:
        tensors = []
        for _ in range(joints * data.draw(st.integers(0, 2))):
            columns = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=2))
            order = data.draw(st.permutations(range(2 + len(columns))))
            shape = [heads, h, *columns]
            stored = torch.randn([shape[d] for d in order]).to(dtype)
            tensors.append(stored.permute([order.index(d) for d in range(len(shape))]))
        return tensors

    plus, minus = side(), side()
    if not plus and not minus:
        return
    with set_backend("reference"):
        D, J = gram_difference(plus, minus, joints)
    with set_backend("cpp"):
        D_cpp, J_cpp = gram_difference(plus, minus, joints)
    torch.testing.assert_close(D_cpp, D, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(J_cpp, J, rtol=1e-5, atol=1e-3)


def test_gradients_of_any_order_match_finite_differences(way):
    def make(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    inputs = make(2, 3, 4), make(2, 3, 2, 2), make(2, 3, 5), make(2, 3, 1)

    def fn(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        return gram_difference([a, b], [c, d], joints=2)

    assert torch.autograd.gradcheck(fn, inputs)
    assert torch.autograd.gradgradcheck(fn, inputs)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(way, requires_grad):
    plus = [torch.randn(2, 3, 4, requires_grad=requires_grad), torch.randn(2, 3, 2, 2)]
    minus = [torch.randn(2, 5, 3, requires_grad=requires_grad).mT, torch.randn(2, 3, 0)]
    torch.library.opcheck(torch.ops.teleport_fast.gram_difference.default, (plus, minus, 2))


def test_compiles_without_a_graph_break(way):
    def norm(plus: Tensor, minus: Tensor) -> Tensor:
        D, J = gram_difference(plus.sin(), minus)
        return (D @ D).sum() + J.sum()

    plus, minus = torch.randn(2, 4, 3), torch.randn(2, 4, 5)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(plus, minus), norm(plus, minus))


@pytest.mark.parametrize(
    "plus, minus, joints, error, words",
    [
        ([], [], 1, ValueError, ["both empty"]),
        ([torch.ones(2, 3, 4)] * 3, [], 2, ValueError, ["joints=2", "3 and 0"]),
        ([torch.ones(2, 3, 4)], [torch.ones(2, 5, 4)], 1, ValueError, ["(2, 3, 4)", "(2, 5, 4)", "G_minus[0]"]),
        ([torch.ones(3, 4)], [torch.ones(3, 4)], 1, ValueError, ["(heads, h, n)", "(3, 4)"]),
        ([torch.ones(1, 2, 3).double()], [torch.ones(1, 2, 3)], 1, ValueError, ["float64", "float32", "G_minus[0]"]),
        ([torch.ones(1, 2, 3).int()], [], 1, TypeError, ["G_plus[0]", "torch.int32"]),
        ([torch.ones(1, 2, 3)], [torch.ones(1, 2, 3, device="meta")], 1, ValueError, ["cpu", "meta"]),
    ],
)
def test_bad_input_names_the_argument_and_both_shapes(plus, minus, joints, error, words):
    with pytest.raises(error) as caught:
        gram_difference(plus, minus, joints)
    assert all(word in str(caught.value) for word in ["gram_difference", *words])
