"""Classes of other distributions, found through entry points: one group for each kind of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import NoneType
from typing import Any, Generic, TypeVar, get_args, get_type_hints

from siftclip.errors import InputError, ParameterError, call_by_name, takes_name

T = TypeVar("T")

_NUMBERS = {int: "an integer", float: "a number", bool: "true or false"}
_PREFIX = "siftclip."  # of the names of all groups
SELECTOR_GROUP, LOSS_GROUP = "siftclip.selectors", "siftclip.losses"  # two of these names
# What a selector keeps where nothing is said, and the word for that
USUAL_FRACTION, AUTO_FRACTION = 0.3, "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginGroup(Generic[T]):
    """An entry-point group: names that distributions give to what they add to Siftclip."""

    name: str
    """Such as "siftclip.selectors"."""
    base: type[T]
    """What a plug-in must be a subclass of."""
    public_name: str
    """How messages call the base class, such as "siftclip.selectors.Selector"."""

    def find(self) -> dict[str, EntryPoint]:
        """Find the installed plug-ins by name.

        Raises:
            InputError: two distributions give the same name.
        """
        plugins: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.name):
            other = plugins.setdefault(point.name, point)
            if other.value != point.value:
                raise InputError(
                    f"Two plug-ins of the group {self.name!r} are called {point.name!r}: "
                    f"{other.value} and {point.value}. Uninstall one of them."
                )
        return plugins

    def takes(self, plugin: str, parameter: str, *, owner: object = None) -> bool:
        """Return whether what a distribution registered as `plugin` takes a parameter of a name.

        Raises:
            InputError: no such plug-in, or it cannot be imported.
        """
        return takes_name(self._loaded(plugin, owner)[1], parameter)

    def load_class(self, plugin: str, *, owner: object = None) -> type[T]:
        """Import the class that a distribution registered as `plugin`.

        Args:
            plugin: its name.
            owner: whose parameter the name is, for the message.

        Raises:
            InputError: no such plug-in, it cannot be imported, or it is no subclass of the base.
        """
        point, kind = self._loaded(plugin, owner)
        if not (isinstance(kind, type) and issubclass(kind, self.base)):
            raise self._stranger(point)
        return kind

    def build(self, plugin: str, parameters: Mapping[str, Any], *, owner: object = None) -> T:
        """Build the object which a distribution registered as `plugin`, a class or a function.

        Raises:
            InputError: no such plug-in, it cannot be imported, or it does not take the parameters.
        """
        point, make = self._loaded(plugin, owner)
        check_numbers(make, parameters)
        try:
            built = call_by_name(make, parameters)
        except InputError:
            raise
        except Exception as error:  # a class of somebody else may fail in any way
            raise InputError(
                f"{_label(point)} could not be built with {dict(parameters)}: "
                f"{type(error).__name__}: {error}."
            ) from error
        if not isinstance(built, self.base):
            raise self._stranger(point)
        return built

    def _loaded(self, plugin: str, owner: object) -> tuple[EntryPoint, Callable[..., Any]]:
        """Import what a distribution registered as `plugin`, a class or a function."""
        plugins = self.find()
        if plugin not in plugins:
            raise ParameterError(
                f"must be one of {sorted(plugins)}, the entry points of the group {self.name!r} "
                "that are installed"
                if plugins
                else f"must be an entry point of the group {self.name!r}, and none is installed",
                owner=owner,
                parameter="plugin",
                value=plugin,
            )
        point = plugins[plugin]
        try:
            return point, point.load()
        except Exception as error:  # so may its module
            raise InputError(
                f"{_label(point)} could not be built: {type(error).__name__}: {error}."
            ) from error

    def _stranger(self, point: EntryPoint) -> InputError:
        return InputError(f"{_label(point)} must be a subclass of {self.public_name}.")


def check_numbers(target: Callable[..., Any], parameters: Mapping[str, Any]) -> None:
    """Refuse text where the annotation of a parameter asks for a number, or for true or false.

    It is what a slip of the pen on a command line gives, and many a class would meet it late.

    Raises:
        ParameterError: a value is text.
    """
    function: Any = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    try:
        hints = get_type_hints(function)
    except Exception:  # such as a name that only type checkers import
        return
    for name, value in parameters.items():
        kinds = {*(get_args(hints[name]) or (hints[name],))} if name in hints else set()
        wanted = [word for kind, word in _NUMBERS.items() if kind in kinds]
        if isinstance(value, str) and wanted and kinds <= {*_NUMBERS, NoneType}:
            rule = f"must be {' or '.join(wanted)}"
            raise ParameterError(rule, owner=target, parameter=name, value=value)


def texts_for_numbers(target: Callable[..., Any], parameters: Mapping[str, Any]) -> list[str]:
    """List the parameters that are text while their default is a number, which may be a slip."""
    try:
        known = inspect.signature(target).parameters
    except (TypeError, ValueError):  # some that are written in C tell nothing
        return []
    return [
        name
        for name, value in parameters.items()
        if isinstance(value, str) and name in known and type(known[name].default) in (int, float)
    ]


def installed_names(group: str) -> list[str]:
    """List the names of a group that are installed, without importing what they stand for."""
    return sorted({point.name for point in entry_points(group=group)})


def installed_in_words(group: str) -> str:
    """Say which names of a group are installed, as a sentence."""
    return f"Installed are {', '.join(installed_names(group)) or 'none'}."


def installed_points() -> Iterator[EntryPoint]:
    """Yield the entry points of all groups of Siftclip that are installed."""
    for group in sorted(entry_points().groups):
        if group.startswith(_PREFIX):
            yield from entry_points(group=group)


def _label(point: EntryPoint) -> str:
    return f"The plug-in {point.name!r} ({point.value})"
