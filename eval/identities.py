"""What results are known by: the model, the task and how it is scored, and each unit of it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from siftclip.datamodules.identity.code_identity import code_identity
from siftclip.datamodules.models.load import ClipModel
from siftclip.datamodules.models.record import fingerprint
from siftclip.eval.probes.probe_scores import IN_TRAIN, ProbeSettings
from siftclip.eval.tasks.images import content_id
from siftclip.eval.tasks.kinds.registry import BUILT_IN, find_kind
from siftclip.eval.tasks.kinds.values import TaskSamples
from siftclip.eval.tasks.preparation import TaskData
from siftclip.files import file_stamp, identity_hash
from siftclip.hashing import mix64


def model_identity(clip: ClipModel, precision: str) -> str:
    """Return what names results: the model's fingerprint, and the precision if it is not fp32."""
    weights = fingerprint(clip)
    if precision == "fp32":
        return weights
    return hashlib.sha256(f"{weights} {precision}".encode()).hexdigest()


def task_identity(data: TaskData, probe: ProbeSettings) -> str:
    """Return what names results besides the model: SHA-256 of the samples and how they are scored.

    Of images it covers keys and sizes, not the bytes; of a plug-in's kind of task also its code.
    """
    task = data.task
    digest = hashlib.sha256()
    asked: list[Any] = [task.kind, task.special, task.main_metric, task.classnames, task.templates]
    kind = find_kind(task.kind)
    if BUILT_IN.get(task.kind) is not kind:
        asked.append(code_identity([type(kind)]))
    if task.protocol != "zero_shot":
        asked += [task.protocol, task.shots, repr(probe), IN_TRAIN]
    digest.update(json.dumps(asked).encode())
    for samples in (data.samples, data.train):
        if samples is None:
            continue
        digest.update(json.dumps([samples.keys.tolist(), samples.captions]).encode())
        for array in (
            samples.places[:, 2],
            samples.first_image,
            samples.labels,
            samples.metadata,
            *samples.associations,
        ):
            digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def tars_stamp(data: TaskData) -> str:
    """Return a stamp of a task's tars; of their images `task_identity` knows only the sizes."""
    sets = [samples.task.shards for samples in (data.samples, data.train) if samples is not None]
    return identity_hash({"tars": [file_stamp(path) for shards in sets for path in shards]})


def unit_ids(samples: TaskSamples, ids: np.ndarray) -> np.ndarray:
    """Return what names each sample when test sets are resampled, uint64 [n].

    A sample of one image is that image. One of several is all of them with their texts.

    Args:
        samples: n of them, with m images.
        ids: uint64 [m], of the images.
    """
    counts = np.diff(samples.first_image)
    if (counts == 1).all():
        return ids.copy()
    units = np.empty(len(samples), dtype=np.uint64)
    for row, (start, stop) in enumerate(
        zip(samples.first_image[:-1].tolist(), samples.first_image[1:].tolist(), strict=True)
    ):
        text = "\n".join(samples.captions[row]).encode()
        unit = np.asarray([content_id(text)], dtype=np.uint64)
        for image in ids[start:stop]:
            unit = mix64(unit ^ image)
        units[row] = unit[0]
    return units
