"""Zero-shot tasks on disk, in clip_benchmark's webdataset layout.

```
ROOT/<split>/nshards.txt   ROOT/classnames.txt                         one a line, index = label
ROOT/<split>/0.tar ...     ROOT/zeroshot_classification_templates.txt  one a line, contains {c}
ROOT/dataset_type.txt      absent or classification | multilabel | retrieval
members of the tars: key.{webp,png,jpg,jpeg} with key.cls (a number), key.npy (multi-hot) or
key.txt (one caption a line)
```
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from siftclip.selectors.errors import InputError

TaskKind = Literal["classification", "multilabel", "retrieval"]
MAIN_METRICS: dict[TaskKind, str] = {
    "classification": "acc1",
    "multilabel": "mean_average_precision",
    "retrieval": "mean_recall@1",
}

FOLDER_PREFIX = "wds_"
TYPE_FILE = "dataset_type.txt"
CLASSNAMES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
NSHARDS_FILE = "nshards.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task: where its samples are, and what is needed to turn a model's answers into metrics.

    A task with another title or main metric is made with `dataclasses.replace`.
    """

    name: str  # the name of the folder without `wds_`
    title: str  # the name to show
    root: Path
    split: str
    kind: TaskKind
    main_metric: str
    shards: tuple[Path, ...]
    classnames: tuple[str, ...]  # the index is the label; empty for retrieval
    templates: tuple[str, ...]  # each with {c}; empty for retrieval


def find_tasks(
    root: Path, names: Sequence[str] | None = None, *, split: str = "test"
) -> list[Task]:
    """The tasks in a folder of task folders, or the one task whose folder this is.

    Args:
        root: the folder.
        names: which tasks, in this order; None means all, sorted by name.
        split: the folder inside a task that holds the tars.

    Raises:
        InputError: there is no task, a name is unknown, or a file of a chosen task is missing or
            not as it must be. Tasks that were not chosen are not looked at.
    """
    if not root.is_dir():
        raise InputError(
            f"eval.root must be a folder of tasks, or one task. {root} is not a folder."
        )
    if _is_task_folder(root, split):
        folders = [root]
    else:
        folders = [
            folder
            for folder in sorted(root.iterdir())
            if folder.is_dir()
            and (folder.name.startswith(FOLDER_PREFIX) or _is_task_folder(folder, split))
        ]
    if not folders:
        raise InputError(
            f"eval.root must hold task folders named {FOLDER_PREFIX}<task>, or, if it is one task, "
            f"{split}/{NSHARDS_FILE}. There is neither in {root}."
        )
    by_name = {_task_name(folder): folder for folder in folders}
    if len(by_name) < len(folders):
        raise InputError(
            f"Tasks must differ in more than the prefix {FOLDER_PREFIX}. Got the folders "
            f"{[folder.name for folder in folders]} in {root}."
        )
    for name in names or ():
        if name not in by_name:
            raise InputError(
                f"eval.tasks must name tasks in {root}: {sorted(by_name)}. Got {name!r}."
            )
    return [
        read_task(by_name[name], split=split)
        for name in (sorted(by_name) if names is None else names)
    ]


def _task_name(folder: Path) -> str:
    return folder.absolute().name.removeprefix(FOLDER_PREFIX)


def _is_task_folder(folder: Path, split: str) -> bool:
    files = (TYPE_FILE, CLASSNAMES_FILE, TEMPLATES_FILE, f"{split}/{NSHARDS_FILE}")
    return any((folder / file).is_file() for file in files)


def read_task(root: Path, *, split: str = "test") -> Task:
    """Read the text files of a task folder and see that its tars are there.

    Raises:
        InputError: a file is missing or not as it must be.
    """
    kind = _read_kind(root / TYPE_FILE)
    return Task(
        name=_task_name(root),
        title=_task_name(root),
        root=root,
        split=split,
        kind=kind,
        main_metric=MAIN_METRICS[kind],
        shards=_find_shards(root / split),
        classnames=() if kind == "retrieval" else _read_lines(root / CLASSNAMES_FILE),
        templates=() if kind == "retrieval" else _read_templates(root / TEMPLATES_FILE),
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; a task of this kind needs it.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} must be UTF-8 text: {error}.") from None


def _read_kind(path: Path) -> TaskKind:
    kind = _read_text(path).strip().lower() if path.exists() else "classification"
    for known in get_args(TaskKind):
        if kind == known:
            return known
    raise InputError(f"{path} must say one of {list(get_args(TaskKind))}. It says {kind!r}.")


def _find_shards(folder: Path) -> tuple[Path, ...]:
    path = folder / NSHARDS_FILE
    text = _read_text(path).strip()
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{path} must hold the number of tars, at least 1. It holds {text!r}.")
    shards = []
    for number in range(int(text)):
        shard = folder / f"{number}.tar"
        if not shard.is_file():
            raise InputError(f"{shard} does not exist, but {path} says that there are {text} tars.")
        shards.append(shard)
    return tuple(shards)


def _read_lines(path: Path) -> tuple[str, ...]:
    lines = tuple(line.strip() for line in _read_text(path).splitlines())
    if not lines or "" in lines:
        number = lines.index("") + 1 if lines else 1
        raise InputError(
            f"{path} must not have empty lines, one name a line. Line {number} is empty."
        )
    return lines


def _read_templates(path: Path) -> tuple[str, ...]:
    """The templates, which clip_benchmark will give to `str.format`.

    They are someone else's text: a field such as `{c.__class__}` would read attributes.
    """
    templates = _read_lines(path)
    for number, template in enumerate(templates, start=1):
        rest = template.replace("{c}", "")
        if rest == template or "{" in rest or "}" in rest:
            raise InputError(
                f"{path}, line {number}: a template must contain {{c}} for the name of the class, "
                f"and no other braces. Got {template!r}."
            )
    return templates
