from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from outcomes_of_models import make_units, share
from scipy.stats import binom, binomtest, norm
from sklearn.metrics import f1_score

from siftclip.errors import InputError
from siftclip.eval.metrics.outcomes import Outcomes
from siftclip.eval.significance.paired_tests import (
    PairedTest,
    bootstrap_p_value,
    compare_average,
    compare_task,
    holm,
    permutation_p_value,
    sign_flip_p_value,
    swapped_differences,
)
from siftclip.eval.significance.resampling import interval


def models(
    rng: np.random.Generator, n: int, better: float, both: float = 0.5
) -> tuple[Outcomes, Outcomes]:
    """A share `both` of the units that both have right or wrong; b is better on the rest."""
    common, easy = rng.random(n) < both, rng.random(n) < 0.6
    a, b = (np.where(common, easy, rng.random(n) < p) for p in (0.6, 0.6 + better))
    return share(a), share(b)


def test_equal_models_are_rejected_at_the_level() -> None:
    rng = np.random.default_rng(0)
    trials, n = 500, 200
    rejected = mcnemar = 0
    for trial in range(trials):
        a, b = models(rng, n, 0.0)
        units = make_units(n, trial * n)
        test = compare_task(a, b, units, units, resamples=300)
        assert test.p_value is not None
        assert test.mcnemar_p_value is not None
        rejected += test.p_value <= 0.05
        mcnemar += test.mcnemar_p_value <= 0.05
    low, high = binom.ppf([0.001, 0.999], trials, 0.05)
    assert low <= rejected <= high
    assert mcnemar <= high  # the exact test rejects less than the level


def test_a_real_difference_is_found() -> None:
    rng = np.random.default_rng(1)
    found = 0
    for trial in range(60):
        a, b = models(rng, 400, 0.2)
        units = make_units(400, trial * 400)
        test = compare_task(a, b, units, units, resamples=300)
        assert test.p_value is not None
        found += test.p_value <= 0.05 and test.difference > 0
    # the difference of 0.1 is 4.1 standard errors of sqrt((0.232 - 0.01) / 400)
    assert found >= 55


def test_pairing_narrows_the_interval() -> None:
    a, b = models(np.random.default_rng(2), 3000, 0.1, both=0.9)
    test = compare_task(a, b, make_units(3000), make_units(3000), resamples=4000)
    x, y = a.arrays["value"], b.arrays["value"]
    assert test.difference == pytest.approx(y.mean() - x.mean(), abs=1e-6)
    assert test.replicates.std() == pytest.approx((y - x).std() / np.sqrt(3000), rel=0.05)
    assert test.replicates.mean() == pytest.approx(test.difference, abs=1e-3)
    assert test.replicates.std() < 0.5 * np.hypot(x.std(), y.std()) / np.sqrt(3000)
    assert test.interval == interval(test.replicates, point=test.difference, lowest=-1)
    assert test.units == 3000


def test_mcnemar_against_arithmetic() -> None:
    a = np.r_[np.ones(9), np.zeros(3), np.ones(5), np.nan]
    b = np.r_[np.zeros(9), np.ones(3), np.ones(5), 1]
    test = compare_task(share(a), share(b), make_units(18), make_units(18), resamples=20)
    # 2 * (1 + 12 + 66 + 220) / 4096
    assert test.mcnemar_p_value == pytest.approx(598 / 4096)
    assert test.mcnemar_p_value == pytest.approx(binomtest(3, 12).pvalue)


def test_order_does_not_matter() -> None:
    rng = np.random.default_rng(3)
    a, b = models(rng, 100, 0.2)
    units, order = make_units(100), rng.permutation(100)
    turned = replace(b, arrays={"value": b.arrays["value"][order]})
    straight = compare_task(a, b, units, units, resamples=50, seed=4)
    mixed = compare_task(a, turned, units, units[order], resamples=50, seed=4)
    assert straight == mixed
    np.testing.assert_array_equal(straight.replicates, mixed.replicates)
    back = compare_task(b, a, units, units, resamples=50, seed=4)
    assert back.difference == -straight.difference
    assert back.p_value == straight.p_value


def test_the_same_model_twice() -> None:
    a, _ = models(np.random.default_rng(4), 50, 0.0)
    test = compare_task(a, a, make_units(50), make_units(50), resamples=50)
    assert (test.difference, test.interval, test.p_value) == (0.0, (0.0, 0.0), 1.0)
    assert test.mcnemar_p_value == 1.0


