"""Kinds by name: those built in, and those of other distributions through a real entry point."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from torch import Tensor

from siftclip.errors import InputError, ParameterError
from siftclip.eval.identities import task_identity
from siftclip.eval.probes.probe_scores import ProbeSettings
from siftclip.eval.tasks.kinds import registry
from siftclip.eval.tasks.kinds.association import Association
from siftclip.eval.tasks.kinds.base import TaskKind, TextFeatures
from siftclip.eval.tasks.kinds.classification import Classification
from siftclip.eval.tasks.kinds.registry import BUILT_IN, find_kind, offered
from siftclip.eval.tasks.kinds.values import Label, Task, TaskSamples, TaskScores
from siftclip.eval.tasks.preparation import prepare_tasks
from siftclip.eval.tasks.samples import read_samples
from siftclip.eval.tasks.task import find_tasks, read_task

MODULE = """
from siftclip.eval import Label, TaskKind, TaskScores
from siftclip.eval.tasks.kinds.classification import Classification

class Lengths(TaskKind):
    name = "lengths"
    suffix = "txt"
    main_metric = "length_acc"

    def read_label(self, data, task, images):
        return Label(value=len(data))

    def score(self, samples, images, texts):
        return TaskScores.of_means({"length_acc": samples.labels % FACTOR == 0})

FACTOR = 2

class Mine(Classification):
    name = "mine"

class Retrieval(Lengths):
    name = "retrieval"

class WithSize(Lengths):
    def __init__(self, size):
        pass

class TwoImages(Lengths):
    images = "two"

class NoSuffix(TaskKind):
    name, main_metric = "lengths", "length_acc"

class NoScore(TaskKind):
    name, suffix, main_metric = "lengths", "txt", "length_acc"

class NoKind:
    pass
