"""Zero-shot classification: predictions of a classifier, and the metrics of one or many labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from siftclip.errors import InputError
from siftclip.eval.metrics.outcomes import Metrics, Outcomes

TOP = 5
LOGIT_SCALE = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassPredictions:
    """The best classes of each sample.

    Of equal logits topk may put another one first than argmax does. clip_benchmark takes the
    accuracies from the one and the recall from the other, so both are kept.
    """

    top: np.ndarray  # int64 [n, 5], best first; [n, 1] with fewer than 5 classes
    scores: np.ndarray  # float32, the logits of `top`
    argmax: np.ndarray  # int64 [n]
    label_score: np.ndarray | None = None  # float32 [n], the logit of the label, if it was given
    label_rank: np.ndarray | None = None  # int64 [n], how many classes score strictly higher


def class_logits(features: Tensor, classifier: Tensor, *, chunk_samples: int = 2048) -> Tensor:
    """Compute logits of all samples, float32 [n, C] on the CPU; arguments: `predict_classes`."""
    return torch.cat(list(_logit_blocks(features, classifier, chunk_samples)))


def predict_classes(
    features: Tensor,
    classifier: Tensor,
    labels: np.ndarray | None = None,
    *,
    chunk_samples: int = 2048,
) -> ClassPredictions:
    """Find the best classes by the logits 100 * features @ classifier, as clip_benchmark has them.

    The products are taken in float64 and rounded to float32, so that TF32, autocast and the size
    of a block leave them alone. They are ranked on the CPU: of equal logits the same one comes
    first on any device.

    Args:
        features: float32 [n, d] of the images, of length 1, on any device.
        classifier: float32 [d, C] on the same device, one column per class.
        labels: int64 [n], from 0 to C - 1, to also find the scores and ranks of the labels.
        chunk_samples: samples whose logits exist at one time.

    Raises:
        InputError: there is no sample, logits are NaN or infinite, or labels are not of this
            shape, type or range.
    """
    if labels is not None:
        require_labels(labels, len(features), classifier.shape[1])
    parts, done = list[ClassPredictions](), 0
    for logits in _logit_blocks(features, classifier, chunk_samples):
        end = done + len(logits)
        parts.append(rank_classes(logits, None if labels is None else labels[done:end]))
        done = end
    return ClassPredictions(
        top=np.concatenate([part.top for part in parts]),
        scores=np.concatenate([part.scores for part in parts]),
        argmax=np.concatenate([part.argmax for part in parts]),
        label_score=_joined([part.label_score for part in parts]),
        label_rank=_joined([part.label_rank for part in parts]),
    )


def _joined(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    given = [part for part in parts if part is not None]
    return np.concatenate(given) if given else None


def rank_classes(logits: Tensor, labels: np.ndarray | None = None) -> ClassPredictions:
    """Find the best classes by logits, and where those of the labels stand.

    Args:
        logits: float32 [n, C] on the CPU.
        labels: int64 [n], from 0 to C - 1.

    Raises:
        InputError: labels are not of this shape, type or range.
    """
    best = logits.topk(TOP if logits.shape[1] >= TOP else 1, dim=1)
    score = rank = None
    if labels is not None:
        require_labels(labels, *logits.shape)
        of_label = logits.gather(1, torch.from_numpy(labels)[:, None])
        score, rank = of_label[:, 0].numpy(), (logits > of_label).sum(dim=1).numpy()
    return ClassPredictions(
        top=best.indices.numpy(),
        scores=best.values.numpy(),
        argmax=logits.argmax(dim=1).numpy(),
        label_score=score,
        label_rank=rank,
    )


def _logit_blocks(features: Tensor, classifier: Tensor, chunk_samples: int) -> Iterator[Tensor]:
    """Yield logits float32 [., C] on the CPU; after the last, InputError if any was not finite."""
    if not len(features):
        raise InputError("A task must have at least one sample. It has none.")
    weights = classifier.double()
    bad = 0
    for block in torch.split(features, chunk_samples):
        logits = (LOGIT_SCALE * block.double() @ weights).float().cpu()
        bad += int((~logits.isfinite()).any(dim=1).sum())
        yield logits
    if bad:
        raise InputError(
            f"The logits must be finite. Those of {bad} of {len(features)} samples are not: the "
            "model gives NaN or infinite features for these images, or for the prompts if it is "
            "all of them."
        )


def group_means(
    values: np.ndarray, groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the mean of the values in each group that has any.

    Args:
        values: float or bool [n].
        groups: int64 [n], any integers.

    Returns:
        The groups that occur, ascending, their means, float64, and how many values each has.
    """
    names, places, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return names, np.bincount(places, weights=values, minlength=len(names)) / counts, counts


