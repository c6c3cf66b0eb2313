"""Tasks on disk, in clip_benchmark's webdataset layout.

```
ROOT/<split>/nshards.txt   ROOT/classnames.txt                         one per line, index = label
ROOT/<split>/0.tar ...     ROOT/zeroshot_classification_templates.txt  one per line, contains {c}
ROOT/dataset_type.txt      absent or the name of a kind, see `kinds`: classification | multilabel |
                           retrieval | image_caption_selection | association | a plug-in's
members of the tars: key.{webp,png,jpg,jpeg} with
  classification           key.cls (a number); WILDS and fairness tasks also key.npy (metadata)
  multilabel               key.npy (multi-hot)
  retrieval                key.txt (one caption a line)
  image_caption_selection  key.txt: the first line is right, or, with images key.0.png, key.1.png,
                           ..., line i is that of image i
  association              images key.0.jpg, key.1.jpg, ...; key.json {"cue", "associations"}
```

Image-caption selection with one image (SugarCrepe) is stored as retrieval by clip_benchmark, so
`dataset_type.txt` has to say it; association is our form of WinoGAViL.
"""

from __future__ import annotations

import os
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from siftclip.datamodules.index.tar_walk import KeySplit
from siftclip.errors import InputError, ParameterError
from siftclip.eval.tasks.kinds.base import TaskKind
from siftclip.eval.tasks.kinds.registry import find_kind
from siftclip.eval.tasks.kinds.values import OWN_FAMILY, Task
from siftclip.eval.tasks.known_tasks import known_task
from siftclip.reading import read_text

TEST_SPLIT = "test"
FOLDER_PREFIX = "wds_"
TYPE_FILE = "dataset_type.txt"
CLASSNAMES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
NSHARDS_FILE = "nshards.txt"
_MAX_DIGITS = 9  # of the number of tars
_LAYOUT = f"{NSHARDS_FILE} holds the number of tars, such as 1; they are 0.tar, 1.tar and so on."


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundTasks:
    """What there is of the tasks that were asked for."""

    tasks: tuple[Task, ...]
    missing: tuple[str, ...]  # names without a folder
    damaged: Mapping[str, str]  # why a task's folder cannot be read, by its name
    available: tuple[str, ...]  # all that there are, also what was not asked for

    def complete(self) -> list[Task]:
        """Return the tasks, where each one that was asked for must be there.

        Raises:
            InputError: one is missing or damaged.
        """
        if self.missing:
            raise InputError(f"These tasks are missing: {list(self.missing)}.")
        for message in self.damaged.values():
            raise InputError(message)
        return list(self.tasks)


def require_names(parameter: str, value: object) -> list[str]:
    """Return `value` as a list of names; one name may stand without a list.

    Args:
        parameter: its name, for messages.
        value: a text, or a sequence of texts, which may be empty.

    Raises:
        InputError: it is something else, or a text is empty.
    """
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, Sequence) or not all(isinstance(n, str) and n.strip() for n in names):
        rule = "must be a name, or a list of names such as [cifar10,mnist]"
        raise ParameterError(rule, parameter=parameter, value=value)
    return list(names)


