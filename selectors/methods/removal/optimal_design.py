"""A- and V-optimal design by backward elimination, which the VAS paper (arXiv 2402.02055) compares.

A linear model on the features of a subset has an error of trace S^-1 in its weights (A), and of
trace T S^-1 in its answers on a target (V), where S is the sum of x x^T over the subset, and T the
covariance of the target. Samples are removed whose removal raises that error least.

The definition here is ours: the abstract of the paper was at hand, and not the details of its
baselines, nor code for them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from siftclip.errors import InputError, require_positive
from siftclip.selectors.core.base import FeatureFile, Requirements, Source
from siftclip.selectors.core.rules import keep_top
from siftclip.selectors.fitting.covariance import UNIT, file_moment, mean_moment
from siftclip.selectors.methods.removal.elimination import Samples
from siftclip.selectors.methods.removal.stepwise import Criterion, StepwiseRemoval


def removal_cost(features: Tensor, moment: Tensor, target: Tensor | None = None) -> Tensor:
    """Compute how much trace(T S^-1) grows when one sample is removed from S: float64 [n], above 0.

    By Sherman and Morrison x^T S^-1 T S^-1 x / (1 - x^T S^-1 x), with T = I for A-optimality.

    Args:
        features: float [n, d], samples that are in S.
        moment: float64 [d, d], the S, positive definite after any removal: ridge included.
        target: float64 [d, d], the T of V-optimality; None for A-optimality.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    x = features.double()
    weights = x @ inverse
    growth = weights if target is None else weights @ target
    costs: Tensor = torch.linalg.vecdot(growth, weights) / (1 - torch.linalg.vecdot(weights, x))
    return costs


class DesignCriterion:
    """The cost of removal among the samples that are left, in float64, rounded to float32."""

    def __init__(self, samples: Samples, ridge: float, target: Tensor | None) -> None:
        self._samples, self._ridge, self._target = samples, ridge, target
        self._sums: Tensor | None = None

    def lowest(self, step: int, left: np.ndarray, removed: np.ndarray, count: int) -> np.ndarray:
        if self._sums is None:
            self._sums = self._samples.moment(left)
            self._check_target(len(self._sums))
        else:
            self._sums = self._sums - self._samples.moment(removed)
        moment = self._sums.double() * UNIT**2
        moment.diagonal().add_(self._ridge)
        costs = self._samples.map(left, lambda x: removal_cost(x, moment, self._target))
        kept = keep_top(costs.astype(np.float32), self._samples.uids[left], len(left) - count)
        lowest: np.ndarray = kept == 0
        return lowest

    def _check_target(self, dim: int) -> None:
        if self._target is not None and len(self._target) != dim:
            raise InputError(
                f"VOptimal: the features of the pool have {dim} components, and those of the "
                f"target {len(self._target)}: they belong to another model."
            )


class AOptimal(StepwiseRemoval):
    """Remove the samples that a linear model's weights need least."""

    def __init__(
        self, *, features: str | None = None, fraction: float, steps: int, ridge: float = 1.0
    ) -> None:
        """Choose features and schedule.

        Args:
            features: as for `StepwiseRemoval`.
            fraction: as for `StepwiseRemoval`.
            steps: as for `StepwiseRemoval`.
            ridge: added to the diagonal of S, above 0: so many samples of unit norm in each
                direction. S is a sum over samples, so that it weighs less in a larger pool.
        """
        super().__init__(features=features, fraction=fraction, steps=steps)
        self.ridge = require_positive("ridge", ridge, owner=self)

    def criterion(self, source: Source, samples: Samples) -> Criterion:
        return DesignCriterion(samples, self.ridge, None)


class VOptimal(AOptimal):
    """Remove the samples that a linear model needs least to answer on a target."""

    def __init__(
        self,
        *,
        features: str | None = None,
        target: FeatureFile,
        fraction: float,
        steps: int,
        ridge: float = 1.0,
    ) -> None:
        """Choose features, target and schedule.

        Args:
            features: as for `StepwiseRemoval`.
            target: features of the target's images.
            fraction: as for `StepwiseRemoval`.
            steps: as for `StepwiseRemoval`.
            ridge: as for `AOptimal`.
        """
        super().__init__(features=features, fraction=fraction, steps=steps, ridge=ridge)
        self.target = target

    @property
    def requires(self) -> Requirements:
        return Requirements(features=super().requires.features, files=(self.target,))

    def criterion(self, source: Source, samples: Samples) -> Criterion:
        moment, count = file_moment("VOptimal", source, (self.target,))
        if count == 0:
            raise InputError(f"VOptimal: {self.target.path} has no rows that are finite and not 0.")
        return DesignCriterion(samples, self.ridge, mean_moment(moment, count))
