"""covariance_ equals β C + (1 − β) Σ G Gᵀ/‖G‖² on every backend, instruction set, dtype and memory layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from teleport_fast.ops import covariance_

SIZES = [0, 1, 3, 7, 8, 63, 64, 65, 127, 128]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def symmetric(count: int, h: int, dtype: torch.dtype = torch.float32) -> Tensor:
    half = torch.randn(count, h, h, dtype=dtype)
    return half + half.mT


def assert_as_accurate_as_torch(tensors: list[Tensor], joints: int, exact) -> None:
    heads, h = tensors[0].shape[:2]
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    start = symmetric(joints * heads, h, dtype)
    truth = 0.75 * start.double().numpy().astype(np.longdouble)
    theirs = 0.75 * start
    run = len(tensors) // joints
    for index, tensor in enumerate(tensors):
        rows = slice(index // run * heads, (index // run + 1) * heads)
        G, g = exact(tensor), tensor.flatten(2).to(dtype)
        if (G * G).sum() > 0:
            truth[rows] += 0.25 * (G @ G.swapaxes(1, 2)) / (G * G).sum()
            theirs[rows] += 0.25 * (g @ g.mT) / g.square().sum()
    ours = start.clone()
    covariance_(ours, tensors, 0.75, joints)
    assert torch.equal(ours, ours.mT) or ours.allclose(ours.mT, rtol=4 * torch.finfo(dtype).eps)
    if truth.size:
        error, allowed = (np.abs(t.double().numpy() - truth).max() for t in (ours, theirs))
        assert error <= 2 * allowed + torch.finfo(dtype).eps * float(np.abs(truth).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_error_is_at_most_twice_torchs_own_at_every_width(way, size, dtype, exact, nan_filled_memory):
    tensors = [torch.randn(2, size, 9).to(dtype), torch.randn(30, 2, size).to(dtype).permute(1, 2, 0)]
    assert_as_accurate_as_torch(tensors, 2, exact)


@pytest.mark.parametrize("size", SIZES)
def test_error_is_at_most_twice_torchs_own_at_every_number_of_columns(way, size, layout, exact):
    assert_as_accurate_as_torch([layout(torch.randn(3, 5, n)) for n in (size, 12)], 1, exact)


def test_many_columns_are_split_and_added_up(way, layout, exact):
    # Two parts of 16 panels of 192 columns, the last of odd size.
    assert_as_accurate_as_torch([layout(torch.randn(2, 35, n)) for n in (3465, 385)], 1, exact)


def test_joints_stay_apart_and_a_weight_is_over_all_heads(way):
    shapes = [(3, 6, 5), (3, 6, 2, 3), (3, 6, 1), (3, 6, 0)]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    covariance = torch.zeros(6, 6, 6, dtype=torch.float64)
    covariance_(covariance, tensors, 0.5, joints=2)
    for joint in range(2):
        expected = torch.zeros(3, 6, 6, dtype=torch.float64)
        for tensor in tensors[2 * joint : 2 * joint + 2]:
            G = tensor.flatten(2)
            if G.numel():
                expected += 0.5 * G @ G.mT / G.square().sum()
        torch.testing.assert_close(covariance[3 * joint : 3 * joint + 3], expected)


def test_trace_counts_the_usable_gradients(way):
    covariance = torch.zeros(2, 9, 9)
    covariance_(covariance, [torch.randn(2, 9, n) for n in (4, 40, 400)], 0.75)
    torch.testing.assert_close(covariance.diagonal(dim1=1, dim2=2).sum(), torch.tensor(0.75))


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), 1e25, 1e-25])
def test_zero_and_non_finite_gradients_add_nothing(way, bad):
    # 1e25 and 1e-25: a norm whose square leaves float32 in either direction.
    good, start = torch.randn(2, 5, 6), symmetric(2, 5)
    wrong = torch.full((2, 5, 6), bad) if bad in (0.0, 1e25, 1e-25) else torch.randn(2, 5, 6)
    wrong[1, 2, 3] = bad
    with_wrong, without = start.clone(), start.clone()
    covariance_(with_wrong, [good, wrong], 0.9)
    covariance_(without, [good], 0.9)
    torch.testing.assert_close(with_wrong, without)
    # Negative control: the same place with a usable gradient is seen.
    covariance_(start, [good, torch.ones(2, 5, 6)], 0.9)
    assert not torch.allclose(start, without)


def test_the_scale_of_a_gradient_does_not_matter(way):
    G, small, large = torch.randn(2, 5, 6), torch.zeros(2, 5, 5), torch.zeros(2, 5, 5)
    covariance_(small, 1e-6 * G, 0.9)
    covariance_(large, 1e6 * G, 0.9)
    torch.testing.assert_close(small, large)


def test_dtypes_may_differ_and_double_covariances_take_float_gradients(way):
    tensors = [torch.randn(1, 4, 6).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    expected = sum(0.5 * t.double() @ t.double().mT / t.double().square().sum() for t in tensors)
    for dtype in (torch.float32, torch.float64):
        covariance = torch.zeros(1, 4, 4, dtype=dtype)
        covariance_(covariance, tensors, 0.5)
        torch.testing.assert_close(covariance, expected.to(dtype))


def test_a_strided_covariance_is_updated_where_it_lies(way):
    G, stored = torch.randn(2, 5, 6), torch.zeros(5, 2, 5)
    expected = torch.zeros(2, 5, 5)
    covariance_(expected, G, 0.5)
    covariance_(stored.transpose(0, 1), G, 0.5)
    torch.testing.assert_close(stored.transpose(0, 1), expected)


def test_no_tensors_only_decay():
    covariance = torch.ones(1, 2, 2)
    covariance_(covariance, [], 0.5)
    assert torch.equal(covariance, torch.full((1, 2, 2), 0.5))


def test_an_update_is_seen_by_autograd(way):
    covariance = torch.ones(1, 3, 3)
    leaf = torch.ones(1, 3, 3, requires_grad=True)
    product = (leaf * covariance).sum()
    covariance_(covariance, torch.randn(1, 3, 4), 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("heads, h, n", [(1, 96, 7000), (5, 40, 700), (64, 8, 300)])
def test_bits_do_not_depend_on_the_number_of_threads(cpp_way, heads, h, n, layout):
    tensors = [layout(torch.randn(heads, h, columns)) for columns in (n, 5, n // 2)]
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(torch.ones(heads, h, h))
        covariance_(results[-1], tensors, 0.9)
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert torch.equal(results[0], results[0].mT)


def test_opcheck(way):
    tensors = [torch.randn(2, 3, 4), torch.randn(2, 3, 2, 2), torch.randn(2, 5, 3).mT, torch.randn(2, 3, 0)]
    torch.library.opcheck(torch.ops.teleport_fast.covariance_.default, (torch.ones(4, 3, 3), tensors, 0.9, 2))


def test_compiles_without_a_graph_break(way):
    def update(covariance: Tensor, G: Tensor) -> Tensor:
        covariance_(covariance, [G.sin()], 0.9)
        return covariance * 2

    G, eager, traced = torch.randn(2, 4, 3), torch.ones(2, 4, 4), torch.ones(2, 4, 4)
    expected = update(eager, G)
    result = torch.compile(update, fullgraph=True, backend="aot_eager")(traced, G)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(traced, eager)


@pytest.mark.parametrize(
    "covariance, tensors, joints, error, words",
    [
        (torch.ones(2, 3, 3), [torch.ones(2, 3, 4)] * 3, 2, ValueError, ["joints=2", "3"]),
        (torch.ones(2, 3, 3), [torch.ones(2, 3, 4), torch.ones(2, 5, 4)], 1, ValueError, ["(2, 3, 4)", "(2, 5, 4)"]),
        (torch.ones(1, 3, 3), [torch.ones(2, 3, 4)], 1, ValueError, ["(2, 3, 3)", "(1, 3, 3)"]),
        (torch.ones(2, 3, 3), [torch.ones(3, 4)], 1, ValueError, ["(heads, h, n)", "(3, 4)"]),
        (torch.ones(1, 2, 2), [torch.ones(1, 2, 3).int()], 1, TypeError, ["tensors[0]", "torch.int32"]),
        (torch.ones(1, 2, 2).half(), [torch.ones(1, 2, 3)], 1, TypeError, ["covariance", "torch.float16"]),
        (torch.ones(1, 2, 2), [torch.ones(1, 2, 3, device="meta")], 1, ValueError, ["cpu", "meta"]),
    ],
)
def test_bad_input_names_the_argument_and_both_shapes(covariance, tensors, joints, error, words):
    with pytest.raises(error) as caught:
        covariance_(covariance, tensors, 0.9, joints)
    assert all(word in str(caught.value) for word in ["covariance_", *words])


@pytest.mark.parametrize("normalise", ["joint", "none"])
def test_one_factor_for_a_joint_or_none(way, normalise):
    """Tensors of very different size, where the three ways differ; a joint without a usable gradient only decays."""
    small, large = torch.randn(2, 5, 7, dtype=torch.float64), 30 * torch.randn(2, 5, 3, 2, dtype=torch.float64)
    bad = torch.full_like(small, float("nan"))
    start = symmetric(4, 5, torch.float64)
    covariance = start.clone()
    covariance_(covariance, [small, large, bad, large], 0.75, 2, normalise)
    gram = sum(g.flatten(2) @ g.flatten(2).mT for g in (small, large))
    size = small.square().sum() + large.square().sum() if normalise == "joint" else 1.0
    torch.testing.assert_close(covariance[:2], 0.75 * start[:2] + 0.25 * gram / size)
    torch.testing.assert_close(covariance[2:], 0.75 * start[2:])
    other = start.clone()
    covariance_(other, [small, large, bad, large], 0.75, 2)
    assert not torch.allclose(other[:2], covariance[:2], rtol=1e-2)


def test_an_unknown_normalisation_is_refused():
    with pytest.raises(ValueError, match="normalise must be one of tensor, joint, none, got 'all'; 'tensor' is the default"):
        covariance_(torch.zeros(1, 2, 2), torch.ones(1, 2, 3), 0.5, normalise="all")
