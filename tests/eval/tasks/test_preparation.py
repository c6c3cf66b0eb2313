from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from siftclip.errors import InputError
from siftclip.eval.tasks import preparation
from siftclip.eval.tasks.images import read_images
from siftclip.eval.tasks.kinds.values import Protocol, Task, TaskSamples
from siftclip.eval.tasks.preparation import PreparedTasks, TaskData, prepare_tasks
from siftclip.eval.tasks.samples import read_samples
from siftclip.eval.tasks.task import find_tasks

MakeTask = Callable[..., Path]


def names_of(groups: list[list[TaskData]]) -> list[list[str]]:
    return [[one.task.name for one in group] for group in groups]


def with_rows(rows: dict[str, list[int]], one: TaskData) -> PreparedTasks:
    """Tasks whose images are these rows of a table; nothing else of them matters here."""
    prepared = prepare_tasks([one.task])
    assert prepared.table is not None
    places = np.zeros((1 + max(max(numbers) for numbers in rows.values()), 3), dtype=np.int64)
    data = [
        replace(one, task=replace(one.task, name=name), images=np.asarray(numbers))
        for name, numbers in rows.items()
    ]
    return replace(prepared, data=tuple(data), table=replace(prepared.table, places=places))


def test_groups_are_connected_by_shared_images(task_root: Path) -> None:
    (few,) = prepare_tasks(find_tasks(task_root, ["few"]).tasks).data
    cases: list[tuple[dict[str, list[int]], list[list[str]]]] = [
        ({"a": [0], "b": [1], "c": [2]}, [["a"], ["b"], ["c"]]),
        ({"a": [0, 1], "b": [2], "c": [1, 3]}, [["a", "c"], ["b"]]),
        ({"a": [0], "b": [1], "c": [0, 1]}, [["a", "b", "c"]]),  # joined by a third
        ({"a": [0], "b": [1], "c": [2], "d": [2, 1], "e": [4]}, [["a"], ["b", "c", "d"], ["e"]]),
        ({"a": [0], "b": [3], "c": [3, 0], "d": [1], "e": [1]}, [["a", "b", "c"], ["d", "e"]]),
        ({"a": [0, 0]}, [["a"]]),
    ]
    for rows, expected in cases:
        assert names_of(with_rows(rows, few).groups()) == expected


def test_groups_equal_the_components_of_a_graph(task_root: Path) -> None:
    networkx = pytest.importorskip("networkx")
    (few,) = prepare_tasks(find_tasks(task_root, ["few"]).tasks).data
    generator = np.random.default_rng(0)
    for _ in range(30):
        rows = {str(i): generator.integers(0, 25, 3).tolist() for i in range(9)}
        graph = networkx.Graph([(name, row) for name, mine in rows.items() for row in mine])
        parts = [
            sorted(n for n in part if n in rows) for part in networkx.connected_components(graph)
        ]
        found = names_of(with_rows(rows, few).groups())
        assert found == sorted(parts, key=lambda part: part[0])


def test_images_of_each_task_are_its_own(task_root: Path) -> None:
    prepared = prepare_tasks(find_tasks(task_root).complete())
    assert prepared.failures == ()
    assert prepared.table is not None
    contents = list(read_images(prepared.table))
    for one in prepared.data:
        for row, (tar, start, size) in zip(one.images, one.samples.places.tolist(), strict=True):
            assert one.task.shards[tar].read_bytes()[start : start + size] == contents[row]
        assert one.rows().tolist() == sorted(set(one.images.tolist()))
    assert len(prepared.without({"few", "cues"}).data) == 4


def test_a_damaged_task_is_a_failure(task_root: Path, tmp_path: Path, make_task: MakeTask) -> None:
    make_task(tmp_path / "bad", members=[[("png", b"?"), ("cls", b"9")]], shards=1)
    gone = make_task(tmp_path / "gone")
    tasks = [*find_tasks(tmp_path).tasks, *find_tasks(task_root, ["few"]).tasks]
    (gone / "test" / "1.tar").unlink()
    prepared = prepare_tasks(tasks)
    assert [one.task.name for one in prepared.data] == ["few"]
    assert [failure.key for failure in prepared.failures] == ["bad", "gone"]
    assert "s0000: the label must be" in prepared.failures[0].message
    assert "1.tar" in prepared.failures[1].message
    nothing = prepare_tasks(tasks[:2])
    assert (nothing.data, nothing.table, len(nothing.failures)) == ((), None, 2)
    assert nothing.groups() == []
    assert prepare_tasks([]) == PreparedTasks(data=(), table=None, failures=())


def test_a_name_may_be_there_once(task_root: Path) -> None:
    tasks = find_tasks(task_root, ["few", "things"]).complete()
    with pytest.raises(InputError, match=r"names of their own. \['few'\] are there more than once"):
        prepare_tasks([*tasks, tasks[0]])


def under(task: Task, protocol: Protocol, name: str) -> Task:
    return replace(task, name=name, protocol=protocol, shots=2 if protocol == "few_shot" else None)


def test_protocols_of_one_task_read_its_tars_once(
    tmp_path: Path, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_task(tmp_path / "x")
    make_task(tmp_path / "y", samples=20, split="train")
    (tmp_path / "y" / "train").rename(tmp_path / "x" / "train")
    (task,) = find_tasks(tmp_path, ["x"]).complete()
    tasks = [task, under(task, "linear_probe", "linear"), under(task, "few_shot", "few")]
    splits: list[str] = []

    def spy(task: Task, *, max_samples: int | None) -> TaskSamples:
        splits.append(task.split)
        return read_samples(task, max_samples=max_samples)

    monkeypatch.setattr(preparation, "read_samples", spy)
    prepared = prepare_tasks(tasks, max_samples=5)
    assert sorted(splits) == ["test", "train"]
    zero_shot, linear, few = prepared.data
    assert [one.samples.task.name for one in prepared.data] == ["x", "linear", "few"]
    assert zero_shot.train is None
    assert zero_shot.train_images is None
    for one in (linear, few):
        assert one.images.tolist() == zero_shot.images.tolist()
        assert len(one.samples) == 5  # the limit is of the test split alone
        assert one.train is not None
        assert one.train_images is not None
        assert len(one.train) == len(one.train_images) == 20
        assert one.train.task.split == "train"
    assert names_of(prepared.groups()) == [["x", "linear", "few"]]


def test_probes_need_one_class_an_image_and_a_train_split(task_root: Path) -> None:
    few, captions = find_tasks(task_root, ["few", "captions"]).complete()
    tasks = [under(few, "linear_probe", "a"), under(captions, "few_shot", "b")]
    a, b = prepare_tasks(tasks, train_split="part").failures
    assert "must have the split 'part' for a linear_probe" in a.message
    assert (
        "a few_shot needs a task with one class an image. This is a task of the kind retri"
        in b.message
    )
