from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from outcomes_of_models import make_units, share
from scipy.stats import binom, binomtest, chisquare, poisson

from siftclip.eval.metrics.outcomes import Outcomes
from siftclip.eval.metrics.weighted_metrics import STATISTICS
from siftclip.eval.significance import resampling
from siftclip.eval.significance.resampling import (
    average_interval,
    interval,
    point_value,
    poisson_weights,
    replicates,
    task_interval,
    wilson_interval,
)


def test_table_has_mean_and_variance_one() -> None:
    tails = np.array(resampling._AT_LEAST) / 2**16
    mean = tails.sum()
    variance = (tails * (2 * np.arange(1, 9) - 1)).sum() - mean**2
    assert mean == 1.0
    assert variance == pytest.approx(1.0, abs=1e-4)
    np.testing.assert_allclose(tails, poisson.sf(np.arange(8), 1), atol=2**-17)


def test_multiplicities_are_poisson_and_independent() -> None:
    weights = poisson_weights(make_units(3000), 200, seed=5).astype(np.float64)
    assert weights.shape == (200, 3000)
    counts = np.bincount(weights.astype(int).ravel(), minlength=9)
    tails = np.r_[2**16, resampling._AT_LEAST, 0]
    merged = np.r_[counts[:6], counts[6:].sum()]
    expected = np.diff(-tails) / 2**16 * weights.size
    assert chisquare(merged, np.r_[expected[:6], expected[6:].sum()]).pvalue > 1e-3
    for rows in (weights, weights.T):  # neither neighbouring resamples nor units go together
        correlations = np.corrcoef(rows[:100])[np.triu_indices(100, 1)]
        n = rows.shape[1]
        assert abs(correlations.mean()) < 5 / np.sqrt(n * 4950)
        assert correlations.var() * n == pytest.approx(1, abs=0.12)


def test_a_multiplicity_depends_on_seed_unit_and_resample_alone() -> None:
    units = np.random.default_rng(0).integers(0, 2**63, 300).astype(np.uint64)
    weights = poisson_weights(units, 11, seed=1)
    assert weights.dtype == np.uint8
    np.testing.assert_array_equal(poisson_weights(units[::-1][:7], 11, seed=1), weights[:, :-8:-1])
    np.testing.assert_array_equal(poisson_weights(units, 6, seed=1), weights[:6])
    assert (poisson_weights(units, 11, seed=2) != weights).mean() > 0.5
    assert poisson_weights(units[:1], 5, seed=1).shape == (5, 1)


GOLDEN = [
    [0, 4, 2, 0, 1, 2, 0, 1],
    [1, 2, 1, 1, 0, 1, 1, 0],
    [0, 0, 1, 0, 3, 1, 2, 1],
    [0, 1, 1, 2, 0, 1, 1, 2],
    [4, 0, 0, 0, 0, 3, 0, 1],
    [2, 1, 1, 1, 1, 0, 2, 0],
]


def test_numbers_stay_the_same() -> None:
    # kept results are compared with later ones: another stream would break that silently
    assert poisson_weights(make_units(8), 6, seed=0).tolist() == GOLDEN


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    hits = np.random.default_rng(1).random(200) < 0.7
    whole = replicates(share(hits), make_units(200), resamples=23, seed=0)
    direct = STATISTICS["mean"](share(hits).arrays, poisson_weights(make_units(200), 23, seed=0))
    monkeypatch.setattr(resampling, "_BLOCK", 1000)  # 8 resamples a block
    np.testing.assert_array_equal(
        replicates(share(hits), make_units(200), resamples=23, seed=0), whole
    )
    np.testing.assert_array_equal(direct, whole)


def test_order_of_the_units_does_not_matter() -> None:
    rng = np.random.default_rng(2)
    units, order = make_units(150), rng.permutation(150)
    arrays = {"value": (rng.random(150) < 0.5).astype(np.float32), "cell": rng.integers(0, 4, 150)}
    outcomes = Outcomes(statistic="class_mean", arrays=arrays)
    turned = replace(outcomes, arrays={name: array[order] for name, array in arrays.items()})
    np.testing.assert_allclose(
        replicates(outcomes, units, resamples=40, seed=3),
        replicates(turned, units[order], resamples=40, seed=3),
        rtol=1e-13,
    )


