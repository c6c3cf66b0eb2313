"""What a model did sample by sample and class by class, as files for error analysis.

```
FOLDER/<task>_predictions.parquet   a row a sample, see `write_predictions`
FOLDER/<task>_classes.csv           a row a class, see `write_details`
FOLDER/<task>_confusion.csv         a row a class, a column a predicted class
```
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from siftclip.eval.evaluate import ScoredTask
from siftclip.eval.metrics.class_metrics import (
    TOP,
    ClassPredictions,
    average_precisions,
    confusion_counts,
    per_class_table,
)
from siftclip.eval.metrics.outcomes import Outcomes
from siftclip.eval.tasks.samples import TaskSamples, tar_of
from siftclip.eval.tasks.task import Task
from siftclip.files import atomic_path
from siftclip.tables import write_csv_records, write_csv_rows

if TYPE_CHECKING:
    import pyarrow as pa

MAX_CONFUSION_CLASSES = 1000
ENDINGS = ("predictions.parquet", "classes.csv", "confusion.csv")
_CORNER = "label \\ prediction"

log = logging.getLogger(__name__)

Columns = dict[str, Any]  # arrays or lists with one value a sample


def write_predictions(folder: Path, scored: ScoredTask) -> Path | None:
    """Write what a model did on each sample of a task, as parquet, atomically.

    All files have `key` and `tar`, of the sample, and with them
      classification  label, label_name, prediction, prediction_name, correct (its mean is acc1),
                      score (the logit of the prediction: 100 times the cosine, or the linear
                      probe's), label_score (that of the label), label_rank (how many classes score
                      strictly higher than it), top5_names and top5_scores (best first; one with
                      fewer than 5 classes) and, where there is any, metadata
      few-shot        label, label_name, share_correct (of the draws of the training samples)
      multilabel      label_names, top5_names, scores (100 times the cosines, in the order of the
                      task's class names)
      retrieval       captions; for k = 1 and 5 text_hit@k (the probability that one of its captions
                      is among the k best) and image_hits@k (how many of its captions have it among
                      their k best images)
      caption selection  captions, and text_acc, image_acc and acc as booleans
      association     cue, candidates (how many), associated (their numbers), jaccard

    Args:
        folder: where, made if needed.
        scored: a task as it was evaluated.

    Returns:
        The file, or None for tasks of which nothing is kept by sample: FairFace and UTKFace.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    samples = scored.samples
    columns = _prediction_columns(scored)
    if columns is None:
        log.info("%s: no predictions are kept of its samples", samples.task.name)
        return None
    first = samples.first_image[:-1].tolist()
    tars = [str(tar_of(samples, image).relative_to(samples.task.root)) for image in first]
    table = pa.table({"key": samples.keys.tolist(), "tar": tars, **columns})
    path = details_path(folder, samples.task, "predictions.parquet")
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    return path


def write_details(folder: Path, scored: ScoredTask) -> list[Path]:
    """Write what a model did on each class of a task, as CSV, atomically.

    For tasks with one class a sample: class, samples, recall, precision, most_confused_with and
    times, see `per_class_table`, and the counts of all confusions, unless there are more than 1,000
    classes. The predictions are those of mean_per_class_recall. For multilabel tasks: class,
    samples that have it, average_precision. Other tasks have no classes.

    Args:
        folder: where, made if needed.
        scored: a task as it was evaluated.

    Returns:
        The files.
    """
    samples, predictions = scored.samples, scored.scores.predictions
    names = samples.task.classnames
    path = details_path(folder, samples.task, "classes.csv")
    if samples.labels is None:
        return []
    if samples.task.kind == "multilabel":
        write_csv_records(path, _average_precisions(scored, names))
        return [path]
    if predictions is None:
        return []
    confusion = confusion_counts(predictions.argmax, samples.labels, len(names))
    write_csv_records(path, per_class_table(confusion, names))
    if len(names) > MAX_CONFUSION_CLASSES:
        log.warning(
            "%s: no confusion matrix is written, it would have %d x %d cells. Up to %d classes "
            "have one.",
            samples.task.name, len(names), len(names), MAX_CONFUSION_CLASSES,
        )  # fmt: skip
        return [path]
    confusion_path = details_path(folder, samples.task, "confusion.csv")
    rows = [[name, *counts] for name, counts in zip(names, confusion.tolist(), strict=True)]
    write_csv_rows(confusion_path, [_CORNER, *names], rows)
    return [path, confusion_path]


def details_path(folder: Path, task: Task, ending: str) -> Path:
    """Return a task's file by its ending: predictions.parquet, classes.csv, confusion.csv."""
    # DataComp's names have slashes; replaced, no name leads out of the folder either
    return folder / f"{task.name.replace('/', '-')}_{ending}"


def may_have(task: Task, ending: str) -> bool:
    """Return whether a task has a file of this ending: nothing is kept of faces."""
    if task.special == "faces":
        return False
    return ending == "predictions.parquet" or (task.has_classes and task.protocol != "few_shot")


def _prediction_columns(scored: ScoredTask) -> Columns | None:
    samples, scores = scored.samples, scored.scores
    kind = samples.task.kind
    if kind == "classification":
        if samples.labels is None:
            return None
        if scores.predictions is None:
            return _few_shot(samples, scores.outcomes["acc1"])
        return _classification(samples, scores.predictions)
    if kind == "multilabel":
        return _multilabel(samples, scores.outcomes["mean_average_precision"])
    if kind == "association":
        return _association(samples, scores.outcomes["avg_jaccard_score"])
    if kind == "retrieval":
        return _retrieval(samples, scores.outcomes)
    right = {
        name: outcome.arrays["value"].astype(np.bool_) for name, outcome in scores.outcomes.items()
    }
    return {"captions": _captions(samples), **right}


def _labelled(samples: TaskSamples) -> Columns:
    names = np.asarray(samples.task.classnames, dtype=np.object_)
    return {"label": samples.labels, "label_name": names[samples.labels]}


def _classification(samples: TaskSamples, predictions: ClassPredictions) -> Columns:
    names = np.asarray(samples.task.classnames, dtype=np.object_)
    best = predictions.top[:, 0]
    metadata = {} if samples.metadata is None else {"metadata": samples.metadata.tolist()}
    return {
        **_labelled(samples),
        "prediction": best,
        "prediction_name": names[best],
        "correct": best == samples.labels,
        "score": predictions.scores[:, 0],
        "label_score": predictions.label_score,
        "label_rank": predictions.label_rank,
        "top5_names": names[predictions.top].tolist(),
        "top5_scores": _lists(predictions.scores),
        **metadata,
    }


def _few_shot(samples: TaskSamples, outcomes: Outcomes) -> Columns:
    return {**_labelled(samples), "share_correct": outcomes.arrays["value"]}


def _multilabel(samples: TaskSamples, outcomes: Outcomes) -> Columns:
    names = np.asarray(samples.task.classnames, dtype=np.object_)
    scores, labels = outcomes.arrays["scores"], outcomes.arrays["labels"]
    best = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
    return {
        "label_names": [names[row].tolist() for row in labels],
        "top5_names": names[best].tolist(),
        "scores": _lists(scores),
    }


def _lists(rows: np.ndarray) -> pa.FixedSizeListArray:
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


def _retrieval(samples: TaskSamples, outcomes: dict[str, Outcomes]) -> Columns:
    columns: Columns = {"captions": _captions(samples)}
    for name, outcome in outcomes.items():
        k = name.partition("@")[2]
        columns[f"text_hit@{k}"] = outcome.arrays["value"]
        columns[f"image_hits@{k}"] = outcome.arrays["hits"]
    return columns


def _association(samples: TaskSamples, outcomes: Outcomes) -> Columns:
    return {
        "cue": [captions[0] for captions in samples.captions],
        "candidates": np.diff(samples.first_image),
        "associated": [np.flatnonzero(marks).tolist() for marks in samples.associations],
        "jaccard": outcomes.arrays["value"],
    }


def _captions(samples: TaskSamples) -> list[list[str]]:
    return [list(captions) for captions in samples.captions]


def _average_precisions(scored: ScoredTask, names: Sequence[str]) -> list[dict[str, Any]]:
    arrays = scored.scores.outcomes["mean_average_precision"].arrays
    labels = arrays["labels"]
    precisions = average_precisions(torch.from_numpy(arrays["scores"]), labels)
    counts = labels.sum(axis=0).tolist()
    return [
        {"class": name, "samples": count, "average_precision": precision}
        for name, count, precision in zip(names, counts, precisions.tolist(), strict=True)
    ]
