from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from siftclip.eval.tasks import find_tasks, read_task
from siftclip.selectors.errors import InputError

MakeTask = Callable[..., Path]


def test_finds_all_tasks_sorted_by_name(task_root: Path) -> None:
    tasks = find_tasks(task_root)
    assert [(task.name, task.kind, task.main_metric) for task in tasks] == [
        ("captions", "retrieval", "mean_recall@1"),
        ("few", "classification", "acc1"),
        ("many_labels", "multilabel", "mean_average_precision"),
        ("things", "classification", "acc1"),
    ]
    things = tasks[-1]
    assert things.title == "things"
    assert things.split == "test"
    assert things.shards == tuple(task_root / "wds_things/test" / f"{i}.tar" for i in (0, 1))
    assert things.classnames == tuple(f"thing {i}" for i in range(6))
    assert things.templates == ("a photo of a {c}", "the {c}")
    assert tasks[0].classnames == tasks[0].templates == ()


def test_names_choose_and_order(task_root: Path) -> None:
    assert [t.name for t in find_tasks(task_root, ["things", "few"])] == ["things", "few"]


def test_a_task_folder_is_a_root_of_one_task(
    task_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [t.name for t in find_tasks(task_root / "wds_few")] == ["few"]
    monkeypatch.chdir(task_root / "wds_few")
    assert [t.name for t in find_tasks(Path("."))] == ["few"]


def test_without_a_type_a_task_is_classification(tmp_path: Path, make_task: MakeTask) -> None:
    root = make_task(tmp_path / "plain")
    (root / "dataset_type.txt").unlink()
    assert read_task(root).kind == "classification"
    assert [t.name for t in find_tasks(tmp_path)] == ["plain"]


def test_another_split(tmp_path: Path, make_task: MakeTask) -> None:
    root = make_task(tmp_path / "wds_x")
    (root / "test").rename(root / "val")
    assert find_tasks(tmp_path, split="val")[0].shards[0] == root / "val" / "0.tar"


def test_tasks_that_were_not_chosen_are_not_looked_at(tmp_path: Path, make_task: MakeTask) -> None:
    make_task(tmp_path / "wds_good")
    (tmp_path / "wds_empty").mkdir()
    assert [t.name for t in find_tasks(tmp_path, ["good"])] == ["good"]
    with pytest.raises(InputError, match=r"wds_empty/test/nshards\.txt does not exist"):
        find_tasks(tmp_path)


def test_unknown_name_lists_the_known(task_root: Path) -> None:
    with pytest.raises(InputError, match=r"\['captions', 'few', .*Got 'imagenet1k'"):
        find_tasks(task_root, ["few", "imagenet1k"])


def test_no_task(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(InputError, match=re.escape(f"There is neither in {tmp_path}")):
        find_tasks(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        find_tasks(tmp_path / "nowhere")


def test_two_folders_of_one_name(tmp_path: Path, make_task: MakeTask) -> None:
    make_task(tmp_path / "wds_x")
    make_task(tmp_path / "x")
    with pytest.raises(InputError, match=r"\['wds_x', 'x'\]"):
        find_tasks(tmp_path)


@pytest.mark.parametrize("content", ["", "two", "0", "-1", "1.5"])
def test_nshards_is_no_count(tmp_path: Path, make_task: MakeTask, content: str) -> None:
    root = make_task(tmp_path / "wds_x")
    (root / "test" / "nshards.txt").write_text(content)
    with pytest.raises(InputError, match=rf"nshards\.txt must hold .*It holds '{content}'"):
        read_task(root)


def test_a_tar_is_missing(tmp_path: Path, make_task: MakeTask) -> None:
    root = make_task(tmp_path / "wds_x", shards=3)
    (root / "test" / "1.tar").unlink()
    with pytest.raises(InputError, match=r"1\.tar does not exist, but .* there are 3 tars"):
        read_task(root)


@pytest.mark.parametrize("name", ["classnames.txt", "zeroshot_classification_templates.txt"])
def test_a_text_file_is_missing_or_damaged(tmp_path: Path, make_task: MakeTask, name: str) -> None:
    root = make_task(tmp_path / "wds_x")
    path = root / name
    path.write_bytes(b"\xff\xfe{c}")
    with pytest.raises(InputError, match=rf"{name} must be UTF-8"):
        read_task(root)
    path.write_text("{c}\n\n{c}")
    with pytest.raises(InputError, match=rf"{name} must not have empty lines.*Line 2"):
        read_task(root)
    path.write_text("")
    with pytest.raises(InputError, match=rf"{name} must not have empty lines.*Line 1"):
        read_task(root)
    path.unlink()
    with pytest.raises(InputError, match=rf"{name} does not exist"):
        read_task(root)


def test_unknown_type(tmp_path: Path, make_task: MakeTask) -> None:
    root = make_task(tmp_path / "wds_x")
    (root / "dataset_type.txt").write_text("detection")
    with pytest.raises(InputError, match=r"retrieval'\]. It says 'detection'"):
        read_task(root)


@pytest.mark.parametrize(
    "template",
    [
        "a photo",
        "a {c.__class__.__mro__}",
        "a {c} and {0}",
        "a {c[0]}",
        "a {c!r}",
        "a {c:>1000000000}",
        "a {{c}}",
        "a {c} {",
        "a {} of {c}",
    ],
)
def test_templates_are_never_more_than_the_name(
    tmp_path: Path, make_task: MakeTask, template: str
) -> None:
    root = make_task(tmp_path / "wds_x", templates=f"the {{c}}\n{template}")
    with pytest.raises(InputError, match=r"line 2: a template must contain \{c\}") as caught:
        read_task(root)
    assert repr(template) in str(caught.value)
