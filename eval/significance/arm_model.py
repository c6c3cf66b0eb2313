"""How much the values of arms vary, each trained with several seeds and tested on the same images.

The model is one of crossed random effects of seed and image: the value of arm a with seed s is

    v[a, s] = m[a] + S[a, s] + mean over images i of (I[i] + AI[a, i] + SI[a, s, i])

Which arm is better in truth, for other seeds and on other images, is a matter of m alone. The
effects of images, I, are the same for all arms and leave a difference; the others do not:

* S and SI move the seeds of one arm apart. Their variance is that between seeds, pooled over the
  arms, with as many degrees of freedom as there are seeds beyond the first of each arm. Seeds of
  different arms are taken as independent: where equal seeds move arms alike, differences vary less
  than is said here.
* AI is what an arm gains on some images and loses on others. Resampling the images for all runs at
  once moves the arms' means by AI and by SI; what SI makes of it is known from the seeds of one
  arm, which SI alone moves apart, and is subtracted, because the variance between seeds has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmValues:
    """One metric of one arm."""

    values: np.ndarray  # float64 [S], a seed each, at least one
    replicates: np.ndarray | None = None  # float64 [S, R]: the metric on the same R resamples


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmModel:
    """Means of arms and what they vary by."""

    means: np.ndarray  # float64 [K]
    seeds: np.ndarray  # int64 [K]
    seed_variance: float  # between seeds of one arm, pooled; NaN without freedom
    freedom: int  # degrees of freedom of `seed_variance`
    image_covariance: np.ndarray  # float64 [K, K], what AI and I make of the means
    image_units: int  # distinct images; 0: outcomes are not known, and images do not count

    def variance(self, arm: int, other: int, *, seeds: int | None = None) -> tuple[float, float]:
        """Return the variance of a difference of means, and its degrees of freedom.

        By Satterthwaite's approximation (1946) for the sum of what seeds and what images do.

        Args:
            arm: of the difference.
            other: of the difference.
            seeds: as if every arm had so many; None: as it is.
        """
        shares = 1 / self.seeds[[arm, other]] if seeds is None else np.asarray([2 / seeds])
        freedom = self.freedom if seeds is None else len(self.means) * (seeds - 1)
        own, others = self.image_covariance[arm], self.image_covariance[other]
        by_images = max(float(own[arm] + others[other] - 2 * own[other]), 0.0)
        by_seeds = self.seed_variance * float(shares.sum())
        return _satterthwaite(by_seeds, freedom, by_images, self.image_units - 1)


def fit_arms(arms: Sequence[ArmValues], image_units: int = 0) -> ArmModel:
    """Estimate means and variances of arms.

    Args:
        arms: K of them; `replicates` count if all have them, on the same resamples of the images.
        image_units: distinct images of the replicates.

    Example:
        >>> import numpy as np
        >>> from siftclip.eval.significance.arm_model import ArmValues, fit_arms
        >>> model = fit_arms([ArmValues(values=np.array(v)) for v in ([0.5, 0.7], [0.8, 0.8])])
        >>> model.means.round(2).tolist(), round(model.seed_variance, 4), model.freedom
        ([0.6, 0.8], 0.01, 2)
    """
    values = [np.asarray(arm.values, dtype=np.float64) for arm in arms]
    seeds = np.asarray([len(of_arm) for of_arm in values])
    freedom = int((seeds - 1).sum())
    squares = sum(float(((of_arm - of_arm.mean()) ** 2).sum()) for of_arm in values)
    by_images = _image_covariance(arms, freedom)
    covariance, of_run = (np.zeros((len(arms),) * 2), 0.0) if by_images is None else by_images
    variance = squares / freedom if freedom else float("nan")
    if variance == 0.0:  # values in steps of one image can be equal by chance
        variance = of_run
    return ArmModel(
        means=np.asarray([of_arm.mean() for of_arm in values]),
        seeds=seeds,
        seed_variance=variance,
        freedom=freedom,
        image_covariance=covariance,
        image_units=0 if by_images is None else image_units,
    )


def _image_covariance(arms: Sequence[ArmValues], freedom: int) -> tuple[np.ndarray, float] | None:
    """Estimate the covariance of means by images without SI, and the variance of SI in one run.

    None where replicates are missing, or there are no two seeds of an arm to tell SI by.
    """
    rows = [arm.replicates for arm in arms if arm.replicates is not None]
    if len(rows) < len(arms) or not freedom:
        return None
    defined = ~np.isnan(np.concatenate(rows)).any(axis=0)
    if 2 * defined.sum() < len(defined):
        return None
    rows = [of_arm[:, defined] for of_arm in rows]
    apart = sum(((of_arm - of_arm.mean(axis=0)).var(axis=1)).sum() for of_arm in rows)
    of_run = float(apart) / freedom
    means = np.stack([of_arm.mean(axis=0) for of_arm in rows])
    covariance = np.atleast_2d(np.cov(means))
    covariance -= np.diag([of_run / len(of_arm) for of_arm in rows])
    roots, vectors = np.linalg.eigh(covariance)  # an estimate may have negative variances
    clipped: np.ndarray = (vectors * roots.clip(min=0.0)) @ vectors.T
    return clipped, of_run


def _satterthwaite(
    first: float, first_freedom: float, second: float, second_freedom: float
) -> tuple[float, float]:
    """Return the sum of two estimated variances, and its degrees of freedom."""
    total = first + second
    if second <= 0.0 or second_freedom <= 0:
        return total, float(first_freedom)
    parts = first**2 / first_freedom + second**2 / second_freedom
    return total, total**2 / parts
