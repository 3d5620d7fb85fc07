"""grad_norm_objective equals tr(P⁻¹S₊) + tr(P S₋), the squared gradient norm after g, on every backend, dtype and layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from teleport_fast.ops import grad_norm_objective, group_action

SIZES = [0, 1, 3, 7, 8, 63, 64, 65, 127, 128]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def elements(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Group elements near the identity, as a search visits them."""
    h = shape[-1]
    return torch.eye(h, dtype=dtype) + 0.3 * torch.randn(*shape, h, dtype=dtype) / max(1, h) ** 0.5


def exact_objective(plus: np.ndarray, minus: np.ndarray, g: Tensor) -> np.ndarray:
    """‖g⁻ᵀ G₊‖² + ‖g G₋‖² with the inverse refined to extended precision."""
    matrix = g.double().numpy().astype(np.longdouble)
    inverse = torch.linalg.inv(g.double()).numpy().astype(np.longdouble)
    for _ in range(2):
        inverse = inverse @ (2 * np.eye(g.shape[-1], dtype=np.longdouble) - matrix @ inverse)
    return ((inverse.swapaxes(-1, -2) @ plus) ** 2).sum((-1, -2)) + ((matrix @ minus) ** 2).sum((-1, -2))


def by_torch(plus: Tensor, minus: Tensor, g: Tensor) -> Tensor:
    p, m = plus.flatten(2).to(g.dtype), minus.flatten(2).to(g.dtype)
    inverse = torch.linalg.inv(g)
    return ((inverse @ inverse.mT) * (p @ p.mT)).sum((-1, -2)) + ((g.mT @ g) * (m @ m.mT)).sum((-1, -2))


