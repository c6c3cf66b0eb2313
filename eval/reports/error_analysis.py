"""What a model did sample by sample and class by class, as files for error analysis.

```
FOLDER/<task>_predictions.parquet   one row per sample, see `write_predictions`
FOLDER/<task>_classes.csv           one row per class, see `write_details`
FOLDER/<task>_confusion.csv         one row per class, one column per predicted class
```
"""

from __future__ import annotations

import logging
from pathlib import Path

from siftclip.eval.evaluate import ScoredTask
from siftclip.eval.metrics.class_metrics import confusion_counts
from siftclip.eval.tasks.kinds.base import TaskKind
from siftclip.eval.tasks.kinds.registry import find_kind
from siftclip.eval.tasks.kinds.values import Task
from siftclip.eval.tasks.samples import tar_of
from siftclip.tables import write_csv_records, write_csv_rows
from siftclip.writing import atomic_path

MAX_CONFUSION_CLASSES = 1000
ENDINGS = ("predictions.parquet", "classes.csv", "confusion.csv")
_CORNER = "label \\ prediction"

log = logging.getLogger(__name__)


def write_predictions(folder: Path, scored: ScoredTask) -> Path | None:
    """Write what a model did on each sample of a task, as parquet, atomically.

    All files have `key` and `tar`, of the sample, and with them the columns of the kind
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
      a plug-in's     what its `columns` returns

    Args:
        folder: where, made if needed.
        scored: a task as it was evaluated.

    Returns:
        The file, or None for tasks of which nothing is kept by sample: FairFace and UTKFace.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    samples = scored.samples
    columns = find_kind(samples.task.kind).columns(samples, scored.scores)
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
    samples that have it, average_precision. Other tasks have no classes, or say by their
    `class_table` what is written.

    Args:
        folder: where, made if needed.
        scored: a task as it was evaluated.

    Returns:
        The files.
    """
    samples, predictions = scored.samples, scored.scores.predictions
    names = samples.task.classnames
    table = find_kind(samples.task.kind).class_table(samples, scored.scores)
    if table is None:
        return []
    path = details_path(folder, samples.task, "classes.csv")
    write_csv_records(path, table)
    if predictions is None:
        return [path]
    confusion = confusion_counts(predictions.argmax, samples.require_labels(), len(names))
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
    if not task.has_labels:
        return False
    if ending == "predictions.parquet":
        return True
    has_table = type(find_kind(task.kind)).class_table is not TaskKind.class_table
    return has_table and task.protocol != "few_shot"
