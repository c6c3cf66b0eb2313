from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from siftclip.errors import InputError
from siftclip.eval.tasks.kinds.registry import BUILT_IN
from siftclip.eval.tasks.task import (
    CLASSNAMES_FILE,
    NSHARDS_FILE,
    TEMPLATES_FILE,
    TEST_SPLIT,
    TYPE_FILE,
    find_tasks,
    read_task,
    require_names,
    with_texts,
)

MakeTask = Callable[..., Path]


def test_finds_all_tasks_sorted_by_name(task_root: Path) -> None:
    found = find_tasks(task_root)
    assert (found.missing, found.damaged) == ((), {})
    assert found.complete() == list(found.tasks)
    tasks = {task.name: (task.kind, task.main_metric) for task in found.tasks}
    assert tasks == {
        "captions": ("retrieval", "mean_recall@1"),
        "cues": ("association", "jaccard_score_10-12"),
        "few": ("classification", "acc1"),
        "many_labels": ("multilabel", "mean_average_precision"),
        "pairs": ("image_caption_selection", "text_acc"),
        "things": ("classification", "acc1"),
    }
    assert [*tasks] == sorted(tasks)
    things = found.tasks[-1]
    assert (things.title, things.split, things.family) == ("things", "test", "own")
    assert things.shards == tuple(task_root / "wds_things/test" / f"{i}.tar" for i in (0, 1))
    assert things.classnames == tuple(f"thing {i}" for i in range(6))
    assert things.templates == ("a photo of a {c}", "the {c}")
    assert found.tasks[0].classnames == found.tasks[0].templates == ()


def names_in(root: Path, names: list[str] | None = None) -> list[str]:
    return [task.name for task in find_tasks(root, names).complete()]


def test_names_choose_and_order(task_root: Path) -> None:
    assert names_in(task_root, ["things", "few"]) == ["things", "few"]
    with pytest.raises(InputError, match=r"each task once. Got \['few'\] more than once"):
        find_tasks(task_root, ["few", "things", "few"])
    assert [task.name for task in find_tasks(task_root, "few").tasks] == ["few"]
    wrong: Any
    for wrong in (3, True, {"few": 1}, ["few", 3], ["few", " "], b"few"):
        with pytest.raises(InputError, match=r"^names must be a name, or a list") as e:
            find_tasks(task_root, wrong)
        assert repr(wrong) in str(e.value)
    with pytest.raises(InputError, match=r"^names must name at least one task, or be null"):
        find_tasks(task_root, [])


def test_names() -> None:
    assert require_names("x", "mnist") == ["mnist"]
    assert require_names("x", ("a", "b")) == ["a", "b"]
    assert require_names("x", []) == []