def classification_metrics(
    predictions: ClassPredictions, labels: np.ndarray, classes: int
) -> tuple[Metrics, dict[str, Outcomes]]:
    """Compute clip_benchmark's acc1, acc5 (NaN with fewer than 5 classes), mean_per_class_recall.

    The recall is the mean over the classes that have samples.

    Args:
        predictions: of n samples.
        labels: int64 [n], from 0 to classes - 1.
        classes: C, how many there are.

    Raises:
        InputError: labels are not of this shape, type or range.
    """
    require_labels(labels, len(predictions.argmax), classes)
    is_right = predictions.top == labels[:, None]
    right = predictions.argmax == labels
    outcomes = {
        "acc1": Outcomes(statistic="mean", arrays={"value": is_right[:, 0].astype(np.float32)}),
        "mean_per_class_recall": Outcomes(
            statistic="class_mean",
            arrays={"value": right.astype(np.float32), "cell": labels.astype(np.int32)},
        ),
    }
    metrics = {
        "acc1": float(is_right[:, 0].mean()),
        "acc5": float("nan"),
        "mean_per_class_recall": float(group_means(right, labels)[1].mean()),
    }
    if is_right.shape[1] == TOP:
        hits = is_right.any(axis=1)
        metrics["acc5"] = float(hits.mean())
        outcomes["acc5"] = Outcomes(statistic="mean", arrays={"value": hits.astype(np.float32)})
    return metrics, outcomes


def require_labels(labels: np.ndarray, samples: int, classes: int) -> None:
    """Raise InputError unless `labels` are int64 [samples] from 0 to classes - 1."""
    if labels.shape != (samples,) or labels.dtype != np.int64:
        raise InputError(
            f"The labels must be int64 [{samples}], one for each sample. "
            f"Got {labels.dtype} {list(labels.shape)}."
        )
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        raise InputError(
            f"The labels must be from 0 to {classes - 1}, as there are {classes} classes. "
            f"{wrong.sum()} of {samples} are not, the first is {labels[wrong][0]}: do the labels "
            "and the class names belong to the same task?"
        )


def multilabel_metrics(scores: Tensor, labels: np.ndarray) -> tuple[Metrics, dict[str, Outcomes]]:
    """Compute mean_average_precision: the mean over all classes of the average precision.

    By clip_benchmark's function; a class without positives counts as 0.

    Args:
        scores: float32 [n, C], as of `class_logits`.
        labels: bool [n, C].

    Raises:
        InputError: labels are not of this shape or type.
    """
    scores = scores.float().cpu()
    if labels.shape != tuple(scores.shape) or labels.dtype != np.bool_ or not labels.size:
        raise InputError(
            f"The labels of a multilabel task must be bool {list(scores.shape)}, one row a sample "
            f"and one column a class, and not empty. Got {labels.dtype} {list(labels.shape)}."
        )
    precisions = average_precisions(scores, labels)
    outcomes = Outcomes(
        statistic="average_precision", arrays={"scores": scores.numpy(), "labels": labels}
    )
    name = "mean_average_precision"
    return {name: precisions.mean().item()}, {name: outcomes}


def average_precisions(scores: Tensor, labels: np.ndarray) -> Tensor:
    """Compute clip_benchmark's average precision of each class, float32 [C]; 0 without positives.

    Args:
        scores: float32 [n, C] on the CPU.
        labels: bool [n, C].
    """
    # Here, since importing it takes a second and a half, which other tasks need not cost.
    from clip_benchmark.metrics.zeroshot_classification import average_precision_per_class

    precisions: Tensor = average_precision_per_class(scores, torch.tensor(labels))
    return precisions


def confusion_counts(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Count how often each class was taken for each other.

    Args:
        predicted: int64 [n], from 0 to classes - 1.
        labels: int64 [n], from 0 to classes - 1.
        classes: C, how many there are.

    Returns:
        int64 [C, C]: row = label, column = predicted.

    Raises:
        InputError: labels are not of this shape, type or range.
    """
    require_labels(labels, len(predicted), classes)
    counts = np.bincount(labels * classes + predicted, minlength=classes * classes)
    return counts.reshape(classes, classes)


def per_class_table(
    confusion: np.ndarray, classnames: Sequence[str]
) -> list[dict[str, str | int | float]]:
    """Build one record per class: what it was mostly taken for, and how often it was right.

    Args:
        confusion: int64 [C, C], see `confusion_counts`.
        classnames: C of them.

    Returns:
        Records of class, samples, recall (NaN without samples), precision (NaN where the class
        was never predicted), most_confused_with ("" for none; of equals the first class), times.

    Raises:
        InputError: there is not one name a class.
    """
    if len(classnames) != len(confusion):
        raise InputError(
            f"classnames must hold one name for each of {len(confusion)} classes. "
            f"Got {len(classnames)}."
        )
    right = np.diag(confusion)
    samples, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    wrong = confusion - np.diag(right)
    other = wrong.argmax(axis=1)
    return [
        {
            "class": name,
            "samples": int(samples[c]),
            "recall": _share(right[c], samples[c]),
            "precision": _share(right[c], predicted[c]),
            "most_confused_with": classnames[other[c]] if wrong[c, other[c]] else "",
            "times": int(wrong[c, other[c]]),
        }
        for c, name in enumerate(classnames)
    ]


def _share(part: int, whole: int) -> float:
    return float(part / whole) if whole else float("nan")
