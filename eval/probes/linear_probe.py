"""Linear probe and few-shot: how well a linear classifier on frozen features does.

Both recipes of CLIP (arXiv 2103.00020, A.3) are near: logistic regression by L-BFGS on a grid of
penalties with 8 values a decade, searched from coarse to fine. What differs from it: the features
are of unit length and the penalty is relative to the mean loss, so that the grid means the same
for any number of samples; 1000 iterations are a limit that fits seldom reach; without a validation
split of its own, a task gives up a part of train, and the last fit is on all of train.

clip_benchmark 1.6.2 has AdamW instead, with a grid of weight decays only if there is a validation
split (else no decay at all), a learning rate and epochs that the user must tune, bf16 logits, and
CUDA as the one device. Its answers depend on them, ours are the minimum of a convex function. Its
few-shot draws once, from the first samples of a shuffled loader; here draws are a function of the
seed, and several are averaged.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from siftclip.datamodules.streaming.order import derive_seeds
from siftclip.errors import InputError, require_fraction, require_int
from siftclip.eval.probes.logistic_fit import LogisticProblem, Probe, check_features, check_samples
from siftclip.purposes import GeneratorPurpose

STEPS_PER_DECADE = 8
L2_EXPONENTS = (-8, 2)  # the grid is 10 ** these and what is between
MIN_VALIDATION = 10  # fewer samples cannot tell penalties apart
FEW_SHOT_PRIOR = 0.1  # the penalty of few-shot times the number of samples, see `few_shot_l2`
_SEARCH_TOLERANCE = 1e-6  # accuracies on a few thousand samples do not see more
_TEST_ROWS = 2**16
_LONGEST = 1.01  # unit length, also of vectors that were kept in float16

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeOptions:
    """How probes are fitted."""

    l2: float | None = None  # the penalty; None: searched, and for few-shot `few_shot_l2`
    validation_fraction: float = 0.2  # of train, on which penalties are compared
    seed: int = 0  # of the split into train and validation
    tolerance: float = 1e-8  # see `fit_logistic`
    max_iterations: int = 1000
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """What a probe says of the test samples."""

    scores: np.ndarray  # float32 [n_test, C], logits
    l2: float
    validation_accuracy: float | None  # of the penalty that was chosen; None: nothing was chosen
    iterations: int
    converged: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FewShotResult:
    """A probe fitted on a few samples of each class."""

    shots: int
    seed: int
    rows: np.ndarray  # int64, of train, that were fitted, ascending
    short_classes: tuple[int, ...]  # with fewer samples than shots, also none: all of them are used
    probe: ProbeResult


@dataclass(frozen=True, slots=True, kw_only=True)
class L2Choice:
    """The penalty that did best on the samples held out."""

    l2: float
    validation_accuracy: float
    samples: int  # held out
    tried: dict[float, float] = field(repr=False)  # penalty -> accuracy, in the order of the search


def linear_probe(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    classes: int,
    *,
    options: ProbeOptions | None = None,
) -> ProbeResult:
    """Fit a linear classifier on the features of train and score those of test.

    Args:
        train_features: float32 [n, d], of unit length.
        train_labels: int64 [n] in [0, classes).
        test_features: float32 [n_test, d], of unit length.
        classes: C. A class without samples in train scores below all others.
        options: None means the defaults.

    Raises:
        InputError: a label or an option is out of range, a split is empty, features differ in
            width or are not finite, train has fewer than 2 classes, or too few samples to hold
            some out.
    """
    options = options or ProbeOptions()
    features, labels, test = _checked(
        train_features, train_labels, test_features, classes, options.device
    )
    choice = None
    l2 = options.l2
    if l2 is None:
        choice = choose_l2(
            features,
            labels,
            classes,
            seed=options.seed,
            validation_fraction=options.validation_fraction,
            max_iterations=options.max_iterations,
        )
        l2 = choice.l2
    accuracy = None if choice is None else choice.validation_accuracy
    return _fit_and_score(features, labels, test, classes, l2, options, accuracy)


def few_shot(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    classes: int,
    *,
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    seeds: Sequence[int] = (0, 1, 2),
    options: ProbeOptions | None = None,
) -> Iterator[FewShotResult]:
    """Fit linear probes on `shots` samples of each class, for all shots and seeds, in this order.

    The samples of more shots contain those of fewer. Results are made one at a time.

    Args:
        shots: each at least 1.
        seeds: each at least 0, of the samples drawn.

    Other arguments and errors: `linear_probe`, of whose options those of the search do nothing.
    """
    options = options or ProbeOptions()
    if not shots or not seeds:
        raise InputError(f"few_shot: shots and seeds must not be empty. Got {shots!r}, {seeds!r}.")
    for count in shots:
        require_int("few_shot.shots", count, minimum=1)
    for seed in seeds:
        require_int("few_shot.seeds", seed, minimum=0)
    features, labels, test = _checked(
        train_features, train_labels, test_features, classes, options.device
    )
    available = np.bincount(train_labels, minlength=classes)
    for count in shots:
        short = tuple(np.flatnonzero(available < count).tolist())
        if short:
            log.warning(
                "few-shot with %d shots: %d of %d classes have fewer samples; all are used",
                count,
                len(short),
                classes,
            )
        for seed in seeds:
            rows = few_shot_rows(train_labels, count, seed=seed)
            chosen = torch.from_numpy(rows).to(features.device)
            l2 = few_shot_l2(len(rows)) if options.l2 is None else options.l2
            probe = _fit_and_score(
                features[chosen], labels[chosen], test, classes, l2, options, None
            )
            yield FewShotResult(shots=count, seed=seed, rows=rows, short_classes=short, probe=probe)


def few_shot_l2(samples: int) -> float:
    """Return the penalty of a few-shot probe on `samples` samples: `FEW_SHOT_PRIOR / samples`.

    So few samples cannot spare a validation set, and a Gaussian prior of fixed width on the weights
    is a penalty of the mean loss that falls as 1 / samples. With 0.1, ten small tasks with 1, 4 and
    16 shots were 0.9 points of accuracy below the best penalty of each on average, at worst 9; with
    0.01 or 1 it was 1.2 and 2.1. Fourfold cross-validation by loss in its place gained 0.2 points
    with 4 shots and 0.9 with 16, and lost 0.2 with 2, at 30 times the fits.
    """
    return FEW_SHOT_PRIOR / samples


def few_shot_rows(labels: np.ndarray, shots: int, *, seed: int) -> np.ndarray:
    """Draw rows of `shots` samples of each class, without replacement: int64 [m], ascending.

    A pure function of (seed, class, position among the class's samples): other classes do not
    matter. All samples of a class that has fewer are taken. More shots contain fewer.

    Args:
        labels: int64 [n], at least 0.
        shots: at least 1.
        seed: at least 0.

    Raises:
        InputError: an argument is out of range.
    """
    require_int("few_shot.shots", shots, minimum=1)
    require_int("few_shot.seeds", seed, minimum=0)
    return _drawn_rows(labels, lambda count: shots, seed, GeneratorPurpose.SHOTS)


def validation_rows(labels: np.ndarray, fraction: float, *, seed: int) -> np.ndarray:
    """Draw rows to hold out of train, that share of each class, int64 [m], ascending.

    Rounded to the nearest, but one sample of each class stays in train. A pure function of
    (seed, class, position among the class's samples).

    Args:
        labels: int64 [n], at least 0.
        fraction: in (0, 1].
        seed: at least 0.

    Raises:
        InputError: an argument is out of range, or fewer than `MIN_VALIDATION` rows result.
    """
    require_fraction("linear_probe.validation_fraction", fraction)
    require_int("linear_probe.seed", seed, minimum=0)
    rows = _drawn_rows(
        labels,
        lambda count: min(int(fraction * count + 0.5), count - 1),
        seed,
        GeneratorPurpose.VALIDATION,
    )
    if len(rows) < MIN_VALIDATION:
        raise InputError(
            f"linear_probe.validation_fraction must hold out at least {MIN_VALIDATION} samples to "
            f"compare penalties on. Got {fraction!r}, which holds out {len(rows)} of "
            f"{len(labels)}. Give a larger fraction, or linear_probe.l2, which needs no validation."
        )
    return rows


def choose_l2(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    seed: int = 0,
    validation_fraction: float = 0.2,
    max_iterations: int = 1000,
) -> L2Choice:
    """Choose the penalty with the best accuracy on samples held out of train; of ties the largest.

    One value per decade first, from strong to weak, each fit beginning at the last; then the
    neighbours 4, 2 and 1 steps of the grid from the best so far: 17 fits at most.

    Args:
        features, labels, classes: `fit_logistic`.
        seed: of the split, see `validation_rows`.
        validation_fraction: of the samples of each class.
        max_iterations: of each fit.

    Raises:
        InputError: as `fit_logistic` and `validation_rows`.
    """
    check_samples("linear_probe", features, labels, classes)
    held = np.zeros(len(labels), dtype=bool)
    held[validation_rows(labels.cpu().numpy(), validation_fraction, seed=seed)] = True
    mask = torch.from_numpy(held).to(features.device)
    problem = LogisticProblem(features[~mask], labels[~mask], classes)
    held_features, held_labels = features[mask], labels[mask]
    lowest, highest = (STEPS_PER_DECADE * exponent for exponent in L2_EXPONENTS)
    probes: dict[int, Probe] = {}
    accuracies: dict[int, float] = {}

    def attempt(step: int) -> None:
        stronger = [other for other in probes if other > step]
        probes[step] = problem.fit(
            _grid_value(step),
            start=probes[min(stronger)] if stronger else None,
            tolerance=_SEARCH_TOLERANCE,
            max_iterations=max_iterations,
        )
        predicted = probes[step].scores(held_features).argmax(dim=1)
        accuracies[step] = float((predicted == held_labels).double().mean())

    for step in range(highest, lowest - 1, -STEPS_PER_DECADE):
        attempt(step)
    span = STEPS_PER_DECADE // 2
    while span:
        centre = _best(accuracies)
        for step in (centre + span, centre - span):
            if lowest <= step <= highest and step not in probes:
                attempt(step)
        span //= 2
    best = _best(accuracies)
    return L2Choice(
        l2=_grid_value(best),
        validation_accuracy=accuracies[best],
        samples=len(held_labels),
        tried={_grid_value(step): accuracy for step, accuracy in accuracies.items()},
    )


def _best(accuracies: dict[int, float]) -> int:
    return max(accuracies, key=lambda step: (accuracies[step], step))


def _grid_value(step: int) -> float:
    return float(10.0 ** (step / STEPS_PER_DECADE))


def _drawn_rows(
    labels: np.ndarray, quota: Callable[[int], int], seed: int, purpose: int
) -> np.ndarray:
    """Draw the samples of each class with the smallest numbers; `quota` takes the class size."""
    by_class = np.argsort(labels, kind="stable")
    classes, starts = np.unique(labels[by_class], return_index=True)
    drawn = [np.empty(0, np.int64)]
    for label, rows in zip(classes, np.split(by_class, starts[1:]), strict=True):
        order = np.argsort(derive_seeds(np.arange(len(rows)), seed, int(label), purpose))
        drawn.append(rows[order[: quota(len(rows))]])
    return np.sort(np.concatenate(drawn))


def _checked(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    classes: int,
    device: str,
) -> tuple[Tensor, Tensor, np.ndarray]:
    require_int("linear_probe.classes", classes, minimum=2)
    features, labels = _tensor(train_features), _tensor(train_labels)
    check_samples("linear_probe, train", features, labels, classes)
    check_features("linear_probe, test", _tensor(test_features))
    _check_lengths("linear_probe, train", features)
    _check_lengths("linear_probe, test", _tensor(test_features))
    if test_features.shape[1] != train_features.shape[1]:
        raise InputError(
            "linear_probe: features of train and test must be of one model. Got "
            f"{train_features.shape[1]} numbers a sample in train and {test_features.shape[1]} in "
            "test."
        )
    return features.to(device), labels.to(device), test_features


def _check_lengths(owner: str, features: Tensor) -> None:
    lengths = torch.linalg.vector_norm(features, dim=1)
    row = int(lengths.argmax())
    if lengths[row] > _LONGEST:
        raise InputError(
            f"{owner}: features must be of unit length, for which the penalties are meant. Row "
            f"{row} has length {float(lengths[row]):.4g}. Divide each row by its length."
        )


def _tensor(array: np.ndarray) -> Tensor:
    with warnings.catch_warnings():  # of an array that is mapped read-only; nothing writes to it
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


def _fit_and_score(
    features: Tensor,
    labels: Tensor,
    test_features: np.ndarray,
    classes: int,
    l2: float,
    options: ProbeOptions,
    validation_accuracy: float | None,
) -> ProbeResult:
    probe = LogisticProblem(features, labels, classes).fit(
        l2, tolerance=options.tolerance, max_iterations=options.max_iterations
    )
    test = _tensor(test_features)
    scores = np.empty((len(test), classes), dtype=np.float32)
    for start in range(0, len(test), _TEST_ROWS):
        block = test[start : start + _TEST_ROWS].to(features.device)
        scores[start : start + _TEST_ROWS] = probe.scores(block).cpu().numpy()
    return ProbeResult(
        scores=scores,
        l2=l2,
        validation_accuracy=validation_accuracy,
        iterations=probe.iterations,
        converged=probe.converged,
    )