def test_a_task_folder_is_a_root_of_one_task(
    task_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert names_in(task_root / "wds_few") == ["few"]
    monkeypatch.chdir(task_root / "wds_few")
    assert names_in(Path(".")) == ["few"]


def test_folders_are_looked_through(tmp_path: Path, make_task: MakeTask) -> None:
    make_task(tmp_path / "vtab" / "deep" / "wds_a")
    make_task(tmp_path / "plain")
    make_task(tmp_path / "plain" / "wds_inside")  # of a task's folder nothing is looked at
    make_task(tmp_path / ".hidden" / "wds_b")
    make_task(tmp_path / "elsewhere" / ".wds_c")
    (tmp_path / "vtab" / "again").symlink_to(tmp_path)  # would never end
    assert names_in(tmp_path) == ["a", "plain"]
    (tmp_path / "wds_linked").symlink_to(tmp_path / "plain")
    assert names_in(tmp_path) == ["a", "linked", "plain"]


def test_known_tasks_have_the_names_of_their_tables(tmp_path: Path, make_task: MakeTask) -> None:
    make_task(tmp_path / "wds_vtab-dtd_test")
    make_task(tmp_path / "wds_geode_test")
    make_task(tmp_path / "wds_misc-winogavil_test", "association")
    make_task(tmp_path / "wds_wilds-fmow_test")
    tasks = {task.name: task for task in find_tasks(tmp_path).complete()}
    assert sorted(tasks) == ["fairness/geode", "misc/winogavil", "vtab/dtd", "wilds/fmow"]
    dtd, fmow = tasks["vtab/dtd"], tasks["wilds/fmow"]
    assert (dtd.title, dtd.main_metric, dtd.special) == ("Describable Textures", "acc1", None)
    assert (dtd.family, fmow.family) == ("vtab", "wilds")
    assert (fmow.main_metric, fmow.special) == ("acc_worst_region", "fmow")
    assert tasks["fairness/geode"].main_metric == "acc_wg"
    assert tasks["misc/winogavil"].main_metric == "jaccard_score_10-12"


def test_a_known_name_of_another_kind(tmp_path: Path, make_task: MakeTask) -> None:
    task = read_task(make_task(tmp_path / "wds_wilds-fmow_test", "retrieval"))
    assert (task.name, task.title) == ("wilds/fmow", "wilds/fmow")
    assert (task.main_metric, task.special, task.family) == ("mean_recall@1", None, "own")


def test_without_a_type_a_task_is_classification(tmp_path: Path, make_task: MakeTask) -> None:
    root = make_task(tmp_path / "plain")
    (root / "dataset_type.txt").unlink()
    assert read_task(root).kind == "classification"
    assert names_in(tmp_path) == ["plain"]


def test_another_split(tmp_path: Path, make_task: MakeTask) -> None:
    root = make_task(tmp_path / "wds_x", split="val")
    found = find_tasks(tmp_path, split="val").complete()
    assert found[0].shards[0] == root / "val" / "0.tar"


def test_damaged_folders(tmp_path: Path, make_task: MakeTask) -> None:
    """Those that were chosen are told of, those that were not are not looked at."""
    make_task(tmp_path / "wds_good")
    (tmp_path / "wds_empty").mkdir()
    assert names_in(tmp_path, ["good"]) == ["good"]
    found = find_tasks(tmp_path)
    assert [task.name for task in found.tasks] == ["good"]
    assert [*found.damaged] == ["empty"]
    message = r"wds_empty must have the folder 'test' with nshards\.txt and tars\. It has no fold"
    assert re.search(message, found.damaged["empty"])
    with pytest.raises(InputError, match=message):
        found.complete()


def test_unknown_name_lists_the_known(task_root: Path) -> None:
    with pytest.raises(InputError, match=r"\['captions', 'cues', 'few', .*Got 'imagenet1k'"):
        find_tasks(task_root, ["few", "imagenet1k"])


def test_a_suite_may_be_there_in_part(task_root: Path) -> None:
    found = find_tasks(task_root, ["imagenet1k", "few", "vtab/dtd"], may_miss=True)
    assert found.missing == ("imagenet1k", "vtab/dtd")
    assert [task.name for task in found.tasks] == ["few"]
    with pytest.raises(InputError, match=r"are missing: \['imagenet1k', 'vtab/dtd'\]"):
        found.complete()


def test_no_task(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(InputError, match=re.escape(f"Got {str(tmp_path)!r}. There is neither.")):
        find_tasks(tmp_path)
    with pytest.raises(
        InputError, match=r"root must be a folder of tasks, or one task. Got .*nowhere"
    ):
        find_tasks(tmp_path / "nowhere")


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    listed = Path.iterdir

    def refuse(path: Path) -> Iterator[Path]:
        if path.name == "locked":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match=r"locked cannot be read: Permission denied"):
        find_tasks(tmp_path)


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [("wds_x", "x", "x"), ("wds_vtab-dtd_test", "sub/wds_vtab-dtd", "vtab/dtd")],
)
def test_two_folders_of_one_name(
    tmp_path: Path, make_task: MakeTask, first: str, second: str, name: str
) -> None:
    make_task(tmp_path / first)
    make_task(tmp_path / second)
    with pytest.raises(InputError, match=rf"{first} .*are both '{name}'|{second} .*'{name}'"):
        find_tasks(tmp_path).complete()