@pytest.mark.parametrize(
    "outcomes",
    [
        share(np.array([0.5, 1.0, 0.0])),
        Outcomes(
            statistic="worst_cell",
            arrays={"value": np.ones(3, np.float32), "cell": np.arange(3)},
        ),
    ],
)
def test_mcnemar_is_for_shares_of_right_units(outcomes: Outcomes) -> None:
    test = compare_task(outcomes, outcomes, make_units(3), make_units(3), resamples=20)
    assert test.mcnemar_p_value is None


def test_images_that_are_there_twice() -> None:
    units = np.array([5, 5, 6, 7], dtype=np.uint64)
    a, b = share(np.array([1, 0, 1, 0])), share(np.array([1, 1, 0, 0]))  # b: units 5, 6, 5, 7
    other = units[[0, 2, 1, 3]]
    test = compare_task(a, b, units, other, resamples=20)
    assert test.difference == 0
    assert test.mcnemar_p_value == 1.0  # 5 is right and then wrong in both, 6 in both


@pytest.mark.parametrize("rows_of_unit", [1, 5])
def test_rows_that_share_images_are_rejected_at_the_level(rows_of_unit: int) -> None:
    """Equally good models that are right or wrong on an image, whatever its rows ask."""
    rng = np.random.default_rng(11)
    trials, images = 400, 40
    rejected = exact = by_row = 0
    for trial in range(trials):
        units = np.repeat(make_units(images, trial * images), rows_of_unit)
        a, b = (share(np.repeat(rng.random(images) < 0.5, rows_of_unit)) for _ in range(2))
        flips = rng.random(len(units)) < 0.02  # a few rows of their own
        a.arrays["value"][flips] = 1 - a.arrays["value"][flips]
        order = rng.permutation(len(units))
        test = compare_task(
            a, replace(b, arrays={"value": b.arrays["value"][order]}), units, units[order],
            resamples=199,
        )  # fmt: skip
        assert test.p_value is not None
        assert test.mcnemar_p_value is not None
        assert test.units == images
        rejected += test.p_value <= 0.05
        exact += test.mcnemar_p_value <= 0.05
        lost = a.arrays["value"] > b.arrays["value"]
        gained = a.arrays["value"] < b.arrays["value"]
        p_of_rows = binomtest(int(lost.sum()), max(int((lost | gained).sum()), 1)).pvalue
        by_row += p_of_rows <= 0.05
        if rows_of_unit == 1:
            assert test.mcnemar_p_value == p_of_rows
    low, high = binom.ppf([0.001, 0.999], trials, 0.05)
    assert rejected <= exact <= high
    assert exact >= low / 2  # exact tests of few units reject less, but they do reject
    assert (by_row > 3 * high) == (rows_of_unit == 5)  # what rows as units would do


def test_shared_images_that_few_models_differ_on_are_permuted() -> None:
    """Hundreds of rows differ, but they are of few images: the bootstrap alone finds too much."""
    units = np.repeat(make_units(60), 10)
    a, b = (np.zeros((60, 10), dtype=bool) for _ in range(2))
    a[::4], b[:6] = True, True
    cells = np.tile(np.arange(2), 300)
    first, second = (
        Outcomes(
            statistic="class_mean",
            arrays={"value": one.reshape(-1).astype(np.float32), "cell": cells},
        )
        for one in (a, b)
    )
    drawn = swapped_differences(first, second, units, resamples=999, seed=0)
    assert drawn is not None  # 170 rows differ, of 17 images
    steps = drawn * 60
    np.testing.assert_allclose(steps, steps.round(), atol=1e-6)  # whole images change sides
    assert set(np.unique(steps.round() % 2)) == {1.0}


@given(st.lists(st.integers(-4, 4), max_size=9))
def test_sign_flips_against_all_of_them(differences: list[int]) -> None:
    flipped = [sum(signs) for signs in product(*({d, -d} if d else {0} for d in differences))]
    as_far = [abs(one) >= abs(sum(differences)) for one in flipped]
    assert sign_flip_p_value(np.array(differences, dtype=np.int64)) == pytest.approx(
        np.mean(as_far)
    )


def test_sign_flips_of_many_units_are_fast_and_sure() -> None:
    rng = np.random.default_rng(12)
    differences = rng.integers(-5, 6, 50_000)
    p_value = sign_flip_p_value(differences)
    spread = np.sqrt((differences**2).sum())
    assert p_value == pytest.approx(2 * norm.sf(abs(differences.sum()) / spread), rel=0.02)
    assert 0 <= sign_flip_p_value(np.abs(differences)) < 1e-10