def find_tasks(
    root: Path,
    names: Sequence[str] | None = None,
    *,
    split: str = TEST_SPLIT,
    key_split: KeySplit = "first_dot",
    may_miss: bool = False,
) -> FoundTasks:
    """Find the tasks below a folder, or the one task whose folder this is.

    Folders inside folders are looked through, so tasks may be grouped. A folder that DataComp's
    table knows (`wds_vtab-dtd_test`) gets its key (`vtab/dtd`), title and main metric.

    Args:
        root: the folder.
        names: which tasks, in this order, see `require_names`; None means all, sorted by name.
        split: the folder inside a task that holds the tars.
        key_split: the dot that ends a sample's key in the names of its members.
        may_miss: whether a name may have no folder, as with a suite that is there in part.

    Raises:
        InputError: there is no task at all, or `names` are no names, or one is unknown or given
            twice. Tasks that were not chosen are not looked at.
    """
    if not root.is_dir():
        rule = "must be a folder of tasks, or one task"
        raise ParameterError(rule, parameter="root", value=str(root))
    chosen = None if names is None else _distinct_names(names)
    folders = [root] if _is_task_folder(root, split) else _walk(root, split)
    if not folders:
        raise ParameterError(
            f"must be the folder of a task, with {split}/{NSHARDS_FILE} (how many tars there are) "
            f"and {split}/0.tar, or hold such folders",
            parameter="root",
            value=str(root),
            way_out="There is neither.",
        )
    by_name, alike = _by_name(folders)
    wanted = sorted(by_name) if chosen is None else chosen
    missing = [name for name in wanted if name not in by_name]
    if missing and not may_miss:
        rule = f"must name tasks in {root}: {sorted(by_name)}"
        raise ParameterError(rule, parameter="names", value=missing[0])
    tasks = list[Task]()
    damaged = {name: message for name, message in alike.items() if name in wanted}
    for name in wanted:
        if name in by_name and name not in damaged:
            try:
                tasks.append(read_task(by_name[name], split=split, key_split=key_split))
            except InputError as error:
                damaged[name] = str(error)
    return FoundTasks(
        tasks=tuple(tasks),
        missing=tuple(missing),
        damaged=damaged,
        available=tuple(sorted(by_name)),
    )


def _distinct_names(names: Sequence[str]) -> list[str]:
    """Check the names of tasks that were asked for: at least one, each once."""
    chosen = require_names("names", names)
    if not chosen:
        rule = "must name at least one task, or be null for all"
        raise ParameterError(rule, parameter="names", value=names)
    twice = [name for name, count in Counter(chosen).items() if count > 1]
    if twice:
        raise ParameterError(
            "must name each task once",
            parameter="names",
            value=names,
            got=f"{twice} more than once",
        )
    return chosen


