"""Several arms against one baseline: Dunnett's simultaneous tests and intervals.

Dunnett, "A Multiple Comparison Procedure for Comparing Several Treatments with a Control", 1955.
The differences share the baseline and the estimate of the variance, so that their t statistics have
a multivariate t distribution whose correlations are products lambda_i lambda_j. Given the
baseline's error z and the estimate's error s, the statistics are independent, which leaves two
integrals.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

# With these the chances are right to 1e-6.
_NODES = 48  # of the baseline's error
_CHI_NODES = 96  # of the probability of the estimated deviation


class Dunnett:
    """The greatest of several t statistics that share a baseline and an estimated variance.

    Args:
        correlations: lambda_i in [0, 1) of each arm: the root of the baseline's share of the
            variance of a difference, sqrt(1/2) for equal numbers of seeds.
        freedom: degrees of freedom of the variance, above 0; inf: it is known.
    """

    def __init__(self, correlations: Sequence[float], freedom: float) -> None:
        nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
        self._freedom = freedom
        self._weights = weights / weights.sum()
        shared = np.asarray(correlations, dtype=np.float64)
        self._own = np.sqrt(1 - shared**2)
        self._from_baseline = nodes[:, None, None] * shared  # [z, 1, k]
        deviations, self._chi_weights = _deviations(freedom)
        self._deviations = deviations[:, None]  # [s, 1]

    def p_value(self, statistic: float) -> float:
        """Return how often the greatest |t| of equal arms is at least this."""
        return float(min(1.0, max(0.0, 1 - self._below(abs(statistic), two_sided=True))))

    def critical(self, level: float, *, two_sided: bool = True) -> float:
        """Return what the greatest t, or |t|, of equal arms exceeds with this chance.

        Args:
            level: in (0, 1).
            two_sided: whether |t| counts.
        """
        from scipy.optimize import brentq  # type: ignore[import-untyped]
        from scipy.stats import t  # type: ignore[import-untyped]

        def missing(value: float) -> float:
            return self._below(value, two_sided=two_sided) - (1 - level)

        # between the value for one arm and Bonferroni's
        single = level / 2 if two_sided else level
        low, high = t.isf([single, single / len(self._own)], self._freedom).tolist()
        margin = 1e-3 * high
        return float(brentq(missing, low - margin, high + margin, xtol=1e-6, rtol=1e-9))

    def _below(self, value: float, *, two_sided: bool) -> float:
        """Compute the chance that no t, or |t|, is above a value."""
        from scipy.special import ndtr  # type: ignore[import-untyped]

        bound = value * self._deviations  # [s, 1]
        within = ndtr((bound + self._from_baseline) / self._own)
        if two_sided:
            within -= ndtr((self._from_baseline - bound) / self._own)
        return float(self._weights @ within.prod(axis=2) @ self._chi_weights)


def detectable_shift(critical: float, freedom: float, power: float) -> float:
    """Find the true difference, in standard deviations, that is resolved with this chance.

    Args:
        critical: what |t| must exceed.
        freedom: of t.
        power: in (0, 1), above the chance that a difference of 0 has.
    """
    from scipy.optimize import brentq
    from scipy.special import ndtr

    deviations, weights = _deviations(freedom)
    bound = critical * deviations

    def lacking(shift: float) -> float:
        return float((ndtr(shift - bound) + ndtr(-shift - bound)) @ weights) - power

    return float(brentq(lacking, 0.0, bound.max() + 10))


def _deviations(freedom: float) -> tuple[np.ndarray, np.ndarray]:
    """Return estimates of a deviation of 1 and the weights of their integral: float64 [s] each."""
    from scipy.stats import chi2

    if np.isinf(freedom):
        return np.ones(1), np.ones(1)
    nodes, weights = _nodes()
    return np.sqrt(chi2.ppf((nodes + 1) / 2, freedom) / freedom), weights / 2


@cache
def _nodes() -> tuple[np.ndarray, np.ndarray]:
    """Return the nodes and weights of that integral in [-1, 1]: float64 [s] each."""
    nodes, weights = np.polynomial.legendre.leggauss(_CHI_NODES)
    return nodes, weights