def test_other_units_are_an_error_that_counts() -> None:
    a, b = share(np.ones(4)), share(np.ones(5))
    # 9 is in a only, one of two 1 and 7, 8 in b only
    units_a = np.array([1, 2, 3, 9], dtype=np.uint64)
    units_b = np.array([1, 1, 3, 7, 2], dtype=np.uint64)
    with pytest.raises(InputError, match=r"same units\. 3 of 4 \+ 5 are in one result only"):
        compare_task(a, b, units_a, units_b)


def test_other_statistics_are_an_error() -> None:
    a = share(np.ones(2))
    b = Outcomes(statistic="class_mean", arrays={"value": np.ones(2), "cell": np.zeros(2)})
    with pytest.raises(InputError, match="mean and class_mean"):
        compare_task(a, b, make_units(2), make_units(2))


def test_nothing_is_defined() -> None:
    nothing = share(np.full(3, np.nan))
    test = compare_task(nothing, nothing, make_units(3), make_units(3), resamples=20)
    assert np.isnan(test.difference)
    assert (test.interval, test.p_value) == (None, None)


def test_p_value_against_arithmetic() -> None:
    assert bootstrap_p_value(np.array([1.0] * 99)) == 2 * 1 / 100
    assert bootstrap_p_value(np.array([1.0] * 95 + [-1.0] * 4)) == 2 * 5 / 100
    assert bootstrap_p_value(np.array([-1.0] * 95 + [0.0] * 4)) == 2 * 5 / 100
    assert bootstrap_p_value(np.zeros(99)) == 1.0
    assert bootstrap_p_value(np.array([1.0] * 9 + [np.nan] * 9)) == 2 * 1 / 10
    assert bootstrap_p_value(np.array([1.0] * 9 + [np.nan] * 10)) is None