def assert_as_accurate_as_torch(plus: Tensor, minus: Tensor, g: Tensor, exact) -> None:
    J = grad_norm_objective(plus, minus, g)
    truth, theirs = exact_objective(exact(plus), exact(minus), g), by_torch(plus, minus, g)
    assert J.shape == truth.shape and J.dtype == g.dtype
    if truth.size:
        error, allowed = (np.abs(t.double().numpy() - truth).max() for t in (J, theirs))
        # Roundings of the result are granted where torch happens to be exact.
        assert error <= 2 * allowed + 4 * torch.finfo(g.dtype).eps * float(truth.max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_error_is_at_most_twice_torchs_own_at_every_width(way, size, dtype, exact, nan_filled_memory):
    g = elements(2, size, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    plus, minus = torch.randn(2, size, 9).to(dtype), torch.randn(30, 2, size).to(dtype).permute(1, 2, 0)
    assert_as_accurate_as_torch(plus, minus, g, exact)


@pytest.mark.parametrize("size", SIZES)
def test_error_is_at_most_twice_torchs_own_at_every_number_of_columns(way, size, layout, exact):
    assert_as_accurate_as_torch(*(layout(torch.randn(3, 5, n)) for n in (size, 12)), elements(3, 5), exact)


def test_a_rotation_and_a_pivot_are_no_trouble(way, exact):
    # A permutation has zeros on its diagonal: elimination without pivots fails.
    plus, minus = torch.randn(1, 6, 4), torch.randn(1, 6, 9)
    g = torch.eye(6)[torch.tensor([3, 0, 5, 1, 2, 4])][None]
    torch.testing.assert_close(grad_norm_objective(plus, minus, g), plus.square().sum((1, 2)) + minus.square().sum((1, 2)))


def test_it_is_the_norm_of_the_moved_gradients(way):
    plus, minus, g = torch.randn(2, 4, 5), torch.randn(2, 4, 6), elements(2, 4)
    moved_minus, moved_plus = group_action(minus, plus, g)
    expected = moved_plus.square().sum((1, 2)) + moved_minus.square().sum((1, 2))
    torch.testing.assert_close(grad_norm_objective(plus, minus, g), expected)
    # Negative control: gradients do not move as parameters do.
    wrong_plus, wrong_minus = group_action(plus, minus, g)
    assert not torch.allclose(wrong_plus.square().sum((1, 2)) + wrong_minus.square().sum((1, 2)), expected)


def test_every_candidate_is_computed_as_if_alone(way):
    plus, minus, g = torch.randn(2, 7, 5), torch.randn(2, 7, 6), elements(4, 2, 7)
    J = grad_norm_objective(plus, minus, g)
    assert J.shape == (4, 2)
    torch.testing.assert_close(J, torch.stack([grad_norm_objective(plus, minus, one) for one in g]))
    assert grad_norm_objective(plus, minus, g[:0]).shape == (0, 2)


def test_joints_stay_apart_and_one_side_may_be_missing(way):
    plus = [torch.randn(2, 3, 4), torch.randn(2, 3, 2, 2), torch.randn(2, 3, 1), torch.randn(2, 3, 0)]
    minus = [torch.randn(2, 3, 5), torch.randn(2, 3, 1)]
    g = elements(4, 3)
    J = grad_norm_objective(plus, minus, g, joints=2)
    for joint in range(2):
        rows = slice(2 * joint, 2 * joint + 2)
        own = grad_norm_objective(plus[rows], minus[joint], g[rows])
        torch.testing.assert_close(J[rows], own)
    parts = grad_norm_objective(plus, [], g, 2) + grad_norm_objective([], minus, g, 2)
    torch.testing.assert_close(J, parts)


def test_a_singular_element_gives_infinity(way):
    g = torch.stack((torch.zeros(3, 3), torch.eye(3)))
    J = grad_norm_objective(torch.ones(2, 3, 2), torch.ones(2, 3, 2), g)
    assert J[0].isinf() and J[1] == 12


@pytest.mark.parametrize("candidates, heads, h", [(1, 9, 33), (8, 3, 16), (64, 2, 5)])
def test_bits_do_not_depend_on_the_number_of_threads(cpp_way, candidates, heads, h):
    plus, minus, g = torch.randn(heads, h, 300), torch.randn(heads, h, 700), elements(candidates, heads, h)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(grad_norm_objective(plus, minus, g))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("candidates", [(), (2,)])
def test_gradients_of_any_order_match_finite_differences(way, candidates):
    def make(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    inputs = make(1, 2, 2), make(1, 2, 2, 1), make(1, 2, 1), make(1, 2, 1)
    g = elements(*candidates, 2, 2, dtype=torch.float64).requires_grad_()

    def fn(a: Tensor, b: Tensor, c: Tensor, d: Tensor, g: Tensor) -> Tensor:
        return grad_norm_objective([a, b], [c, d], g, joints=2)

    assert torch.autograd.gradcheck(fn, (*inputs, g))
    assert torch.autograd.gradgradcheck(fn, (*inputs, g))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(way, requires_grad):
    plus = [torch.randn(2, 3, 4, requires_grad=requires_grad), torch.randn(2, 3, 2, 2)]
    minus = [torch.randn(2, 5, 3, requires_grad=requires_grad).mT, torch.randn(2, 3, 0)]
    g = elements(3, 4, 3).requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.teleport_fast.grad_norm_objective.default, (plus, minus, g, 2))


def test_compiles_without_a_graph_break(way):
    def value(plus: Tensor, minus: Tensor, g: Tensor) -> Tensor:
        return grad_norm_objective(plus.sin(), minus, g).sum()

    inputs = torch.randn(2, 4, 3), torch.randn(2, 4, 5), elements(3, 2, 4)
    torch.testing.assert_close(torch.compile(value, fullgraph=True, backend="aot_eager")(*inputs), value(*inputs))


@pytest.mark.parametrize(
    "plus, minus, g, joints, error, words",
    [
        ([], [], torch.eye(2)[None], 1, ValueError, ["both empty"]),
        ([torch.ones(2, 3, 4)] * 3, [], torch.ones(2, 3, 3), 2, ValueError, ["joints=2", "3 and 0"]),
        ([torch.ones(2, 3, 4)], [torch.ones(2, 5, 4)], torch.ones(2, 3, 3), 1, ValueError, ["(2, 3, 4)", "(2, 5, 4)"]),
        ([torch.ones(2, 3, 4)], [], torch.ones(3, 3), 1, ValueError, ["(2, 3, 3)", "(3, 3)"]),
        ([torch.ones(2, 3, 4)], [], torch.ones(5, 1, 3, 3), 1, ValueError, ["(2, 3, 3)", "(1, 3, 3)"]),
        ([torch.ones(1, 2, 3).int()], [], torch.ones(1, 2, 2), 1, TypeError, ["G_plus[0]", "torch.int32"]),
        ([torch.ones(1, 2, 3)], [], torch.ones(1, 2, 2, device="meta"), 1, ValueError, ["cpu", "meta"]),
    ],
)
def test_bad_input_names_the_argument_and_both_shapes(plus, minus, g, joints, error, words):
    with pytest.raises(error) as caught:
        grad_norm_objective(plus, minus, g, joints)
    assert all(word in str(caught.value) for word in ["grad_norm_objective", *words])
