"""Callbacks, loggers, plugins and the profiler that a user's command line names.

They come from the configuration of the command that runs, and from nowhere else: what a run's
`config.yaml`, a checkpoint or a data file says is never built.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from siftclip.errors import InputError
from siftclip.redaction import hidden
from siftclip.trainer.options.objects import BuiltObjects, check_target
from siftclip.trainer.settings.fields.section import to_plain
from siftclip.trainer.settings.lightning import TrainerSettings

if TYPE_CHECKING:
    from lightning.pytorch import Callback
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.profilers import Profiler

T = TypeVar("T")

LISTS = ("callbacks", "loggers", "plugins")


def check_extensions(settings: TrainerSettings) -> None:
    """Check that all classes can be imported, before anything is computed.

    Raises:
        InputError: one cannot.
    """
    for name in LISTS:
        for option, node in _nodes(settings, name):
            check_target(node, option)
    if settings.profiler is not None:
        check_target(settings.profiler, "trainer.profiler")


def extensions_identity(settings: TrainerSettings) -> dict[str, Any]:
    """Return what of them counts in a run's identity, by names; nothing where there are none.

    A callback or a plugin may change what is trained, as an average of the weights does, and only
    its author knows; loggers and profilers look on.
    """
    nodes = {name: getattr(settings, name) for name in ("callbacks", "plugins")}
    return {name: hidden(to_plain(value)) for name, value in nodes.items() if value}


def build_callbacks(settings: TrainerSettings) -> list[Callback]:
    """Build the callbacks of `trainer.callbacks`.

    Raises:
        InputError: an object cannot be built, or is none.
    """
    from lightning.pytorch import Callback

    return [*_built(settings, "callbacks", Callback)]


def build_loggers(settings: TrainerSettings) -> list[Logger]:
    """Build the loggers of `trainer.loggers`; see `build_callbacks`."""
    from lightning.pytorch.loggers import Logger

    return [*_built(settings, "loggers", Logger)]  # type: ignore[type-abstract]  # it is only compared with


def build_plugins(settings: TrainerSettings) -> list[Any]:
    """Build the plugins of `trainer.plugins`; see `build_callbacks`.

    Raises:
        InputError: one would write checkpoints in another way, from which nothing resumes.
    """
    from lightning.fabric.plugins import CheckpointIO

    plugins = [*_built(settings, "plugins", object)]
    for plugin in plugins:
        if isinstance(plugin, CheckpointIO):
            raise InputError(
                f"trainer.plugins: {type(plugin).__name__} would write the checkpoints, from which "
                "a run that was killed resumes. Siftclip writes them itself, each whole or not at "
                "all. Leave it out."
            )
    return plugins


def build_profiler(settings: TrainerSettings) -> Profiler | None:
    """Build the profiler of `trainer.profiler`; see `build_callbacks`."""
    from lightning.pytorch.profilers import Profiler

    if settings.profiler is None:
        return None
    return _build(settings.profiler, "trainer.profiler", Profiler)  # type: ignore[type-abstract]  # as above


def _nodes(settings: TrainerSettings, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, node in enumerate(getattr(settings, name) or ()):
        yield f"trainer.{name}.{number}", node


def _built(settings: TrainerSettings, name: str, kind: type[T]) -> Iterator[T]:
    for option, node in _nodes(settings, name):
        yield _build(node, option, kind)


def _build(node: Mapping[str, Any], option: str, kind: type[T]) -> T:
    # plain lists and dictionaries, as everywhere outside of Hydra
    built = BuiltObjects().build({"_convert_": "all", **node}, option)
    if not isinstance(built, kind):
        wanted = f"lightning.pytorch.{kind.__name__}"
        other = type(built).__module__.startswith("pytorch_lightning")
        raise InputError(
            f"{option} must be a {wanted}. Got {type(built).__module__}.{type(built).__name__}."
            + (" Name the class of the package lightning.pytorch." if other else "")
        )
    return built
