"""Features of tasks' images, captions and class names: the targets that selectors select for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from siftclip.datamodules.clip_models import ClipModel
from siftclip.datamodules.feature_files import ACTIVATION_ARRAY, MODEL_ARRAY
from siftclip.datamodules.files import read_npz_all, write_npz
from siftclip.datamodules.model_record import fingerprint, model_record
from siftclip.eval.encoding import EncodeOptions, Encoder, ImageFeatures
from siftclip.eval.evaluation_mode import evaluation_mode
from siftclip.eval.preparation import TaskData, prepare_tasks
from siftclip.eval.task_scores import TaskTexts
from siftclip.eval.tasks import Task
from siftclip.selectors.errors import InputError


def embed_tasks(
    clip: ClipModel, tasks: Sequence[Task], folder: Path, options: EncodeOptions
) -> list[Path]:
    """Write the features of tasks, one `TASK-SPLIT.npz` each; those that are there are kept.

    An npz holds unit vectors, float16 as in a pool: `img` [n, d], of images; `class_txt` [C, d],
    of class names as zero-shot classification uses them, the mean over the task's templates;
    `txt` [n, d], of the first caption of each image. Tasks with classes have no `txt`, retrieval
    has no `class_txt`. `model` says which weights they are of, `activation` how these were used.

    Args:
        clip: the model with its transform and tokenizer.
        tasks: of any split; classification, multilabel or retrieval.
        folder: to write to.
        options: how features are computed.

    Raises:
        InputError: a task is damaged, or of another kind.
    """
    for task in tasks:
        if not task.has_classes and task.kind != "retrieval":
            raise InputError(
                f"target.tasks: {task.name} is a task of the kind {task.kind}. Targets are images "
                "with class names or captions."
            )
    model_hash = fingerprint(clip)
    paths = {task.name: folder / _file_name(task) for task in tasks}
    activation = np.asarray(model_record(clip)["activation"])
    missing = [task for task in tasks if not _is_there(paths[task.name], model_hash, activation)]
    prepared = prepare_tasks(missing)
    for failure in prepared.failures:
        raise InputError(failure.message)
    if prepared.table is not None:
        with evaluation_mode(clip, options.device) as ready:
            encoder = Encoder(ready, options)
            texts = TaskTexts(encoder.texts)
            sets = [one.rows() for one in prepared.data]
            features_of_sets = encoder.image_sets(prepared.table, sets)
            for one, rows, found in zip(prepared.data, sets, features_of_sets, strict=True):
                arrays = _arrays(one, rows, found, texts)
                arrays |= {MODEL_ARRAY: np.asarray(model_hash), ACTIVATION_ARRAY: activation}
                write_npz(paths[one.task.name], **arrays)
    return [*paths.values()]


def _file_name(task: Task) -> str:
    return f"{task.name.replace('/', '-')}-{task.split}.npz"  # DataComp's keys have slashes


def _is_there(path: Path, model_hash: str, activation: np.ndarray) -> bool:
    """Whether a file is of this model; one without a record of the activation gets it then."""
    arrays = read_npz_all(path) if path.is_file() else {}
    if str(arrays.get(MODEL_ARRAY)) != model_hash:
        return False
    if ACTIVATION_ARRAY not in arrays:
        write_npz(path, **arrays, **{ACTIVATION_ARRAY: activation})
    return True


def _arrays(
    one: TaskData, rows: np.ndarray, found: ImageFeatures, texts: TaskTexts
) -> dict[str, np.ndarray]:
    for message in found.faults.values():
        raise InputError(message)
    task = one.task
    arrays = {"img": found.features[np.searchsorted(rows, one.images)].astype(np.float16)}
    if task.has_classes:
        classes = texts.classifier(task.classnames, task.templates).T
        arrays["class_txt"] = classes.half().cpu().numpy()
    else:
        features, places = texts.distinct([captions[0] for captions in one.samples.captions])
        arrays["txt"] = features[places].half().cpu().numpy()
    return arrays
