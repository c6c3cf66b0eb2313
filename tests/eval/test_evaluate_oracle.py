"""Metrics from end to end are those of clip_benchmark's own functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import (
    image_caption_selection,
    zeroshot_classification,
    zeroshot_retrieval,
)

from siftclip.datamodules.models.load import ClipModel
from siftclip.datamodules.pool.reader import decode_image
from siftclip.eval.evaluate import EvalOptions, evaluate_tasks
from siftclip.eval.tasks.kinds.values import Task, TaskSamples
from siftclip.eval.tasks.samples import read_samples, tar_of
from siftclip.eval.tasks.task import find_tasks

MakeTask = Callable[..., Path]


class OracleLoader:
    """Batches of a task as clip_benchmark's functions take them."""

    def __init__(self, samples: TaskSamples, clip: ClipModel) -> None:
        self.dataset = samples.task  # whose class names it looks for
        counts = np.diff(samples.first_image)
        images = []
        for image, (_, offset, size) in enumerate(samples.places.tolist()):
            data = tar_of(samples, image).read_bytes()[offset : offset + size]
            images.append(clip.eval_transform(decode_image(data, 10**6)))
        self.images = torch.stack(images)
        self.answers: Any = [list(captions) for captions in samples.captions]
        if samples.task.kind == "image_caption_selection":
            self.images = self.images.unflatten(0, (len(samples), int(counts[0])))
        if samples.labels is not None:
            self.answers = torch.from_numpy(samples.labels)
            self.dataset = type("Dataset", (), {"classes": list(samples.task.classnames)})  # type: ignore[assignment]

    def __iter__(self) -> Iterator[tuple[torch.Tensor, Any]]:
        for start in range(0, len(self.images), 5):
            yield self.images[start : start + 5], self.answers[start : start + 5]


def expected_metrics(task: Task, clip: ClipModel, fixed: ModuleType) -> dict[str, float]:
    loader = OracleLoader(read_samples(task), clip)
    arguments = (clip.model.eval(), loader, clip.tokenizer)
    with fixed.repaired():
        if task.kind == "retrieval":
            found = zeroshot_retrieval.evaluate(
                *arguments, "cpu", amp=False, recall_k_list=[1, 5, 10]
            )
            for k in (1, 5):
                both = [found[f"{what}_retrieval_recall@{k}"] for what in ("text", "image")]
                found[f"mean_recall@{k}"] = sum(both) / 2
            return found
        if task.kind == "image_caption_selection":
            return image_caption_selection.evaluate(*arguments, "cpu", amp=False)
        classes, templates = list(task.classnames), list(task.templates)
        return zeroshot_classification.evaluate(*arguments, classes, templates, "cpu", amp=False)


def test_metrics_are_those_of_clip_benchmark(
    tmp_path: Path,
    task_root: Path,
    make_task: MakeTask,
    make_image: Any,
    clip: ClipModel,
    fixed_clip_benchmark: ModuleType,
) -> None:
    """All kinds that it has. Captions that are equal are a tie, and its order is topk's, so they
    differ here."""
    members = [
        [("png", make_image(100 + i)), ("txt", f"picture {i}\nalso {i}".encode())]
        for i in range(13)
    ]
    make_task(tmp_path / "wds_captions", "retrieval", members=members, shards=1)
    tasks = find_tasks(task_root).complete()
    others = [task for task in tasks if task.kind not in ("association", "retrieval")]
    chosen = [*others, *find_tasks(tmp_path).complete()]
    options = EvalOptions(progress=False, resamples=0, batch_size=5)
    results = evaluate_tasks(clip, chosen, options=options).results
    assert [result.key for result in results] == [task.name for task in chosen]
    for task, result in zip(chosen, results, strict=True):
        metrics = dict(result.metrics)
        main = metrics.pop("main_metric")
        assert main == metrics[str(result.main_metric_name)]
        expected = {
            name: None if math.isnan(value) else value
            for name, value in expected_metrics(task, clip, fixed_clip_benchmark).items()
        }
        assert metrics == pytest.approx(expected, abs=1e-6)
