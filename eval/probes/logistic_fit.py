"""Multinomial logistic regression on features, by L-BFGS that knows the features' covariance.

An evaluation is two float32 matrix products a block of rows, so that logits never stand in memory
as a whole; sums over blocks, parameters and the history of L-BFGS are float64. What makes small
penalties affordable is the metric that L-BFGS starts from in every iteration: in place of a
multiple of the identity, the inverse of a model of the Hessian, class by class
`c_k * covariance + l2`, with c_k the mean of p_k (1 - p_k).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from siftclip.errors import InputError, require_int, require_positive

HISTORY = 10  # pairs of steps and differences of gradients that L-BFGS keeps
COVARIANCE_ROWS = 4  # times d: rows from which the covariance is taken, for it need not be exact
BLOCK_LOGITS = {"cpu": 2**18, "cuda": 2**27}  # in memory at once: the cache, a part of the device
ABSENT_BIAS = torch.finfo(torch.float32).min / 4  # of a class without samples: finite, never won
_ARMIJO = 1e-4
_HALVINGS = 10  # of a step that does not descend; interpolation shortens it by more


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A linear classifier: scores are `features @ weight.T + bias`."""

    weight: Tensor  # float32 [C, d]
    bias: Tensor  # float32 [C]
    loss: float  # the objective that was minimised, at these parameters
    iterations: int
    converged: bool

    def scores(self, features: Tensor) -> Tensor:
        """Compute logits, float32 [n, C], of features, float32 [n, d], on the probe's device."""
        with full_precision(features.device):
            return torch.addmm(self.bias, features, self.weight.T)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute float32 products in float32 inside this block: no autocast, no TF32, no gradients."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    by_backend = [backend.fp32_precision for backend in backends]
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:  # what torch has to say when only a backend's precision was set
        overall = "highest"
    torch.set_float32_matmul_precision("highest")  # of the backends as well
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(overall)
        for backend, precision in zip(backends, by_backend, strict=True):
            backend.fp32_precision = precision


def check_samples(owner: str, features: Tensor, labels: Tensor, classes: int) -> None:
    """Check that features and labels can be fitted.

    Raises:
        InputError: see `fit_logistic`.
    """
    check_features(owner, features)
    if labels.shape != (len(features),) or labels.dtype != torch.int64:
        raise InputError(
            f"{owner}: labels must be int64 [{len(features)}], one a row of the features. Got "
            f"{labels.dtype} {list(labels.shape)}."
        )
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise InputError(
            f"{owner}: labels must be from 0 to {classes - 1}, as there are {classes} classes. "
            f"Got {int(wrong[0])} ({len(wrong)} labels are out of range)."
        )
    present = len(torch.unique(labels))
    if present < 2:
        raise InputError(
            f"{owner}: there must be samples of at least 2 classes to tell them apart. "
            f"Got {present}."
        )


def check_features(owner: str, features: Tensor) -> None:
    """Check that features are float32 [n, d] with n and d of at least 1, and finite.

    Raises:
        InputError: they are not.
    """
    if features.ndim != 2 or features.dtype != torch.float32 or 0 in features.shape:
        raise InputError(
            f"{owner}: features must be float32 [n, d], not empty. Got {features.dtype} "
            f"{list(features.shape)}."
        )
    finite = torch.isfinite(torch.linalg.vector_norm(features, dim=1))
    if not finite.all():
        row = int(finite.logical_not().nonzero()[0])
        raise InputError(
            f"{owner}: features must be finite. Row {row} holds NaN, infinity or numbers whose "
            "squares overflow."
        )


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    l2: float,
    weights: Tensor | None = None,
    start: Probe | None = None,
    tolerance: float = 1e-8,
    max_iterations: int = 1000,
) -> Probe:
    """Minimise mean cross-entropy + l2 / 2 * ||weight||^2; the bias is not penalised.

    This is scikit-learn's LogisticRegression(C=1 / (l2 * n)), but for two classes it has two rows
    as softmax has, where scikit-learn has one: equal to it with C=2 / (l2 * n). Deterministic.

    Args:
        features: float32 [n, d], on the device to compute on.
        labels: int64 [n] in [0, classes), at least two different ones.
        classes: C. A class without samples gets zero weight and `ABSENT_BIAS`.
        l2: the penalty, above 0.
        weights: float32 [n], at least 0, of the samples in the mean. None means equal ones.
        start: a probe to begin from, such as that of a stronger penalty. None means zero weight.
        tolerance: stop when the decrease still expected is below this part of the objective.
        max_iterations: stop then, not converged.

    Raises:
        InputError: an argument is not as said, or the features are not finite.
    """
    check_samples("linear_probe", features, labels, classes)
    return LogisticProblem(features, labels, classes, weights).fit(
        l2, start=start, tolerance=tolerance, max_iterations=max_iterations
    )