"""

Install = Callable[..., Path]
MakeTask = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """`install("name = module:object", ..., distribution="thirdparty")`: as pip would."""

    def make(*points: str, distribution: str = "thirdparty", text: str = MODULE) -> Path:
        site = tmp_path / distribution
        info = site / f"{distribution}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1\n")
        lines = "\n".join((f"[{registry.GROUP}]", *points))
        (info / "entry_points.txt").write_text(lines + "\n")
        module = site / f"{distribution}_kinds.py"
        module.write_text(text)
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, module.stem, raising=False)
        return module

    return make


def test_the_built_in_kinds() -> None:
    assert {name: kind.main_metric for name, kind in BUILT_IN.items()} == {
        "classification": "acc1",
        "multilabel": "mean_average_precision",
        "retrieval": "mean_recall@1",
        "image_caption_selection": "text_acc",
        "association": "jaccard_score_10-12",
    }
    assert all(find_kind(name) is kind for name, kind in BUILT_IN.items())
    assert isinstance(find_kind("association"), Association)


def test_a_kind_of_a_plug_in_is_found(
    install: Install, tmp_path: Path, make_task: MakeTask
) -> None:
    install("lengths = thirdparty_kinds:Lengths")
    assert type(find_kind("lengths")).__name__ == "Lengths"
    members = [[("png", b""), ("txt", b"x" * i)] for i in range(4)]
    task = read_task(make_task(tmp_path / "wds_own", "lengths", members=members))
    assert (task.kind, task.main_metric, task.has_classes) == ("lengths", "length_acc", False)
    (data,) = prepare_tasks([task]).data
    assert data.samples.require_labels().tolist() == [0, 1, 2, 3]


def test_a_plug_in_with_classes_and_one_class_an_image_may_be_probed(
    install: Install, tmp_path: Path, make_task: MakeTask
) -> None:
    install("mine = thirdparty_kinds:Mine")
    members = [[("png", b""), ("cls", b"1")]]
    root = make_task(tmp_path / "wds_own", "mine", members=members, shards=1)
    (root / "classnames.txt").write_text("cat\ndog\n")
    (root / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    task = read_task(root)
    assert task.classnames == ("cat", "dog")
    prepared = prepare_tasks([replace(task, protocol="linear_probe")])
    assert "must have the split 'train'" in prepared.failures[0].message  # no refusal of the kind


def test_an_unknown_kind_says_what_there_is_and_how_one_is_added(
    install: Install, tmp_path: Path, make_task: MakeTask
) -> None:
    install("lengths = thirdparty_kinds:Lengths")
    root = make_task(tmp_path / "tasks" / "wds_own", "thirdparty_kinds:Lengths")
    known = r"\['classification', .*'association', 'lengths'\]"
    message = rf"dataset_type.txt must say one of {known}. It says 'thirdparty_kinds:lengths'. "
    message += r"Another kind is added .* in the group 'siftclip.task_kinds'"
    with pytest.raises(InputError, match=message):
        read_task(root)
    assert "thirdparty_kinds" not in sys.modules
    assert [*find_tasks(root.parent).damaged] == ["own"]
    with pytest.raises(ParameterError, match=rf"^kind must say one of {known}. Got 'width'"):
        find_kind("width")


def test_nothing_that_is_not_asked_for_is_imported(install: Install, task_root: Path) -> None:
    install("lengths = thirdparty_kinds:Lengths")
    assert len(find_tasks(task_root).complete()) == 6
    assert "thirdparty_kinds" not in sys.modules


def test_no_plug_in_takes_the_place_of_a_built_in_kind(install: Install) -> None:
    install("retrieval = thirdparty_kinds:Retrieval")
    assert find_kind("retrieval") is BUILT_IN["retrieval"]
    assert "thirdparty_kinds" not in sys.modules


def test_two_plug_ins_of_one_name_are_refused(install: Install) -> None:
    install("lengths = thirdparty_kinds:Lengths")
    install("lengths = fourthparty_kinds:Lengths", distribution="fourthparty")
    with pytest.raises(InputError, match=r"called 'lengths': \w+_kinds:Lengths and \w+_kinds"):
        find_kind("lengths")


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ("lengths = no_such_module:Lengths", "cannot be imported: .*no_such_module"),
        ("lengths = thirdparty_kinds:Missing", "cannot be imported: .*Missing"),
        ("lengths = thirdparty_kinds:NoKind", "must be a subclass of siftclip.eval.TaskKind"),
        ("lengths = thirdparty_kinds:FACTOR", "must be a subclass of siftclip.eval.TaskKind"),
        ("lengths = thirdparty_kinds:WithSize", "cannot be built without arguments: .*size"),
        ("lengths = thirdparty_kinds:NoSuffix", "must set suffix, as texts"),
        ("lengths = thirdparty_kinds:NoScore", "cannot be built without arguments: .*abstract"),
        ("lengths = thirdparty_kinds:Mine", "must have this name. Its name is 'mine'"),
    ],
)
def test_a_broken_plug_in_is_named(install: Install, point: str, message: str) -> None:
    install(point)
    with pytest.raises(InputError, match=f"^The plug-in 'lengths' .*{message}"):
        find_kind("lengths")


def test_images_are_one_of_three_choices(install: Install) -> None:
    install("lengths = thirdparty_kinds:TwoImages")
    with pytest.raises(ParameterError, match=r"^TwoImages: images must be one of one, numbered"):
        find_kind("lengths")


def test_a_module_that_raises_is_a_failure_of_the_task(
    install: Install, tmp_path: Path, make_task: MakeTask
) -> None:
    install("lengths = thirdparty_kinds:Lengths", text="raise RuntimeError('no licence')")
    root = make_task(tmp_path / "tasks" / "wds_own", "lengths").parent
    make_task(root / "wds_things")
    found = find_tasks(root)
    assert [task.name for task in found.tasks] == ["things"]
    assert found.damaged["own"].endswith("cannot be imported: no licence.")


def test_an_offered_kind_is_known_inside_alone() -> None:
    class Other(Classification):
        name = "other"

    with offered(Other()):
        assert isinstance(find_kind("other"), Other)
    with pytest.raises(InputError, match="must say one of"):
        find_kind("other")


def test_the_code_of_a_plug_in_is_part_of_its_tasks_identity(
    install: Install, tmp_path: Path, make_task: MakeTask
) -> None:
    module = install("lengths = thirdparty_kinds:Lengths")
    members = [[("png", b""), ("txt", b"x" * i)] for i in range(4)]
    (data,) = prepare_tasks(
        [read_task(make_task(tmp_path / "wds_own", "lengths", members=members))]
    ).data

    def identity() -> str:
        return task_identity(data, ProbeSettings())

    first = identity()
    assert identity() == first
    time.sleep(0.02)  # the clock of a file system is coarse
    module.write_text(MODULE.replace("FACTOR = 2", "FACTOR = 3"))
    os.utime(module)
    sys.modules.pop(module.stem)
    importlib.invalidate_caches()
    second = identity()
    assert second != first
    built_in = replace(data, task=replace(data.task, kind="retrieval"))
    assert task_identity(built_in, ProbeSettings()) not in (first, second)


def test_a_kind_must_have_labels_and_scores() -> None:
    with pytest.raises(TypeError, match="abstract"):
        TaskKind()  # type: ignore[abstract]


class Given(TaskKind):
    """Labels are whatever `labels` says of the sample's digit; the reader must refuse some."""

    name: ClassVar[str] = "given"
    suffix: ClassVar[str] = "txt"
    main_metric: ClassVar[str] = "acc"
    labels: ClassVar[list[Label]] = []

    def read_label(self, data: bytes, task: Task, images: int) -> Label:
        return self.labels[int(data)]

    def score(self, samples: TaskSamples, images: Tensor, texts: TextFeatures) -> TaskScores:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([Label(value=np.ones(2)), Label(value=np.ones(3))], r"numbers of one shape.*\(2,\), \(3,"),
        ([Label(value=np.ones(2)), Label(value=1)], r"numbers of one shape.*\[\(\), \(2,\)\]"),
        ([Label(value="a"), Label(value="b")], "the first is 'a'"),  # type: ignore[arg-type]
        ([Label(value={}), Label(value={})], "the first is {}"),  # type: ignore[arg-type]
        ([Label(value=1), Label()], "must have a value, or none. 1 of 2 have"),
        ([Label(captions=("a",)), Label()], "must have captions, or none. 1 of 2 have"),
        ([Label(associated=np.ones(1, bool)), Label()], "must have associated images, or none"),
    ],
)
def test_labels_that_do_not_go_together(
    labels: list[Label],
    message: str,
    tmp_path: Path,
    make_task: MakeTask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Given, "labels", labels)
    members = [[("png", b""), ("txt", b"%d" % number)] for number in range(2)]
    root = make_task(tmp_path / "wds_own", "given", members=members)
    with offered(Given()), pytest.raises(InputError, match=message):
        read_samples(read_task(root))


def test_what_a_kind_says_of_a_label_is_told_with_the_place(
    tmp_path: Path, make_task: MakeTask
) -> None:
    members = [[("png", b""), ("txt", b"x")]]
    root = make_task(tmp_path / "wds_own", "given", members=members, shards=1)
    with offered(Given()), pytest.raises(InputError, match=r"0\.tar: s0000: invalid literal"):
        read_samples(read_task(root))