def _by_name(folders: Sequence[Path]) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the first folder of each name, and the faults of names that several folders have."""
    by_name: dict[str, Path] = {}
    alike: dict[str, str] = {}
    for folder in folders:
        name = _task_name(folder)
        other = by_name.setdefault(name, folder)
        if other is not folder:
            alike[name] = (
                f"Tasks must differ in more than the prefix {FOLDER_PREFIX} and the ending _test. "
                f"{other} and {folder} are both {name!r}."
            )
    return by_name, alike


def _walk(folder: Path, split: str) -> list[Path]:
    """Find the task folders below a folder; nothing inside of one is looked at."""
    files = []
    try:
        folders = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}.") from None
    for inner in folders:
        if inner.name.startswith((FOLDER_PREFIX, ".")) or _is_task_folder(inner, split):
            files += [] if inner.name.startswith(".") else [inner]
        elif not inner.is_symlink():  # which may lead back up
            files += _walk(inner, split)
    return files


def _task_name(folder: Path) -> str:
    name = folder.absolute().name
    known = known_task(name)
    return name.removeprefix(FOLDER_PREFIX) if known is None else known.key


def _is_task_folder(folder: Path, split: str) -> bool:
    files = (TYPE_FILE, CLASSNAMES_FILE, TEMPLATES_FILE, f"{split}/{NSHARDS_FILE}")
    return any((folder / file).is_file() for file in files)


def read_task(root: Path, *, split: str = TEST_SPLIT, key_split: KeySplit = "first_dot") -> Task:
    """Read the text files of a task folder and see that its tars are there.

    Raises:
        InputError: a file is missing or not as it must be.
    """
    name, known = _task_name(root), known_task(root.absolute().name)
    kind = _read_kind(root / TYPE_FILE, "classification" if known is None else known.kind)
    if known is not None and known.kind != kind.name:
        known = None  # of the same name only
    return Task(
        name=name,
        title=name if known is None else known.title,
        root=root,
        split=split,
        kind=kind.name,
        main_metric=kind.main_metric if known is None else known.main_metric,
        shards=_find_shards(root, split),
        classnames=_read_lines(root / CLASSNAMES_FILE) if kind.has_classes else (),
        templates=read_templates(root / TEMPLATES_FILE) if kind.has_classes else (),
        special=None if known is None else known.special,
        family=OWN_FAMILY if known is None else known.family,
        key_split=key_split,
    )


def with_texts(
    task: Task, *, classnames: Path | None = None, templates: Path | None = None
) -> Task:
    """Replace the class names or templates of a task by those of files like its own.

    Raises:
        InputError: the task has no classes, or there are more or fewer names than it has.
    """
    if classnames is not None:
        parameter = f"classnames.{task.name}"
        names = _read_asked(parameter, classnames, task, _read_lines)
        if len(names) != len(task.classnames):
            raise ParameterError(
                f"must have a line for each of the {len(task.classnames)} classes of {task.name}",
                parameter=parameter,
                value=str(classnames),
                way_out=f"It has {len(names)}.",
            )
        task = replace(task, classnames=names)
    if templates is not None:
        parameter = f"templates.{task.name}"
        task = replace(task, templates=_read_asked(parameter, templates, task, read_templates))
    return task


def _read_asked(
    parameter: str, path: Path, task: Task, read: Callable[[Path], tuple[str, ...]]
) -> tuple[str, ...]:
    """Return what a file holds that a parameter names; errors name the parameter too."""
    if not task.has_classes:
        rule = f"must be of a task with classes, and this one is of the kind {task.kind}"
        raise ParameterError(rule, parameter=parameter, value=str(path))
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        rule = f"must name a text file, and {path} {problem}"
        raise ParameterError(rule, parameter=parameter)
    try:
        return read(path)
    except InputError as error:
        rule = "cannot be used"
        raise ParameterError(rule, parameter=parameter, got=str(path), way_out=str(error)) from None


def _read_text(path: Path) -> str:
    if not os.path.lexists(path):
        raise InputError(f"{path} does not exist; a task of this kind needs it.")
    return read_text(path)


def _read_kind(path: Path, default: str) -> TaskKind:
    if not path.exists():
        return find_kind(default)
    try:
        return find_kind(_read_text(path).strip().lower())
    except ParameterError as error:
        message = f"{path} {error.rule}. It says {error.got}. {error.way_out}"
        raise InputError(message) from None


def _find_shards(root: Path, split: str) -> tuple[Path, ...]:
    folder = root / split
    if not folder.is_dir():
        others = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] != ".")
        raise InputError(
            f"{root} must have the folder {split!r} with {NSHARDS_FILE} and tars. "
            + (f"Its folders are {others}. " if others else "It has no folders. ")
            + _LAYOUT
        )
    path = folder / NSHARDS_FILE
    if not path.exists():
        raise InputError(f"{path} does not exist. {_LAYOUT}")
    text = _read_text(path).strip()
    if not text.isdecimal() or len(text) > _MAX_DIGITS or int(text) < 1:
        held = reprlib.repr(text)
        raise InputError(f"{path} must hold a number of at least 1. It holds {held}. {_LAYOUT}")
    shards = []
    for number in range(int(text)):
        shard = folder / f"{number}.tar"
        if not os.path.lexists(shard):
            raise InputError(f"{shard} does not exist, but {path} says that there are {text} tars.")
        if not shard.is_file():
            what = "a folder" if shard.is_dir() else "a link to nothing or no file at all"
            raise InputError(f"{shard} must be a tar. It is {what}.")
        if not os.access(shard, os.R_OK):
            raise InputError(f"{shard} cannot be read: you lack the permission.")
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


def read_templates(path: Path) -> tuple[str, ...]:
    """Read the templates of a file, each with {c} and without other braces.

    They are someone else's text, and tools give them to `str.format`, where a field such as
    `{c.__class__}` would read attributes.

    Raises:
        InputError: a line is not a template.
    """
    templates = _read_lines(path)
    for number, template in enumerate(templates, start=1):
        rest = template.replace("{c}", "")
        if rest == template or "{" in rest or "}" in rest:
            raise InputError(
                f"{path}, line {number}: a template must contain {{c}} for the name of the class, "
                f"and no other braces. Got {reprlib.repr(template)}."
            )
    return templates
