"""From the arguments of the functions to the groups of options that the stages take."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, TypeVar, get_type_hints

from siftclip.datamodules.pool.pool import Pool
from siftclip.errors import InputError, ParameterError, require_path
from siftclip.selectors.core.base import Selector
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.settings.common import CommonSettings
from siftclip.trainer.settings.composed import Composed, composed
from siftclip.trainer.settings.data import DataSettings
from siftclip.trainer.settings.fields.rules import hints, near
from siftclip.trainer.settings.fields.section import Section, to_plain
from siftclip.trainer.settings.given import given_group
from siftclip.trainer.settings.lightning import TrainerSettings
from siftclip.trainer.settings.model import EmbeddingModel, ModelSettings
from siftclip.trainer.settings.pool import PoolSettings
from siftclip.trainer.settings.read_command import compose
from siftclip.trainer.settings.store import STORED, composing, configuration_names

T = TypeVar("T")
M = TypeVar("M", ModelSettings, EmbeddingModel)

_PATH = re.compile(r"~|\.{0,2}/|[^:]*/[^:]*/")  # no name of open_clip, and none of a hub
_REST = ("others", "common")  # what functions call the arguments that they do not name

PathLike: TypeAlias = str | os.PathLike[str]
Options: TypeAlias = Section | Mapping[str, Any] | str | None  # a group, see `given_group`


class CommonArguments(TypedDict, total=False):
    """What all functions take.

    output_dir: everything is written below this folder. progress: show bars. reuse: what an earlier
    call or command has kept. trainer: devices and precision, a `TrainerSettings` or a mapping of
    its options.
    """

    output_dir: PathLike
    progress: bool
    reuse: bool
    trainer: Options


class LoadingArguments(CommonArguments, total=False):
    """What functions take beside them that load images: `data`, as `trainer`."""

    data: Options


def require_known(function: Callable[..., Any], given: Mapping[str, Any], kind: type) -> None:
    """Refuse arguments that a function does not have.

    Args:
        function: whose arguments they are.
        given: its arguments beside those that it names.
        kind: a TypedDict of those that it takes.

    Raises:
        ParameterError: one is not among them; with the one that was meant, where one is near.
    """
    takes = list(get_type_hints(kind))
    for name in given:
        if name not in takes:
            named = [each for each in inspect.signature(function).parameters if each not in _REST]
            raise ParameterError(
                f"is not a parameter of {function.__name__}",
                owner=function,
                parameter=name,
                way_out=_meant(name, [*named, *takes]),
            )


def _meant(name: str, known: Sequence[str]) -> str:
    """Say which argument was meant, or which group of options has one of that name."""
    close = near(name, known)
    if close:
        return f"Did you mean {close}?"
    groups = [stored.group for stored in STORED if name in hints(stored.kind)]
    group = next((group for group in groups if group in known), None)
    if group is not None:
        return f'It is an option of {group}: {group}={{"{name}": ...}}.'
    return f"There are {', '.join(known)}."


def named_preset(kind: type[T], command: str, group: str, name: str, *more: str) -> T:
    """Compose what the command line calls GROUP=NAME: a scale, a suite of tasks, a model.

    Args:
        kind: what is wanted of it.
        command: whose configuration it is.
        group: of the configuration.
        name: in this group.
        *more: further overrides.

    Raises:
        InputError: there is none of that name.
    """
    known = configuration_names(group)
    if name not in known:
        close = near(name, known)
        hint = f" Did you mean {close}?" if close else ""
        raise InputError(f"{group} must be one of {', '.join(known)}. Got {name!r}.{hint}")
    with composing():
        return compose(kind, command, [f"{group}={name}", *more])


def common_settings(
    arguments: Mapping[str, Any], *, seed: int = 0, run_dir: PathLike | None = None
) -> CommonSettings:
    """Return what all commands share, from `CommonArguments`."""
    given = {name: arguments[name] for name in ("progress", "reuse") if name in arguments}
    if "output_dir" in arguments:
        given["output_dir"] = require_path("output_dir", arguments["output_dir"])
    if run_dir is not None:
        given["run_dir"] = require_path("run_dir", run_dir)
    return CommonSettings(seed=seed, **given)


def trainer_settings(arguments: Mapping[str, Any]) -> TrainerSettings:
    """Return devices and precision, from `CommonArguments`."""
    settings: TrainerSettings = given_group(TrainerSettings, "trainer", arguments.get("trainer"))
    return settings


def data_settings(arguments: Mapping[str, Any]) -> DataSettings:
    """Return how images are loaded, from `LoadingArguments`."""
    settings: DataSettings = given_group(DataSettings, "data", arguments.get("data"))
    return settings


def pool_settings(pool: Pool) -> PoolSettings:
    """Return the options with which a pool was opened."""
    options = pool.options
    return PoolSettings(
        root=options.root,
        cache_dir=options.cache_dir,
        max_bad_fraction=options.max_bad_fraction,
        key_split=options.key_split,
        index_workers="auto" if options.index_workers is None else options.index_workers,
        storage_options=options.storage_options,
        shard_cache_gb=options.shard_cache_gb,
        max_caption_bytes=options.max_caption_bytes,
    )


def recorded(**sections: Any) -> Composed:
    """Return what a run keeps as its configuration: the options of all its groups, by name."""
    common = to_plain(sections.pop("common"))
    return composed({**common, **{name: to_plain(value) for name, value in sections.items()}})


def require_type(owner: str, parameter: str, value: Any, kind: type[T], way_out: str) -> T:
    """Return an argument if it is of a type.

    Raises:
        ParameterError: it is not.
    """
    if not isinstance(value, kind):
        raise ParameterError(
            f"must be a {kind.__name__}",
            owner=owner,
            parameter=parameter,
            got=f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__,
            way_out=way_out,
        )
    return value


def require_pool(owner: str, pool: Any) -> Pool:
    """Return an argument if it is a pool; a folder or URL is opened."""
    if isinstance(pool, str | os.PathLike):
        return Pool(pool)
    return require_type(owner, "pool", pool, Pool, 'Open one: siftclip.Pool("/data/pool").')


def require_selector(owner: str, selector: Any) -> Selector:
    """Return an argument if it is a selector."""
    way_out = "Such as siftclip.selectors.ClipScore(fraction=0.3); arrays come as features=..."
    return require_type(owner, "selector", selector, Selector, way_out)  # type: ignore[type-abstract]  # mypy 4717


def model_place(model: Any) -> str:
    """Return where a model is: the name or folder that was given, or the folder of a run.

    Raises:
        ParameterError: it is neither.
    """
    if isinstance(model, RunDir):
        return os.fspath(model.path)
    looks_like_path = isinstance(model, Path) or (isinstance(model, str) and _PATH.match(model))
    if looks_like_path and not Path(model).exists():
        raise ParameterError("must be a folder that is there", parameter="model", value=str(model))
    if not isinstance(model, str | os.PathLike):
        raise ParameterError(
            "must be a run, a folder, or a name in open_clip",
            parameter="model",
            got=type(model).__name__,
        )
    return os.fspath(model)


def whole_model(model: M, pretrained: str | None) -> M:
    """Return all settings of a model as they are.

    Raises:
        ParameterError: `pretrained` is given beside them, which have it.
    """
    if pretrained is not None:
        rule = "must not be given beside all settings of a model, which have it, too"
        raise ParameterError(rule, parameter="pretrained", value=pretrained)
    return model
