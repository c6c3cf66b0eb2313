"""Dunnett's test against scipy's, which integrates by quasi-Monte Carlo, and against t and z."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
from scipy import stats

from siftclip.eval.significance.arm_model import ArmValues, fit_arms
from siftclip.eval.significance.arm_tests import compare_with_baseline
from siftclip.eval.significance.dunnett import Dunnett, detectable_shift


@pytest.mark.parametrize("sizes", [(3, 3, 3), (2, 2, 2, 2, 2), (5, 2, 3, 4)])
def test_as_scipy(sizes: tuple[int, ...]) -> None:
    generator = np.random.default_rng(sum(sizes))
    control, *others = [generator.normal(0.1 * i, 1, size) for i, size in enumerate(sizes)]
    expected = stats.dunnett(*others, control=control, rng=np.random.default_rng(0))
    model = fit_arms([ArmValues(values=values) for values in (control, *others)])
    found = compare_with_baseline(model, 0).differences
    p_values = [difference.p_value for difference in found]
    assert p_values == pytest.approx(expected.pvalue.tolist(), abs=5e-4)
    ends = expected.confidence_interval(0.95)
    intervals = [difference.interval or (np.nan, np.nan) for difference in found]
    assert [low for low, _ in intervals] == pytest.approx(ends.low.tolist(), abs=5e-3)
    assert [high for _, high in intervals] == pytest.approx(ends.high.tolist(), abs=5e-3)


@pytest.mark.parametrize("freedom", [1, 2, 4, 30, np.inf])
def test_one_arm_is_a_t_test(freedom: float) -> None:
    dunnett = Dunnett([sqrt(0.5)], freedom)
    for statistic in (0.0, 0.7, 2.2, 6.0):
        assert dunnett.p_value(-statistic) == pytest.approx(
            2 * stats.t.sf(statistic, freedom), abs=1e-5
        )
    assert dunnett.critical(0.05) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-4)
    assert dunnett.critical(0.05, two_sided=False) == pytest.approx(
        stats.t.ppf(0.95, freedom), rel=1e-4
    )


def test_detectable_shift_is_that_of_the_noncentral_t() -> None:
    shift = detectable_shift(3.1, 12, 0.8)
    power = stats.nct.sf(3.1, 12, shift) + stats.nct.cdf(-3.1, 12, shift)
    assert power == pytest.approx(0.8, abs=1e-5)
