"""Old places of modules that have moved: they import for one release, with a warning.

`MOVED` is the one table of them. A module whose old name belongs to nothing now is the module at
its new place, under both names. Where a package has taken the old name of a module, as
`siftclip.trainer.optim`, the package answers for what the module held: see `moved_attributes`.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType
from typing import Any

# old module: new module
MOVED: dict[str, str] = {}


def old_name(module: str) -> str:
    """The name under which a module was known before it moved; its own where it has not."""
    return next((old for old, new in MOVED.items() if new == module), module)


def moved_attributes(package: str) -> Callable[[str], Any]:
    """The `__getattr__` of a package that has taken the old name of a module.

    It gives what the module holds, with a warning; names that it does not hold are errors as ever.
    A package says `__getattr__ = moved_attributes(__name__)`.
    """

    def attribute(name: str) -> Any:
        is_special = name.startswith("__") and name.endswith("__")  # asked of any module by tools
        held = {} if is_special else vars(importlib.import_module(MOVED[package]))
        if name not in held:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        _warn(f"{package}.{name}", f"{MOVED[package]}.{name}")
        return held[name]

    return attribute


class _OldNames:
    """Finds and loads modules by their old names. The last finder: what exists is not touched."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in MOVED:
            return None
        # no subclass of importlib.abc.Loader, whose import costs more than all of this module
        return ModuleSpec(name, self, origin=MOVED[name])  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave the old name an empty module while the new one is imported."""

    def exec_module(self, module: ModuleType) -> None:
        """Put the new module into the place of the empty one, as importlib allows."""
        old = module.__name__
        sys.modules[old] = importlib.import_module(MOVED[old])
        _warn(old, MOVED[old])


_FINDER = _OldNames()


def install() -> None:
    """Let Python ask for old names when it finds no module."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)


def _warn(old: str, new: str) -> None:
    """Warn at the line that names the old place, be it an import or a call of importlib."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and _is_machinery(frame):
        frame = frame.f_back
        level += not _is_skipped(frame)
    message = f"{old} is now {new}; the old name goes with the next release"
    warnings.warn(message, DeprecationWarning, stacklevel=level)


def _is_machinery(frame: FrameType) -> bool:
    module = str(frame.f_globals.get("__name__"))
    return module == __name__ or module.partition(".")[0] == "importlib"


def _is_skipped(frame: FrameType) -> bool:
    """Whether `warnings` itself leaves a frame out of its count."""
    return str(frame.f_globals.get("__name__")).startswith("importlib._bootstrap")