def test_other_class_names_and_templates(task_root: Path, tmp_path: Path) -> None:
    task = read_task(task_root / "wds_few")
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfred\nblue\ngreen\n")  # with a mark
    (tmp_path / "templates.txt").write_text("one {c}")
    other = with_texts(task, classnames=tmp_path / "names.txt")
    assert (other.classnames, other.templates) == (("red", "blue", "green"), task.templates)
    other = with_texts(task, templates=tmp_path / "templates.txt")
    assert (other.classnames, other.templates) == (task.classnames, ("one {c}",))
    (tmp_path / "names.txt").write_text("red\nblue")
    asked = r"^classnames\.few"
    with pytest.raises(InputError, match=rf"{asked} must have .* few. Got .*names\.txt.* It has 2"):
        with_texts(task, classnames=tmp_path / "names.txt")
    with pytest.raises(
        InputError, match=rf"{asked} must name a text file. .*no\.txt does not exist"
    ):
        with_texts(task, classnames=tmp_path / "no.txt")
    with pytest.raises(InputError, match=r"^templates\.few must name a text.* is not a file"):
        with_texts(task, templates=tmp_path)
    with pytest.raises(
        InputError, match=r"^templates\.few cannot be used. Got .*names\.txt, line 1: a templ"
    ):
        with_texts(task, templates=tmp_path / "names.txt")
    with pytest.raises(
        InputError, match=r"templates\.captions must be .* this one is of the kind retrieval"
    ):
        with_texts(read_task(task_root / "wds_captions"), templates=tmp_path / "templates.txt")


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
    (root / "test" / "1.tar").symlink_to(root / "gone.tar")
    with pytest.raises(InputError, match=r"1\.tar must be a tar. It is a link to nothing"):
        read_task(root)
    (root / "test" / "1.tar").unlink()
    (root / "test" / "1.tar").mkdir()
    with pytest.raises(InputError, match=r"1\.tar must be a tar. It is a folder"):
        read_task(root)


def test_a_tar_that_may_not_be_read(
    tmp_path: Path, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_task(tmp_path / "wds_x")
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "1.tar")  # of root not so
    with pytest.raises(InputError, match=r"1\.tar cannot be read: you lack the permission"):
        read_task(root)


def test_the_split_is_missing(tmp_path: Path, make_task: MakeTask) -> None:
    root = make_task(tmp_path / "wds_x", split="val")
    make_task(tmp_path / "wds_y", split="train")
    (root / "train").mkdir()
    with pytest.raises(InputError, match=r"wds_x must have the folder 'test' .*\['train', 'val'\]"):
        read_task(root)
    (root / "test").mkdir()
    with pytest.raises(
        InputError, match=r"test/nshards\.txt does not exist\. nshards\.txt holds the number of tar"
    ):
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
    with pytest.raises(InputError, match=r"'association'\]. It says 'detection'"):
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


def test_two_folders_of_a_task_matter_only_where_it_is_wanted(
    tmp_path: Path, make_task: MakeTask
) -> None:
    for name in ("wds_food101", "wds_food101_test", "wds_mine"):
        make_task(tmp_path / name)
    assert [task.name for task in find_tasks(tmp_path, ["mine"]).complete()] == ["mine"]
    found = find_tasks(tmp_path)
    assert [task.name for task in found.tasks] == ["mine"]
    assert list(found.damaged) == ["food101"]
    with pytest.raises(InputError, match=r"wds_food101 and .*wds_food101_test are both 'food101'"):
        found.complete()


def test_the_guide_has_the_layout_of_every_kind() -> None:
    guide = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for file in (TYPE_FILE, CLASSNAMES_FILE, TEMPLATES_FILE, f"{TEST_SPLIT}/{NSHARDS_FILE}"):
        assert file in guide
    for kind in BUILT_IN.values():
        (row,) = (line for line in guide.splitlines() if line.startswith(f"| `{kind.name}`"))
        assert f"`KEY.{kind.suffix}`" in row
        assert row.endswith(f"| `{kind.main_metric}` |")
        assert ("`KEY.0.png`" in row) == (kind.images != "one")
