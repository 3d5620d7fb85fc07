"""The statistics against scipy's own, and what happens where they have nothing to say."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from bench.convergence.paired import holm, paired

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("n", [2, 5, 8])
def test_the_paired_test_is_scipys(n: int) -> None:
    arm, reference = (1 + torch.rand(2, n, dtype=torch.float64)).tolist()
    found, expected = paired(arm, reference), stats.ttest_rel(arm, reference)
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    unpaired = stats.ttest_ind(arm, reference).pvalue
    assert found.p != pytest.approx(unpaired, rel=1e-3)


def test_a_ratio_is_a_difference_of_logarithms() -> None:
    arm, reference = [1.0, 2.2, 3.9], [2.0, 4.0, 8.0]
    found = paired(arm, reference, "ratio")
    logs = paired([math.log(a) for a in arm], [math.log(b) for b in reference])
    assert (found.mean, found.low, found.high) == pytest.approx((math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high)))
    assert found.p == pytest.approx(logs.p) and found.mean < 1 and found.below(0.05)


def test_two_equal_arms_are_level() -> None:
    assert paired([1.0, 2.0], [1.0, 2.0]).p == 1.0
    assert paired([1.0, 2.0], [1.0, 2.0], "ratio").mean == 1.0
    assert not paired([1.0, 2.0], [1.0, 2.0]).below()


def test_divergence_leaves_no_p() -> None:
    found = paired([1.0, math.inf], [1.0, 2.0])
    assert found.mean == math.inf and math.isnan(found.p) and not found.below()
    assert paired([1.0, 2.0], [1.0, math.inf]).mean == -math.inf


@pytest.mark.parametrize(("arm", "reference", "by", "message"), [
    ([1.0], [1.0, 2.0], "ratio", "the same seeds, got 1 and 2 losses"),
    ([], [], "ratio", "the same seeds, got 0 and 0 losses"),
    ([1.0], [1.0], "quotient", "by must be difference or ratio, got 'quotient'"),
])
def test_bad_input_is_refused(arm: list[float], reference: list[float], by: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired(arm, reference, by)


def test_holms_correction_is_monotone_and_at_most_bonferronis() -> None:
    ps = torch.rand(7, dtype=torch.float64).square().tolist()
    corrected = holm(ps)
    order = sorted(range(7), key=ps.__getitem__)
    assert all(corrected[a] <= corrected[b] for a, b in itertools.pairwise(order))
    assert all(p <= c <= min(1.0, 7 * p) + 1e-15 for p, c in zip(ps, corrected, strict=True))
    assert holm([0.02, math.nan])[0] == 0.04 and math.isnan(holm([0.02, math.nan])[1])
