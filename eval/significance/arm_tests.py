"""Which arms of a comparison differ from a baseline, and which may be the best.

Differences are t statistics of the model of `arm_model`, with Dunnett's correction for the number
of arms: an interval holds 0 exactly where the corrected p value is above the level. The best arm is
found by multiple comparisons with the best (Hsu, "Constrained Simultaneous Confidence Intervals for
Multiple Comparisons with the Best", 1984): of equal arms, one is called the best with a chance of
at most the level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt

import numpy as np

from siftclip.eval.significance.arm_model import ArmModel
from siftclip.eval.significance.dunnett import Dunnett, detectable_shift
from siftclip.eval.significance.paired_tests import holm
from siftclip.purposes import GeneratorPurpose

LEVEL = 0.05
POWER = 0.8
_MOST_SEEDS = 1000
_DRAWS = 20_000
_EQUAL = round(sqrt(0.5), 9)  # see `Dunnett`, for equal numbers of seeds


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmDifference:
    """An arm against the baseline. None: there is no estimate of the variance between seeds."""

    arm: int
    value: float  # arm - baseline
    interval: tuple[float, float] | None = None  # simultaneous, of all arms together
    p_value: float | None = None  # two-sided, corrected for the number of arms
    p_single: float | None = None  # not corrected
    least: float | None = None  # the smallest difference that would have been resolved
    least_with_power: float | None = None  # the true one that is resolved in 80 % of experiments

    @property
    def resolved(self) -> bool:
        """Whether it is at 5 %."""
        return self.p_value is not None and self.p_value <= LEVEL


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmTests:
    """All arms on one metric."""

    model: ArmModel
    baseline: int
    differences: tuple[ArmDifference, ...]  # of all other arms, in their order
    best: int | None  # the arm that is better than all others; None: not resolved
    may_be_best: tuple[int, ...]  # those of which it is not resolved that another is better

    def of(self, arm: int) -> ArmDifference | None:
        """Return the difference of an arm; None of the baseline."""
        return next((each for each in self.differences if each.arm == arm), None)


def compare_with_baseline(model: ArmModel, baseline: int) -> ArmTests:
    """Compare all arms with a baseline, and with the best.

    Args:
        model: of K arms, at least one.
        baseline: the number of an arm.
    """
    arms = range(len(model.means))
    others = [arm for arm in arms if arm != baseline]
    if not model.freedom or not others:
        return ArmTests(
            model=model,
            baseline=baseline,
            differences=tuple(
                ArmDifference(arm=arm, value=float(model.means[arm] - model.means[baseline]))
                for arm in others
            ),
            best=None,
            may_be_best=tuple(arms),
        )
    may_be, surely = _best(model)
    return ArmTests(
        model=model,
        baseline=baseline,
        differences=tuple(_difference(model, arm, baseline, others) for arm in others),
        best=surely[0] if surely else None,
        may_be_best=may_be,
    )


def single_p_value(model: ArmModel, arm: int, baseline: int) -> float | None:
    """Test one difference, not corrected: the two-sided p value; None without freedom."""
    from scipy.stats import t  # type: ignore[import-untyped]

    if not model.freedom:
        return None
    variance, freedom = model.variance(arm, baseline)
    value = abs(float(model.means[arm] - model.means[baseline]))
    if variance <= 0.0:
        return 1.0 if value == 0.0 else 0.0
    return float(2 * t.sf(value / sqrt(variance), freedom))


def seeds_needed(model: ArmModel, arm: int, baseline: int) -> int | None:
    """Count the seeds per arm that resolve a true difference of the size that was observed.

    With a chance of 80 %, and as many arms. None where a thousand do not, as the images are too
    few, or there is no estimate of the variance.

    Args:
        model: of all arms.
        arm: of the difference.
        baseline: of the difference.
    """
    size = abs(float(model.means[arm] - model.means[baseline]))
    correlations = (_EQUAL,) * (len(model.means) - 1)

    def enough(seeds: int) -> bool:
        variance, freedom = model.variance(arm, baseline, seeds=seeds)
        return _detectable(_critical(correlations, freedom), freedom) * sqrt(variance) <= size

    if not model.freedom or not enough(_MOST_SEEDS):
        return None
    low, high = 1, 2
    while not enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def holm_of_arms(p_values: Sequence[float | None]) -> list[float | None]:
    """Correct p values of many arms and tasks together by Holm's method; None stays None."""
    known = [p_value for p_value in p_values if p_value is not None]
    corrected = iter(holm(known).tolist())
    return [None if p_value is None else next(corrected) for p_value in p_values]


