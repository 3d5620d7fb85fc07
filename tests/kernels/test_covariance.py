"""The Triton covariance_ against the float64 update, gradients that must not enter, and the bytes it moves."""

from __future__ import annotations

import pytest
import torch

from teleport_fast.kernels.covariance import covariance_
from teleport_fast.ops.covariance import covariance_ as reference

# The interpreter's numpy warns about the infinities and NaN that some gradients here are made of.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def running(count, h, dtype, device):
    root = torch.randn(count, h, h, dtype=dtype, device=device)
    return root @ root.mT / h


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "h", "n"), [(2, 1, 8), (1, 7, 65), (2, 64, 63), (1, 65, 40), (1, 129, 7)])
def test_adds_each_views_covariance_by_its_own_norm(heads, h, n, dtype, all_kinds, assert_twice_as_close):
    tensors = [p.view for p in all_kinds(heads, h, n, dtype)]
    start = running(2 * heads, h, torch.float64 if dtype == torch.float64 else torch.float32, tensors[0].device)
    found, plain, exact = start.clone(), start.clone(), start.double()
    covariance_(found, tensors, 0.9, joints=2)
    reference(plain, tensors, 0.9, joints=2)
    reference(exact, [t.double() for t in tensors], 0.9, joints=2)
    assert_twice_as_close(found, plain, exact)


def test_a_float64_covariance_of_narrower_gradients(placed):
    tensors = [placed("rows", 1, 16, 40, torch.float16).view, placed("columns", 1, 16, 33, torch.float16).view]
    found, exact = (torch.zeros(1, 16, 16, dtype=torch.float64, device=tensors[0].device) for _ in range(2))
    covariance_(found, tensors, 0.5)
    reference(exact, tensors, 0.5)
    assert torch.allclose(found, exact, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("h", [8, 129])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_gradient_that_is_zero_or_not_finite_adds_nothing(value, h, placed):
    good, bad = placed("rows", 1, h, 40, torch.float32).view, placed("rows", 1, h, 40, torch.float32).view
    bad.fill_(value)
    start = running(1, h, torch.float32, good.device)
    with_bad, without = start.clone(), start.clone()
    covariance_(with_bad, [good, bad], 0.9)
    covariance_(without, [good], 0.9)
    assert torch.equal(with_bad, without)
    assert not torch.equal(without, start * 0.9)


def test_decays_by_beta_and_adds_a_unit_trace_by_the_rest(placed):
    view = placed("columns", 2, 16, 128, torch.float32).view
    C = torch.zeros(2, 16, 16, device=view.device)
    covariance_(C, [view * 100], 0.75)
    assert C.diagonal(dim1=1, dim2=2).sum().item() == pytest.approx(0.25, rel=1e-5)


def test_only_the_covariances_own_entries_are_written(placed):
    view = placed("rows", 1, 16, 64, torch.float32).view
    wide = torch.full((1, 20, 20), float("nan"), device=view.device)
    C = wide[:, 2:18, 2:18].fill_(0.0)
    covariance_(C, [view], 0.9)
    assert C.isfinite().all()
    assert wide.isnan().sum() == 20 * 20 - 16 * 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "h", "n"), [(4, 16, 1024), (1, 64, 4096)])
def test_reads_gradients_once_in_whole_sectors(heads, h, n, dtype, placed, traffic):
    tensors = [placed("rows", heads, h, n, dtype).view, placed("columns", heads, h, n, dtype).view]
    C = torch.zeros(heads, h, h)
    with traffic() as seen:
        covariance_(C, tensors, 0.9)
    assert seen.bytes <= 1.15 * (2 * tensors[0].numel() * tensors[0].element_size() + 2 * 4 * C.numel())
    assert seen.sector_ratio <= 1.1
