"""The kinds of tasks that there are: those built in, and those of other distributions by name.

A task's `dataset_type.txt` is someone else's text. It names a kind, and never a module: what can be
imported for it is what is installed for the entry-point group `siftclip.task_kinds`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import EntryPoint
from types import MappingProxyType
from typing import get_args

from siftclip.errors import InputError, ParameterError, require_choice
from siftclip.eval.tasks.kinds.association import Association
from siftclip.eval.tasks.kinds.base import ImagesOfSample, TaskKind
from siftclip.eval.tasks.kinds.classification import Classification
from siftclip.eval.tasks.kinds.image_caption_selection import ImageCaptionSelection
from siftclip.eval.tasks.kinds.multilabel import Multilabel
from siftclip.eval.tasks.kinds.retrieval import Retrieval
from siftclip.plugins import PluginGroup

GROUP = "siftclip.task_kinds"
TASK_KINDS = PluginGroup(name=GROUP, base=TaskKind, public_name="siftclip.eval.TaskKind")  # type: ignore[type-abstract]  # mypy 4717
BUILT_IN: Mapping[str, TaskKind] = {
    kind.name: kind
    for kind in (
        Classification(),
        Multilabel(),
        Retrieval(),
        ImageCaptionSelection(),
        Association(),
    )
}
_WANTED = ("name", "suffix", "main_metric")

_offered: ContextVar[Mapping[str, TaskKind]] = ContextVar("_offered", default=MappingProxyType({}))


def find_kind(name: str) -> TaskKind:
    """Return the kind of this name. No distribution takes the place of one that is built in.

    Raises:
        InputError: there is none, two distributions give one, or it is not what it must be.
    """
    known = {**BUILT_IN, **_offered.get()}
    if name in known:
        return known[name]
    points = TASK_KINDS.find()
    if name not in points:
        raise ParameterError(
            f"must say one of {[*known, *sorted(points.keys() - known.keys())]}",
            parameter="kind",
            value=name,
            way_out="Another kind is added by installing a package that has a subclass of "
            f"siftclip.eval.TaskKind, and an entry point of its name in the group {GROUP!r}.",
        )
    return _load(points[name])


def _load(point: EntryPoint) -> TaskKind:
    plugin = f"The plug-in {point.name!r} ({point.value}) of the group {GROUP!r}"
    try:
        made = point.load()
    except Exception as error:  # whatever its module raises
        raise InputError(f"{plugin} cannot be imported: {error}.") from error
    kind = build_kind(made, plugin)
    if kind.name != point.name:
        raise InputError(f"{plugin} must have this name. Its name is {kind.name!r}.")
    return kind


def build_kind(made: object, subject: str) -> TaskKind:
    """Build a kind from what should be its class.

    Args:
        made: the class.
        subject: what errors call it.

    Raises:
        InputError: it is no subclass of TaskKind, leaves something open, or takes arguments.
    """
    if not isinstance(made, type) or not issubclass(made, TaskKind):
        raise InputError(f"{subject} must be a subclass of siftclip.eval.TaskKind. It is {made!r}.")
    missing = [name for name in _WANTED if not isinstance(getattr(made, name, None), str)]
    if missing:
        raise InputError(f"{subject} must set {', '.join(missing)}, as texts.")
    require_choice("images", made.images, get_args(ImagesOfSample), owner=made)
    try:
        return made()
    except TypeError as error:
        raise InputError(f"{subject} cannot be built without arguments: {error}.") from error


@contextmanager
def offered(kind: TaskKind) -> Iterator[None]:
    """Let tasks name a kind that is not installed, inside a `with`: for checks of the kind."""
    token = _offered.set({**_offered.get(), kind.name: kind})
    try:
        yield
    finally:
        _offered.reset(token)
