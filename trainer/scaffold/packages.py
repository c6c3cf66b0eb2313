"""Writes a package with a selector, a loss or a kind of task, its test and its README.

One with a kind of task also has a task of this kind, in `example_tasks/`.
"""

from __future__ import annotations

import keyword
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from siftclip.errors import InputError
from siftclip.files import write_text
from siftclip.plugins import installed_names
from siftclip.trainer.scaffold.example_task import write_example_task
from siftclip.writing import new_folder_whole

EXAMPLE_TASKS = "example_tasks"
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginKind:
    """What a package adds to Siftclip."""

    what: str  # in words
    group: str  # of entry points
    ending: str  # of the module's name, which another kind of the same name does not have
    usage: str  # the command that uses it, with {name}


KINDS: Mapping[str, PluginKind] = MappingProxyType(
    {
        "selector": PluginKind(
            what="a selector",
            group="siftclip.selectors",
            ending="selector",
            usage="siftclip select pool.root=/data/pool selector=plugin selector.plugin={name}",
        ),
        "loss": PluginKind(
            what="a loss",
            group="siftclip.losses",
            ending="loss",
            usage="siftclip train pool.root=/data/pool loss=plugin loss.plugin={name}",
        ),
        "task": PluginKind(
            what="a kind of evaluation task",
            group="siftclip.task_kinds",
            ending="task",
            usage="siftclip eval outputs/train/RUN eval.root=/data/tasks",
        ),
    }
)


def write_package(kind: str, name: str, folder: Path) -> tuple[Path, ...]:
    """Write a package that works as it is: an example to be changed, and a test of its contract.

    Args:
        kind: one of `KINDS`.
        name: under which Siftclip knows it: small letters, digits and underscores.
        folder: a new one, or an empty one.

    Returns:
        The files.

    Raises:
        InputError: there is no such kind, the name is none, or something is in the folder.
    """
    if kind not in KINDS:
        raise InputError(f"KIND must be one of {', '.join(KINDS)}. Got {kind!r}.")
    _check_name(name)
    taken = installed_names(KINDS[kind].group)
    if name in taken:
        raise InputError(
            f"NAME must not be that of a plug-in which is installed: {', '.join(taken)}. "
            f"Got {name!r}."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} must be a new folder, or an empty one: nothing is overwritten.")
    plugin = KINDS[kind]
    module = name if name.endswith(plugin.ending) else f"{name}_{plugin.ending}"
    words = {
        "name": name,
        "module": module,
        "class_name": "".join(part.capitalize() for part in name.split("_")),
        "title": name.replace("_", " ").capitalize(),
        "distribution": module.replace("_", "-"),
        "what": plugin.what,
        "group": plugin.group,
        "usage": plugin.usage.format(name=name),
        "example_tasks": EXAMPLE_TASKS if kind == "task" else "",
    }
    templates = {
        "pyproject.toml": "pyproject.toml.j2",
        "README.md": "README.md.j2",
        f"{module}.py": f"{kind}.py.j2",
        f"test_{module}.py": f"{kind}_test.py.j2",
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    place = folder / EXAMPLE_TASKS / name
    with new_folder_whole(folder):
        for file, template in templates.items():
            write_text(folder / file, environment.get_template(template).render(words))
        example = write_example_task(name, place) if kind == "task" else ()
    return (*(folder / file for file in templates), *example)


def _check_name(name: str) -> None:
    """Raise InputError unless a name is fit for a module, an option and a distribution."""
    if not _NAME.fullmatch(name) or name.endswith("_"):
        raise InputError(
            "NAME must consist of small letters, digits and underscores, and begin with a letter, "
            f"such as caption_length. Got {name!r}."
        )
    if keyword.iskeyword(name) or name in sys.stdlib_module_names or name == "siftclip":
        raise InputError(f"NAME must not be a word or a module of Python. Got {name!r}.")
