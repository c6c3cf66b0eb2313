"""Comparisons of arms, simulated: equal arms are told apart as seldom as is said, others as often.

The outcomes of an image come from a latent normal variable with effects of image, of seed, of arm
and image, and their rest: the model of `arm_model` is an approximation here, as it is for users.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
from scipy.stats import binom, f_oneway

from siftclip.eval.significance.arm_model import ArmModel, ArmValues, fit_arms
from siftclip.eval.significance.arm_tests import (
    LEVEL,
    chance_of_best,
    compare_with_baseline,
    holm_of_arms,
    seeds_needed,
    single_p_value,
)

COMPARISONS = 1000
RESAMPLES = 100


def simulated(
    generator: np.random.Generator,
    weights: np.ndarray,
    *,
    seeds: int,
    seed_sd: float = 0.1,
    arm_image_sd: float = 0.0,
    shifts: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0),
) -> list[ArmValues]:
    """Draw the values and replicates of arms; `weights` are float64 [R, n]."""
    arms, images = len(shifts), weights.shape[1]
    latent = generator.normal(size=images)
    latent = latent + arm_image_sd * generator.normal(size=(arms, 1, images))
    latent = latent + seed_sd * generator.normal(size=(arms, seeds, 1))
    latent = latent + generator.normal(size=(arms, seeds, images))
    right = (latent + np.asarray(shifts)[:, None, None] > 0).astype(np.float64)
    replicates = right @ weights.T / weights.sum(axis=1)
    return [
        ArmValues(values=right[arm].mean(axis=1), replicates=replicates[arm]) for arm in range(arms)
    ]


def mean_of(tasks: list[list[ArmValues]]) -> list[ArmValues]:
    """Average tasks as `average_interval` does: row by row of the replicates."""
    return [
        ArmValues(
            values=np.mean([arm.values for arm in of_arm], axis=0),
            replicates=np.mean([arm.replicates for arm in of_arm], axis=0),
        )
        for of_arm in zip(*tasks, strict=True)
    ]


def near(count: int, share: float) -> bool:
    """Return whether a count of 1,000 is within what 99.9 % of such experiments give."""
    return bool(
        binom.ppf(0.0005, COMPARISONS, share) <= count <= binom.ppf(0.9995, COMPARISONS, share)
    )


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, pytest.param(3, marks=pytest.mark.nightly), 5])
def test_equal_arms_are_told_apart_at_the_nominal_rate(seeds: int) -> None:
    generator = np.random.default_rng(seeds)
    weights = generator.poisson(1.0, (RESAMPLES, 120)).astype(np.float64)
    average = tasks = named_best = 0
    for _ in range(COMPARISONS):
        of_tasks = [simulated(generator, weights, seeds=seeds) for _ in range(3)]
        model = fit_arms(mean_of(of_tasks), 360)
        found = compare_with_baseline(model, 0)
        average += any(difference.resolved for difference in found.differences)
        named_best += found.best is not None
        models = [fit_arms(task, 120) for task in of_tasks]
        p_values = [single_p_value(task, arm, 0) for task in models for arm in (1, 2, 3)]
        tasks += min(p or 0.0 for p in holm_of_arms(p_values)) <= LEVEL
    assert near(average, LEVEL), average
    # Holm's bound is not reached where tests share a baseline
    assert tasks <= binom.ppf(0.9995, COMPARISONS, LEVEL), tasks
    assert tasks >= 10, tasks
    assert named_best <= binom.ppf(0.9995, COMPARISONS, LEVEL), named_best


@pytest.mark.parametrize("arm_image_sd", [0.0, 0.4])
def test_arms_that_are_equal_over_all_images(arm_image_sd: float) -> None:
    """Arms that gain on some images what they lose on others differ on a test set by chance."""
    generator = np.random.default_rng(7)
    weights = generator.poisson(1.0, (RESAMPLES, 150)).astype(np.float64)
    found = by_seeds_alone = 0
    for _ in range(COMPARISONS):
        arms = simulated(generator, weights, seeds=3, seed_sd=0.02, arm_image_sd=arm_image_sd)
        model = fit_arms(arms, 150)
        found += (single_p_value(model, 1, 0) or 0.0) <= LEVEL
        without = fit_arms([ArmValues(values=arm.values) for arm in arms])
        by_seeds_alone += (single_p_value(without, 1, 0) or 0.0) <= LEVEL
    assert near(found, LEVEL) or found < LEVEL * COMPARISONS, found
    assert found >= 15, found
    if arm_image_sd:
        assert by_seeds_alone > 1.5 * found, by_seeds_alone


def test_a_true_difference_is_found_with_the_power_that_is_said() -> None:
    generator = np.random.default_rng(11)
    deviation, found = 0.02, 0
    first = fit_arms([ArmValues(values=np.asarray([0.0, 1.0, 2.0])) for _ in range(4)])
    least = compare_with_baseline(first, 0).differences[0].least_with_power
    assert least is not None
    true = least * deviation  # the deviation of first is 1
    for _ in range(COMPARISONS):
        values = deviation * generator.normal(size=(4, 3)) + np.asarray(
            [[0.5]] * 3 + [[0.5 + true]]
        )
        model = fit_arms([ArmValues(values=row) for row in values])
        last = compare_with_baseline(model, 0).of(3)
        found += last is not None and last.resolved
    assert near(found, 0.8), found


def test_the_seeds_that_are_said_to_be_needed_are() -> None:
    values = np.asarray([[0.50, 0.52, 0.54], [0.53, 0.55, 0.57], [0.50, 0.52, 0.54]])
    found = compare_with_baseline(fit_arms([ArmValues(values=row) for row in values]), 0)
    difference = found.of(1)
    assert difference is not None
    assert not difference.resolved
    needed = seeds_needed(found.model, 1, 0)
    assert needed is not None
    for seeds, enough in ((needed, True), (needed - 1, False)):
        spread = np.linspace(-1, 1, seeds)
        spread *= 0.02 / spread.std(ddof=1)
        rows = [ArmValues(values=0.5 + spread) for _ in range(3)]
        least = compare_with_baseline(fit_arms(rows), 0).differences[0].least_with_power
        assert least is not None
        assert (least <= 0.03) == enough


def test_images_that_cannot_resolve_a_difference_are_not_helped_by_seeds() -> None:
    covariance = np.diag([0.01, 0.01])
    model = ArmModel(
        means=np.asarray([0.5, 0.6]), seeds=np.asarray([3, 3]), seed_variance=1e-4, freedom=4,
        image_covariance=covariance, image_units=100,
    )  # fmt: skip
    (difference,) = compare_with_baseline(model, 0).differences
    assert seeds_needed(model, 1, 0) is None
    assert not difference.resolved


def test_variance_is_pooled_over_the_arms_and_seeds_need_not_be_equal() -> None:
    values = [np.asarray([0.1, 0.3]), np.asarray([0.4, 0.5, 0.9]), np.asarray([0.7])]
    model = fit_arms([ArmValues(values=of_arm) for of_arm in values])
    squares = sum(((of_arm - of_arm.mean()) ** 2).sum() for of_arm in values)
    assert model.freedom == 3
    assert model.seed_variance == pytest.approx(squares / 3)
    variance, freedom = model.variance(1, 2)
    assert (variance, freedom) == (pytest.approx(squares / 3 * (1 / 3 + 1)), 3)
    two = fit_arms([ArmValues(values=of_arm) for of_arm in values[:2]])
    assert single_p_value(two, 1, 0) == pytest.approx(float(f_oneway(*values[:2]).pvalue))


def test_one_seed_orders_nothing() -> None:
    model = fit_arms([ArmValues(values=np.asarray([value])) for value in (0.1, 0.9, 0.5)])
    found = compare_with_baseline(model, 0)
    assert [difference.value for difference in found.differences] == pytest.approx([0.8, 0.4])
    assert all(difference.interval is None for difference in found.differences)
    assert not any(difference.resolved for difference in found.differences)
    assert (found.best, found.may_be_best) == (None, (0, 1, 2))
    assert chance_of_best(model) is None


def test_the_best_is_named_where_it_is_better_than_each() -> None:
    values = [[0.50, 0.51], [0.60, 0.61], [0.80, 0.81]]
    model = fit_arms([ArmValues(values=np.asarray(row)) for row in values])
    found = compare_with_baseline(model, 0)
    assert (found.best, found.may_be_best) == (2, (2,))
    chances = chance_of_best(model)
    assert chances is not None
    assert chances.sum() == pytest.approx(1)
    assert chances[2] > 0.99
    assert np.array_equal(chances, chance_of_best(model))  # type: ignore[arg-type]


def test_values_without_any_spread() -> None:
    model = fit_arms([ArmValues(values=np.full(2, value)) for value in (0.5, 0.5, 0.6)])
    same, higher = compare_with_baseline(model, 0).differences
    assert (same.p_value, same.interval, same.resolved) == (1.0, (0.0, 0.0), False)
    assert higher.p_value == 0.0
    assert higher.value == pytest.approx(0.1)


def test_what_seeds_and_images_do_together_is_counted_once() -> None:
    """Without arm by image effects, images add nothing to the variance between seeds."""
    generator = np.random.default_rng(3)
    weights = generator.poisson(1.0, (400, 200)).astype(np.float64)
    ratios = []
    for _ in range(100):
        model = fit_arms(simulated(generator, weights, seeds=3, seed_sd=0.0), 200)
        by_seeds = 2 * model.seed_variance / 3
        ratios.append((model.variance(1, 0)[0] - by_seeds) / by_seeds)
    assert np.median(ratios) < 0.1
    assert sqrt(np.mean(np.square(ratios))) < 0.6