class LogisticProblem:
    """The samples of a fit, with what fits of different penalties share.

    Arguments: as of `fit_logistic`, which has checked them.
    """

    def __init__(
        self, features: Tensor, labels: Tensor, classes: int, weights: Tensor | None = None
    ) -> None:
        self.features = features
        self.classes = classes
        self.weights = None if weights is None else _mean_one(weights, len(labels))
        relabelled: Tensor
        self.present, relabelled = torch.unique(labels, return_inverse=True)
        self.labels = relabelled[:, None]
        counts = torch.zeros(len(self.present), dtype=torch.float64, device=labels.device)
        ones = torch.ones_like(counts[:1]).expand(len(labels))
        counts.index_add_(0, relabelled, ones if self.weights is None else self.weights.double())
        self.prior = counts / len(labels)
        with full_precision(features.device):
            self.mean, self.variances, self.basis = _principal_axes(features)

    def fit(
        self,
        l2: float,
        *,
        start: Probe | None = None,
        tolerance: float = 1e-8,
        max_iterations: int = 1000,
    ) -> Probe:
        """Fit with this penalty, see `fit_logistic`.

        Raises:
            InputError: an option is out of range.
        """
        require_positive("linear_probe.l2", l2)
        require_positive("linear_probe.tolerance", tolerance)
        require_int("linear_probe.max_iterations", max_iterations, minimum=1)
        with full_precision(self.features.device):
            return self._minimise(l2, self._initial(start), tolerance, max_iterations)

    def _initial(self, start: Probe | None) -> Tensor:
        """Return first parameters float64 [present, d + 1], biases of centred features last."""
        width = self.features.shape[1]
        theta = torch.zeros(
            len(self.present), width + 1, dtype=torch.float64, device=self.features.device
        )
        if start is None:
            theta[:, -1] = self.prior.clamp_min(torch.finfo(torch.float32).tiny).log()
        else:
            theta[:, :-1] = start.weight[self.present]
            theta[:, -1] = start.bias[self.present] + theta[:, :-1] @ self.mean
        return theta

    def _evaluate(self, theta: Tensor, l2: float) -> tuple[float, Tensor, Tensor]:
        """Compute objective, gradient float64 [present, d + 1], c_k float64 [present], see above.

        The logit of the right class is taken off before anything else, so that the loss of a
        sample that is all but certain keeps its digits: log1p(sum of the others' exponentials).
        """
        weight = theta[:, :-1].float()
        offset = (theta[:, -1] - theta[:, :-1] @ self.mean).float()
        gradient = torch.zeros_like(theta)
        curvature = torch.zeros_like(theta[:, 0])
        total = torch.zeros((), dtype=torch.float64, device=theta.device)
        rows = max(256, BLOCK_LOGITS[theta.device.type] // len(theta))
        for begin in range(0, len(self.features), rows):
            block = self.features[begin : begin + rows]
            label = self.labels[begin : begin + rows]
            logits = torch.addmm(offset, block, weight.T)
            highest = logits.amax(dim=1, keepdim=True)
            gap = highest - logits.gather(1, label)
            residual = logits.sub_(highest).exp_().scatter_(1, label, 0.0)
            others = residual.sum(dim=1, keepdim=True)
            partition = others + torch.exp(-gap)
            losses = gap + torch.log1p(others + torch.expm1(-gap))
            residual.div_(partition).scatter_(1, label, -others / partition)
            # |p - y| (1 - |p - y|) is p (1 - p) for the right class and for the others
            spread = residual.abs().sub_(residual.square())
            if self.weights is not None:
                share = self.weights[begin : begin + rows, None]
                losses, residual, spread = losses * share, residual * share, spread * share
            total += losses.sum(dtype=torch.float64)
            gradient[:, :-1] += residual.T @ block
            gradient[:, -1] += residual.sum(dim=0)
            curvature += spread.sum(dim=0)
        n = len(self.features)
        gradient[:, :-1] -= gradient[:, -1:] * self.mean
        gradient /= n
        gradient[:, :-1] += l2 * theta[:, :-1]
        penalty = l2 / 2 * theta[:, :-1].square().sum()
        return float(total / n + penalty), gradient, curvature / n

    def _precondition(self, vector: Tensor, curvature: Tensor, l2: float) -> Tensor:
        scale = curvature.clamp_min(1e-12)[:, None]
        turned = vector[:, :-1] @ self.basis
        turned /= scale * self.variances + l2
        return torch.cat([turned @ self.basis.T, vector[:, -1:] / scale], dim=1)

    def _minimise(self, l2: float, theta: Tensor, tolerance: float, max_iterations: int) -> Probe:
        history: list[tuple[Tensor, Tensor, Tensor]] = []
        loss, gradient, curvature = self._evaluate(theta, l2)
        iteration, converged = 0, False
        while iteration < max_iterations:
            step = -self._direction(gradient, curvature, l2, history)
            slope = float((gradient * step).sum())
            if -slope / 2 <= tolerance * loss:
                converged = True
                break
            iteration += 1
            length = 1.0
            for _ in range(_HALVINGS):
                new_theta = theta + length * step
                new_loss, new_gradient, new_curvature = self._evaluate(new_theta, l2)
                if new_loss <= loss + _ARMIJO * length * slope:
                    break
                parabola = -slope * length / (2 * ((new_loss - loss) / length - slope))
                length *= min(max(parabola / length, 0.1), 0.5)
            else:
                if history:  # differences as small as rounding may have spoiled it
                    history = []
                    continue
                converged = True  # nothing is left to descend but rounding
                break
            moved, changed = new_theta - theta, new_gradient - gradient
            product = (moved * changed).sum()
            if product > 0:
                history = [*history[1 - HISTORY :], (moved, changed, product)]
            theta, loss, gradient, curvature = new_theta, new_loss, new_gradient, new_curvature
        return self._probe(theta, loss, iteration, converged)

    def _direction(
        self,
        gradient: Tensor,
        curvature: Tensor,
        l2: float,
        history: list[tuple[Tensor, Tensor, Tensor]],
    ) -> Tensor:
        """Run the two loops of L-BFGS (Nocedal and Wright, alg. 7.4) around `_precondition`."""
        vector = gradient.clone()
        factors = []
        for moved, changed, product in reversed(history):
            factor = (moved * vector).sum() / product
            vector -= factor * changed
            factors.append(factor)
        vector = self._precondition(vector, curvature, l2)
        if history:  # where the model of the Hessian is flatter than what the last step met
            _, changed, product = history[-1]
            vector *= (
                product / (changed * self._precondition(changed, curvature, l2)).sum()
            ).clamp(max=1.0)
        for (moved, changed, product), factor in zip(history, reversed(factors), strict=True):
            vector += (factor - (changed * vector).sum() / product) * moved
        return vector

    def _probe(self, theta: Tensor, loss: float, iterations: int, converged: bool) -> Probe:
        # softmax does not see what all classes share: biases sum to 0, as weights do by the penalty
        bias = theta[:, -1] - theta[:, :-1] @ self.mean
        full_weight = torch.zeros(self.classes, theta.shape[1] - 1, device=theta.device)
        full_bias = torch.full((self.classes,), ABSENT_BIAS, device=theta.device)
        full_weight[self.present] = theta[:, :-1].float()
        full_bias[self.present] = (bias - bias.mean()).float()
        return Probe(
            weight=full_weight,
            bias=full_bias,
            loss=loss,
            iterations=iterations,
            converged=converged,
        )


def _mean_one(weights: Tensor, n: int) -> Tensor:
    valid = weights.shape == (n,) and bool(torch.isfinite(weights).all() and (weights >= 0).all())
    if not valid or not weights.any():
        raise InputError(
            f"linear_probe: weights must be {n} finite numbers of at least 0, one above 0. Got "
            f"{list(weights.shape)}, {weights.ravel()[:4].tolist()}..."
        )
    return (weights / weights.mean(dtype=torch.float64)).float()


def _principal_axes(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute mean [d], variances [d] and axes [d, d], orthonormal, of spaced rows, float64."""
    wanted = COVARIANCE_ROWS * features.shape[1]
    sample = features[:: math.ceil(len(features) / wanted)]
    mean = sample.mean(dim=0)
    centred = sample - mean
    covariance = (centred.T @ centred).double() / len(centred)
    variances, basis = torch.linalg.eigh(covariance)
    return mean.double(), variances.clamp_min_(0.0), basis
