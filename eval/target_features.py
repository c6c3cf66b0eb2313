"""Features of tasks' images, captions and class names: the targets that selectors select for."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from siftclip.damaged import set_aside_if_damaged
from siftclip.datamodules.features.files import ACTIVATION_ARRAY, MODEL_ARRAY
from siftclip.datamodules.identity.identities import differences, kept_identity, say_reused, when
from siftclip.datamodules.models.load import ClipModel
from siftclip.datamodules.models.record import fingerprint, model_record
from siftclip.errors import InputError
from siftclip.eval.encoding.encoder import EncodeOptions, Encoder, ImageFeatures
from siftclip.eval.encoding.task_scores import TaskTexts
from siftclip.eval.evaluation_mode import evaluation_mode
from siftclip.eval.identities import tars_stamp, task_identity
from siftclip.eval.probes.probe_scores import ProbeSettings
from siftclip.eval.tasks.kinds.registry import find_kind
from siftclip.eval.tasks.kinds.values import Task
from siftclip.eval.tasks.preparation import TaskData, prepare_tasks
from siftclip.files import parse_json, read_npz_all, write_npz

log = logging.getLogger(__name__)


def embed_tasks(
    clip: ClipModel,
    tasks: Sequence[Task],
    folder: Path,
    options: EncodeOptions,
    *,
    reuse: bool = True,
) -> list[Path]:
    """Write the features of tasks, one `TASK-SPLIT.npz` each; those that are there are reused.

    Those of the same model and task, that is: of the same tars, labels, class names and templates.

    An npz holds unit vectors, float16 as in a pool: `img` [n, d], of images; `class_txt` [C, d],
    of class names as zero-shot classification uses them, the mean over the task's templates;
    `txt` [n, d], of the first caption of each image. Tasks with classes have no `txt`, retrieval
    has no `class_txt`. `model` says which weights they are of, `activation` how these were used,
    and `identity` what all of it depends on.

    Args:
        clip: the model with its transform and tokenizer.
        tasks: of any split; classification, multilabel or retrieval.
        folder: to write to.
        options: how features are computed.
        reuse: what is there already, if it is the same.

    Raises:
        InputError: a task is damaged, or of another kind; or the folder holds features of another
            model, which a selector would read together with these.
    """
    for task in tasks:
        if not find_kind(task.kind).is_target:
            raise InputError(
                f"{task.name} is a task of the kind {task.kind}. Targets are images with class "
                "names or captions."
            )
    model_hash = fingerprint(clip)
    paths = {task.name: folder / _file_name(task) for task in tasks}
    activation = np.asarray(model_record(clip)["activation"])
    _check_others(folder, set(paths.values()), model_hash)
    prepared = prepare_tasks(tasks)
    for failure in prepared.failures:
        raise InputError(failure.message)
    identities = {data.task.name: _identity(data, model_hash) for data in prepared.data}
    done = {name for name in identities if reuse and _is_there(paths[name], identities[name])}
    if done:
        oldest = min((paths[name] for name in done), key=lambda path: path.stat().st_mtime)
        say_reused(f"the features of {len(done)} of {len(tasks)} tasks", oldest)
    prepared = prepared.without(done)
    if prepared.data and prepared.table is not None:
        with evaluation_mode(clip, options.device) as ready:
            encoder = Encoder(ready, options)
            texts = TaskTexts(encoder.texts)
            sets = [data.rows() for data in prepared.data]
            features_of_sets = encoder.image_sets(prepared.table, sets)
            for data, rows, features in zip(prepared.data, sets, features_of_sets, strict=True):
                arrays = _arrays(data, rows, features, texts)
                arrays |= {MODEL_ARRAY: np.asarray(model_hash), ACTIVATION_ARRAY: activation}
                identity = json.dumps(identities[data.task.name], sort_keys=True)
                write_npz(paths[data.task.name], identity=np.asarray(identity), **arrays)
    return [*paths.values()]


def _file_name(task: Task) -> str:
    return f"{task.name.replace('/', '-')}-{task.split}.npz"  # DataComp's keys have slashes


def _identity(data: TaskData, model: str) -> dict[str, Any]:
    return kept_identity(
        "target",
        {
            "model": model,
            "task": task_identity(data, ProbeSettings()),
            "tars": tars_stamp(data),
        },
    )


def _is_there(path: Path, identity: dict[str, Any]) -> bool:
    """Return whether a file holds these features; says why not, if it holds others."""
    arrays: dict[str, np.ndarray] | None = None
    if os.path.lexists(path):
        with set_aside_if_damaged(path):
            arrays = read_npz_all(path)
    if arrays is None:
        return False
    kept = arrays.get("identity")
    reasons = differences({} if kept is None else _parsed(str(kept)), identity)
    if reasons:
        log.info("not reused: %s of %s: %s", path, when(path), "; ".join(reasons))
    return not reasons


def _parsed(identity: str) -> dict[str, Any]:
    """Parse a kept identity; one that is damaged is that of nothing."""
    try:
        record = parse_json(identity.encode(errors="replace"))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _check_others(folder: Path, written: set[Path], model: str) -> None:
    """Look at the files of a folder that are not of the tasks which are asked for."""
    others = sorted(set(folder.glob("*.npz")) - written) if folder.is_dir() else []
    foreign = [path.name for path in others if str(read_npz_all(path).get(MODEL_ARRAY)) != model]
    if foreign:
        raise InputError(
            f"{folder} holds features of another model ({', '.join(foreign[:3])}), which a "
            "selector would read together with those of this one. Delete them, or name another "
            "folder or feature set."
        )
    if others:
        names = ", ".join(path.name for path in others[:3])
        log.info(
            "%s also holds %s, which a selector that reads the folder reads, too", folder, names
        )


def _arrays(
    data: TaskData, rows: np.ndarray, image_features: ImageFeatures, texts: TaskTexts
) -> dict[str, np.ndarray]:
    for message in image_features.faults.values():
        raise InputError(message)
    task = data.task
    arrays = {"img": image_features.features[np.searchsorted(rows, data.images)].astype(np.float16)}
    if task.has_classes:
        classes = texts.classifier(task.classnames, task.templates).T
        arrays["class_txt"] = classes.half().cpu().numpy()
    else:
        features, places = texts.distinct([captions[0] for captions in data.samples.captions])
        arrays["txt"] = features[places].half().cpu().numpy()
    return arrays
