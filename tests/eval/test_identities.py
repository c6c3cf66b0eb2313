"""What results are known by changes with all that they depend on, and with nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from siftclip.eval.identities import task_identity, unit_ids
from siftclip.eval.probes.probe_scores import ProbeSettings
from siftclip.eval.tasks.kinds.values import Task, TaskSamples
from siftclip.eval.tasks.preparation import TaskData

PROBE = ProbeSettings()


def make_data(**changes: Any) -> TaskData:
    """A task with everything that any kind of task has, as fresh arrays."""
    task = Task(
        name="t",
        title="T",
        root=Path("tasks/t"),
        split="test",
        kind="classification",
        main_metric="acc1",
        shards=(Path("tasks/t/0.tar"),),
        classnames=("cat", "dog"),
        templates=("a {c}",),
    )
    samples = TaskSamples(
        task=task,
        keys=np.array(["a", "b", "c"]),
        places=np.array([[0, 512, 70], [0, 2048, 80], [0, 4096, 90], [0, 8192, 95]]),
        first_image=np.array([0, 1, 2, 4]),
        labels=np.array([0, 1, 1]),
        captions=(("one",), ("two",), ("three", "four")),
        associations=(np.array([True, False]), np.array([False, False]), np.array([True, True])),
        metadata=np.array([[0, 1], [1, 1], [2, 0]]),
    )
    images = np.arange(4)
    data = TaskData(task=task, samples=samples, images=images, train=samples, train_images=images)
    return replace(data, **changes)


def identity(data: TaskData) -> str:
    return task_identity(data, PROBE)


def put(array: np.ndarray, value: Any, *at: int) -> np.ndarray:
    """A copy with another value at a place."""
    array = array.copy()
    array[at] = value
    return array


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {"keys": put(s.keys, "d", 2)},
        lambda s: {"places": put(s.places, 91, 2, 2)},
        lambda s: {"first_image": put(s.first_image, 3, 2)},
        lambda s: {"labels": put(s.labels, 0, 2)},
        lambda s: {"labels": None},
        lambda s: {"captions": (*s.captions[:2], ("three", "five"))},
        lambda s: {"associations": (*s.associations[:2], np.array([True, False]))},
        lambda s: {"metadata": put(s.metadata, 1, 2, 1)},
        lambda s: {"metadata": None},
    ],
)
@pytest.mark.parametrize("part", ["samples", "train"])
def test_all_that_is_known_of_the_samples_counts(
    part: str, change: Callable[[TaskSamples], dict[str, Any]]
) -> None:
    data = make_data()
    assert identity(make_data()) == identity(data)
    other = replace(data, **{part: replace(data.samples, **change(data.samples))})
    assert identity(other) != identity(data)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "multilabel"},
        {"special": "faces"},
        {"main_metric": "acc5"},
        {"classnames": ("cat", "cow")},
        {"templates": ("the {c}",)},
        {"protocol": "linear_probe"},
    ],
)
def test_how_a_task_is_scored_counts(changes: dict[str, Any]) -> None:
    data = make_data()
    assert identity(replace(data, task=replace(data.task, **changes))) != identity(data)


def test_where_a_task_lies_and_what_it_is_called_do_not_count() -> None:
    data = make_data()
    elsewhere = replace(data.task, name="u", title="U", root=Path("u"), shards=(Path("u/1.tar"),))
    moved = replace(data.samples, places=data.samples.places + np.array([1, 512, 0]))
    assert identity(replace(data, task=elsewhere, samples=moved)) == identity(data)


def test_the_probe_counts_where_one_is_fitted() -> None:
    other = replace(PROBE, few_shot_seeds=(5,))
    zero_shot = make_data()
    assert task_identity(zero_shot, other) == identity(zero_shot)
    found = set()
    for protocol, shots in (("linear_probe", None), ("few_shot", 1), ("few_shot", 2)):
        fitted = replace(zero_shot, task=replace(zero_shot.task, protocol=protocol, shots=shots))
        found |= {task_identity(fitted, probe) for probe in (PROBE, other)}
    assert len(found) == 6


def test_a_sample_of_one_image_is_that_image() -> None:
    samples = make_data().samples
    ids = np.array([11, 12, 13, 14], dtype=np.uint64)
    single = samples.take(np.array([0, 1]))
    assert unit_ids(single, ids[:2]).tolist() == [11, 12]
    units = unit_ids(samples, ids)
    assert len({*units.tolist(), *ids.tolist()}) == 7
    assert unit_ids(samples, put(ids, 15, 3)).tolist()[:2] == units.tolist()[:2]
    assert unit_ids(samples, put(ids, 15, 3))[2] != units[2]
    told = replace(samples, captions=(*samples.captions[:2], ("three",)))
    assert unit_ids(told, ids)[2] != units[2]