@pytest.mark.parametrize("statistic", ["mean", "class_mean", "worst_cell", "f1_macro"])
def test_agrees_with_the_multinomial_bootstrap(statistic: str) -> None:
    rng = np.random.default_rng(4)
    n, resamples = 500, 3000
    label = rng.integers(0, 4, n).astype(np.int32)
    predicted = np.where(rng.random(n) < 0.4 + 0.1 * label, label, rng.integers(0, 4, n))
    arrays = {
        "value": (predicted == label).astype(np.float32),
        "cell": label,
        "label": label,
        "predicted": predicted,
    }
    outcomes = Outcomes(statistic=statistic, arrays=arrays)  # type: ignore[arg-type]
    drawn = replicates(outcomes, make_units(n), resamples=resamples, seed=0)
    counts = rng.multinomial(n, np.full(n, 1 / n), resamples).astype(np.uint8)
    classical = STATISTICS[outcomes.statistic](arrays, counts)
    # the ratio of two standard errors from 3,000 draws is itself sure to 1.8 %
    assert drawn.std() / classical.std() == pytest.approx(1, abs=0.06)
    raw = STATISTICS[outcomes.statistic](arrays, poisson_weights(make_units(n), resamples, seed=0))
    assert raw.mean() == pytest.approx(classical.mean(), abs=5 * drawn.std() / np.sqrt(1500))


def test_interval_covers_the_true_share() -> None:
    rng = np.random.default_rng(6)
    sets, n = 400, 150
    covered = 0
    for number in range(sets):
        outcomes, units = share(rng.random(n) < 0.7), make_units(n, number * n)
        drawn = replicates(outcomes, units, resamples=400, seed=0)
        found = task_interval(outcomes, units, drawn)
        assert found is not None
        covered += found[0] <= 0.7 <= found[1]
    assert 0.92 <= covered / sets <= 0.98


def test_interval_has_the_width_of_the_normal_approximation() -> None:
    hits = np.arange(4000) % 4 == 0
    found = interval(replicates(share(hits), make_units(4000), resamples=4000, seed=1))
    assert found is not None
    assert found[1] - found[0] == pytest.approx(2 * 1.96 * np.sqrt(0.1875 / 4000), rel=0.05)
    assert sum(found) / 2 == pytest.approx(0.25, abs=0.001)


def test_level() -> None:
    drawn = np.linspace(0, 1, 101)
    assert interval(drawn, 0.9) == pytest.approx((0.05, 0.95))
    assert interval(np.r_[drawn, np.full(101, np.nan)]) == pytest.approx((0.025, 0.975))


def test_interval_holds_the_point_and_ends_where_values_do() -> None:
    drawn = np.linspace(-0.2, 1.3, 101)
    assert interval(drawn, 0.99) == (0, 1)
    assert interval(drawn, 0.99, lowest=-1) == pytest.approx((-0.1925, 1))
    assert interval(drawn / 2, 0.5, point=0.05) == pytest.approx((0.05, 0.4625))
    assert interval(drawn / 2, 0.5, point=0.9) == pytest.approx((0.0875, 0.9))
    skewed = np.r_[np.zeros(99), 1.0]
    assert interval(skewed) == (0, 0.01)  # the mean of the replicates where no point is given


@pytest.mark.parametrize("values", [[np.nan] * 3, [1.0, np.nan, np.nan], []])
def test_no_interval_with_few_replicates(values: list[float]) -> None:
    assert interval(np.array(values)) is None


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_wilson_against_scipy(level: float) -> None:
    for hits, samples in [(0, 1), (1, 1), (0, 50), (17, 50), (50, 50), (499, 5000)]:
        expected = binomtest(hits, samples).proportion_ci(level, method="wilson")
        found = wilson_interval(hits / samples, samples, level)
        assert found == pytest.approx(tuple(expected), abs=1e-12)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_share_of_none_or_all_has_wilsons_interval(value: float) -> None:
    outcomes = share(np.array([value, value, np.nan, value]))
    units = np.array([7, 8, 9, 8], dtype=np.uint64)  # two images in three rows
    drawn = replicates(outcomes, units, resamples=50, seed=0)
    assert task_interval(outcomes, units, drawn) == wilson_interval(value, 2)
    assert task_interval(outcomes, units, drawn, level=0.5) == wilson_interval(value, 2, 0.5)


def test_other_metrics_without_spread_have_no_width() -> None:
    arrays = {"value": np.ones(30, np.float32), "cell": np.arange(30) % 2}
    units = make_units(30)
    for outcomes in (
        Outcomes(statistic="class_mean", arrays=arrays),
        share(np.full(30, 0.5)),
    ):
        drawn = replicates(outcomes, units, resamples=50, seed=0)
        point = point_value(outcomes)
        assert task_interval(outcomes, units, drawn) == (point, point)


def test_one_unit_that_is_half_right() -> None:
    outcomes, units = share(np.array([0.5])), make_units(1)
    drawn = replicates(outcomes, units, resamples=2000, seed=0)
    # without the unit a resample is empty, which happens with probability 1 / e
    assert binom.sf(int(np.isnan(drawn).sum()), 2000, np.exp(-1)) > 1e-3
    assert binom.cdf(int(np.isnan(drawn).sum()), 2000, np.exp(-1)) > 1e-3
    assert task_interval(outcomes, units, drawn) == (0.5, 0.5)