def chance_of_best(model: ArmModel, *, seed: int = 0) -> np.ndarray | None:
    """Draw the arms' true means, and count how often each is the highest.

    From the multivariate t distribution of the means by seeds, and the normal one by images; for
    a flat prior this is the chance of each arm to be the best.

    Args:
        model: of K arms.
        seed: of the draws.

    Returns:
        float64 [K], which adds up to 1; None without an estimate of the variance.
    """
    if not model.freedom:
        return None
    generator = np.random.default_rng([GeneratorPurpose.ARM_MEANS, seed])
    count = len(model.means)
    scale = np.sqrt(model.freedom / generator.chisquare(model.freedom, (_DRAWS, 1)))
    deviations = np.sqrt(model.seed_variance / model.seeds)
    by_seeds = generator.standard_normal((_DRAWS, count)) * deviations * scale
    roots, vectors = np.linalg.eigh(model.image_covariance)
    by_images = generator.standard_normal((_DRAWS, count)) * np.sqrt(roots.clip(min=0.0))
    drawn = model.means + by_seeds + by_images @ vectors.T
    highest = drawn == drawn.max(axis=1, keepdims=True)
    shares: np.ndarray = (highest / highest.sum(axis=1, keepdims=True)).mean(axis=0)
    return shares


def _difference(model: ArmModel, arm: int, baseline: int, others: Sequence[int]) -> ArmDifference:
    variance, freedom = model.variance(arm, baseline)
    value = float(model.means[arm] - model.means[baseline])
    p_single = single_p_value(model, arm, baseline)
    if variance <= 0.0:
        return ArmDifference(
            arm=arm, value=value, interval=(value, value), p_value=p_single, p_single=p_single,
            least=0.0, least_with_power=0.0,
        )  # fmt: skip
    deviation, correlations = sqrt(variance), _correlations(model, baseline, others)
    critical = _critical(correlations, freedom)
    return ArmDifference(
        arm=arm,
        value=value,
        interval=(value - critical * deviation, value + critical * deviation),
        p_value=_dunnett(correlations, _rounded(freedom)).p_value(value / deviation),
        p_single=p_single,
        least=critical * deviation,
        least_with_power=_detectable(critical, freedom) * deviation,
    )


def _correlations(model: ArmModel, control: int, others: Sequence[int]) -> tuple[float, ...]:
    """Return the root of the control's share of each difference's variance, by seeds."""
    own, seeds = 1 / model.seeds[control], 1 / model.seeds
    return tuple(round(sqrt(own / (own + seeds[arm])), 9) for arm in others)


def _rounded(freedom: float) -> float:
    """Round to three digits, which moves no p value by more than 1e-4: most are computed once."""
    return float(f"{freedom:.3g}")


def _critical(correlations: tuple[float, ...], freedom: float, *, two_sided: bool = True) -> float:
    return _critical_at(correlations, _rounded(freedom), two_sided)


@lru_cache(maxsize=1024)
def _critical_at(correlations: tuple[float, ...], freedom: float, two_sided: bool) -> float:
    return _dunnett(correlations, freedom).critical(LEVEL, two_sided=two_sided)


@lru_cache(maxsize=256)
def _dunnett(correlations: tuple[float, ...], freedom: float) -> Dunnett:
    return Dunnett(correlations, freedom)


def _detectable(critical: float, freedom: float) -> float:
    return _detectable_at(critical, _rounded(freedom))


@lru_cache(maxsize=1024)
def _detectable_at(critical: float, freedom: float) -> float:
    return detectable_shift(critical, freedom, POWER)


def _best(model: ArmModel) -> tuple[tuple[int, ...], list[int]]:
    """Return the arms that may be the best, and the one that is, if that is resolved."""
    may_be, surely = [], []
    arms = range(len(model.means))
    for arm in arms:
        others = [other for other in arms if other != arm]
        correlations = _correlations(model, arm, others)
        above, below = [], []
        for other in others:
            variance, freedom = model.variance(arm, other)
            critical = _critical(correlations, freedom, two_sided=False)
            value = float(model.means[arm] - model.means[other])
            above.append(value + critical * sqrt(variance))
            below.append(value - critical * sqrt(variance))
        if min(above) >= 0:
            may_be.append(arm)
        if min(below) > 0:
            surely.append(arm)
    return tuple(may_be), surely