def few_differ(statistic: str, value: np.ndarray) -> Outcomes:
    """Cells of 10 units; as f1_macro, two labels, and right where the value is 1."""
    numbers = np.arange(len(value))
    arrays = {"value": value.astype(np.float32), "cell": numbers // 10}
    if statistic == "f1_macro":
        label = numbers % 2
        arrays = {"predicted": np.where(value == 1, label, 1 - label), "label": label}
    return Outcomes(statistic=statistic, arrays=arrays)  # type: ignore[arg-type]


@pytest.mark.parametrize("statistic", ["mean", "class_mean", "f1_macro"])
def test_five_units_are_not_enough(statistic: str) -> None:
    value = np.arange(300) % 3 == 0
    better = value.copy()
    better[[1, 31, 92, 172, 262]] = True
    a, b = few_differ(statistic, value), few_differ(statistic, better)
    test = compare_task(a, b, make_units(300), make_units(300), resamples=4000)
    assert (bootstrap_p_value(test.replicates) or 1) < 0.03
    # all five swaps the one way or the other: 2 / 2^5
    assert test.p_value == pytest.approx(0.0625, abs=0 if statistic == "mean" else 0.015)
    average = compare_average({"one": test, "same": test}, ["one", "same"])
    assert average is not None
    assert average.p_value == pytest.approx(0.0625, abs=0.015)


@pytest.mark.parametrize("statistic", ["class_mean", "worst_cell"])
def test_few_differing_units_are_rejected_at_the_level(statistic: str) -> None:
    rng = np.random.default_rng(9)
    bootstrap = rejected = 0
    trials = 60
    for trial in range(trials):
        a = (rng.random(120) < 0.5).astype(float)
        b, differing = a.copy(), rng.permutation(120)[:8]
        b[differing] = rng.random(8) < 0.5
        a[differing] = 1 - b[differing]
        units = make_units(120, trial * 120)
        test = compare_task(
            few_differ(statistic, a), few_differ(statistic, b), units, units, resamples=300
        )
        bootstrap += (bootstrap_p_value(test.replicates) or 1) <= 0.05
        rejected += (test.p_value or 0) <= 0.05
    assert rejected <= binom.ppf(0.999, trials, 0.05)
    assert rejected <= bootstrap


def test_swaps_against_all_of_them() -> None:
    rng = np.random.default_rng(10)
    label = rng.integers(0, 3, 40)
    first = np.where(rng.random(40) < 0.6, label, rng.integers(0, 3, 40))
    second = first.copy()
    second[:5] = (first[:5] + rng.integers(1, 3, 5)) % 3
    a, b = (
        Outcomes(statistic="f1_macro", arrays={"predicted": one, "label": label})
        for one in (first, second)
    )
    every = []
    for number in range(2**5):
        swap = np.zeros(40, dtype=bool)
        swap[:5] = number >> np.arange(5) & 1
        turned = (np.where(swap, second, first), np.where(swap, first, second))
        scores = [f1_score(label, one, average="macro", labels=[0, 1, 2]) for one in turned]
        every.append(scores[1] - scores[0])
    drawn = swapped_differences(a, b, make_units(40), resamples=3000, seed=0)
    assert drawn is not None
    assert drawn.shape == (3000,)
    nearest = np.abs(drawn[:, None] - np.array(every)).argmin(axis=1)
    np.testing.assert_allclose(drawn, np.array(every)[nearest], atol=1e-9)
    exact = np.mean(np.abs(every) >= abs(every[0]) - 1e-12)
    assert permutation_p_value(every[0], drawn) == pytest.approx(exact, abs=0.04)
    first_rows = swapped_differences(a, b, make_units(40), resamples=10, seed=0)
    np.testing.assert_array_equal(first_rows, drawn[:10])


def test_no_swaps_where_many_units_differ() -> None:
    none, some, more = (share(np.arange(200) < few) for few in (0, 99, 100))
    opposite = share(np.arange(200) >= 99)
    units = make_units(200)
    assert swapped_differences(none, some, units, resamples=5, seed=0) is not None
    assert swapped_differences(none, more, units, resamples=5, seed=0) is None
    few = compare_task(none, some, units, units, resamples=50)
    many = compare_task(some, opposite, units, units, resamples=50)
    average = compare_average({"few": few, "many": many}, ["few", "many"])
    assert average is not None
    assert average.swapped is None
    assert average.p_value == bootstrap_p_value(average.replicates)


def test_permutation_p_value_against_arithmetic() -> None:
    drawn = np.array([-0.3, 0.1, 0.2, 0.3 + 1e-15, 0.0, np.nan])
    assert permutation_p_value(-0.3, drawn) == 3 / 6
    assert permutation_p_value(0.4, drawn) == 1 / 6
    assert (
        permutation_p_value(0.3, np.array([0.3 - 1e-15])) == 1
    )  # the same, summed in another order
    assert permutation_p_value(0.0, drawn) == 1
    assert permutation_p_value(np.nan, drawn) is None
    assert permutation_p_value(0.1, np.array([0.1, np.nan, np.nan])) is None


def test_average_of_tasks_with_the_same_images() -> None:
    rng = np.random.default_rng(5)
    a, b = models(rng, 300, 0.1)
    units = make_units(300)
    one = compare_task(a, b, units, units, resamples=2000)
    apart = compare_task(a, b, units + np.uint64(999), units + np.uint64(999), resamples=2000)
    tests = {"one": one, "same": one, "apart": apart}
    same = compare_average(tests, ["one", "same"])
    assert same is not None
    assert same.difference == one.difference
    assert same.interval == one.interval
    assert same.units == 600
    assert same.mcnemar_p_value is None
    both = compare_average(tests, ["one", "apart"])
    assert both is not None
    assert both.replicates.var() == pytest.approx(one.replicates.var() / 2, rel=0.15)
    assert one.swapped is not None
    assert apart.swapped is not None
    assert both.p_value == max(
        bootstrap_p_value((one.replicates + apart.replicates) / 2) or 0,
        permutation_p_value(both.difference, (one.swapped + apart.swapped) / 2) or 0,
    )
    assert compare_average(tests, ["one", "missing"]) is None
    assert compare_average(tests, []) is None


def test_average_with_a_task_that_is_not_defined() -> None:
    def task(values: list[float]) -> PairedTest:
        return PairedTest(
            difference=values[0], interval=None, p_value=None, units=1, replicates=np.array(values)
        )

    test = compare_average({"a": task([np.nan] * 2), "b": task([1.0] * 2)}, ["a", "b"])
    assert test is not None
    assert np.isnan(test.difference)
    assert (test.interval, test.p_value) == (None, None)


def test_holm_against_arithmetic() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == pytest.approx([1, 1])
    assert holm([]).tolist() == []


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.001, 0.5))
def test_holm_rejects_as_the_steps_do(p_values: list[float], level: float) -> None:
    rejected, left = set(), sorted(range(len(p_values)), key=lambda i: p_values[i])
    while left and len(left) * p_values[left[0]] <= level:
        rejected.add(left.pop(0))
    found = set(np.flatnonzero(holm(p_values) <= level).tolist())
    assert {p_values[i] for i in found} == {p_values[i] for i in rejected}