def test_a_cell_of_one_unit_is_left_out_where_it_is_not_drawn() -> None:
    arrays = {"value": np.r_[0, np.ones(50)].astype(np.float32), "cell": np.r_[0, np.ones(50, int)]}
    outcomes, units = Outcomes(statistic="worst_cell", arrays=arrays), make_units(51)
    drawn = replicates(outcomes, units, resamples=300, seed=0)
    gone = poisson_weights(units, 300, seed=0)[:, 0] == 0
    np.testing.assert_allclose(drawn, gone - gone.mean(), atol=1e-12)
    assert point_value(outcomes) == 0
    assert task_interval(outcomes, units, drawn) == wilson_interval(0, 1)


@pytest.mark.parametrize(("value", "samples"), [(0.0, 4), (1.0, 2)])
def test_worst_cell_of_none_or_all_has_wilsons_interval(value: float, samples: int) -> None:
    # cells of 2, 4 and 5 rows of 2, 4 and 4 distinct units; 0 is not the value of all of them
    cell = np.repeat([-1, 0, 1, 2, 3], [3, 2, 4, 5, 9]).astype(np.int32)
    units = make_units(len(cell))
    units[9:11] = 9
    values = np.where(cell == 3, 1.0, value).astype(np.float32)
    values[[0, 13]] = 1 - value, np.nan  # in no cell, and left out
    outcomes = Outcomes(statistic="worst_cell", arrays={"value": values, "cell": cell})
    units[12] = units[11] if value == 0 else units[12]
    drawn = replicates(outcomes, units, resamples=50, seed=0)
    assert point_value(outcomes) == value
    assert task_interval(outcomes, units, drawn) == wilson_interval(value, samples)


def f1_of_rare_classes(rng: np.random.Generator) -> Outcomes:
    shares = 1 / np.arange(1, 61) ** 1.8
    label = rng.choice(60, 1500, p=shares / shares.sum())
    predicted = np.where(rng.random(1500) < 0.6 - 0.005 * label, label, rng.integers(0, 60, 1500))
    arrays = {"predicted": predicted.astype(np.int32), "label": label.astype(np.int32)}
    return Outcomes(statistic="f1_macro", arrays=arrays)


def worst_of_cells(rng: np.random.Generator, shares: list[float], size: int) -> Outcomes:
    cell = np.repeat(np.arange(len(shares)), size).astype(np.int32)
    value = (rng.random(len(cell)) < np.repeat(shares, size)).astype(np.float32)
    return Outcomes(statistic="worst_cell", arrays={"value": value, "cell": cell})


@pytest.mark.parametrize(
    "draw",
    [
        f1_of_rare_classes,
        lambda rng: worst_of_cells(rng, [0.6] * 30, 40),  # tied
        lambda rng: worst_of_cells(rng, [0.4, 0.6, 0.7], 300),  # a clear minimum
    ],
)
def test_interval_covers_the_expected_metric(
    draw: Callable[[np.random.Generator], Outcomes],
) -> None:
    rng = np.random.default_rng(8)
    expected = np.mean([point_value(draw(rng)) for _ in range(150)])
    covered, sets = 0, 60
    for number in range(sets):
        outcomes = draw(rng)
        units = make_units(outcomes.units, number * outcomes.units)
        drawn = replicates(outcomes, units, resamples=100, seed=0)
        point = point_value(outcomes)
        assert drawn.mean() == pytest.approx(point)
        found = task_interval(outcomes, units, drawn)
        assert found is not None
        assert found[0] <= point <= found[1]
        covered += found[0] <= expected <= found[1]
    assert covered >= 0.87 * sets  # without centring 0.5 of the first two


def test_means_are_left_as_they_are() -> None:
    hits = np.arange(30) % 4 == 0
    raw = STATISTICS["mean"](share(hits).arrays, poisson_weights(make_units(30), 60, seed=0))
    drawn = replicates(share(hits), make_units(30), resamples=60, seed=0)
    np.testing.assert_array_equal(drawn, raw)


def test_average_is_of_rows() -> None:
    tasks = {"a": np.array([0.0, 1.0, np.nan]), "b": np.array([1.0, 0.0, 1.0]), "c": np.zeros(3)}
    assert average_interval(tasks, ["a", "b"]) == (0.5, 0.5)
    assert average_interval(tasks, ["b", "c"], level=0.5) == interval(tasks["b"] / 2, 0.5)
    assert average_interval(tasks, []) is None
    assert average_interval(tasks, ["a", "missing"]) is None


def test_tasks_of_the_same_images_vary_together() -> None:
    hits = np.arange(400) % 3 == 0
    first, second, other = (
        replicates(share(hits), units, resamples=4000, seed=0)
        for units in (make_units(400), make_units(400), make_units(400, start=1000))
    )
    opposite = replicates(share(~hits), make_units(400), resamples=4000, seed=0)
    alone = first.var()
    assert ((first + second) / 2).var() == pytest.approx(alone)
    assert ((first + other) / 2).var() == pytest.approx(alone / 2, rel=0.1)
    assert ((first + opposite) / 2).var() == pytest.approx(0, abs=1e-20)
