"""Old places of modules that have moved: they import for one release, with a warning.

`MOVED` is the one table of them. A module whose old name belongs to nothing now is the module at
its new place, under both names. Where a package has taken the old name of a module, as
`siftclip.trainer.optim`, the package answers for what the module held: see `answer_for_module`.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType
from typing import Any

# old module: new module
MOVED: dict[str, str] = {}


def old_name(module: str) -> str:
    """The name under which a module was known before it moved; its own where it has not."""
    return next((old for old, new in MOVED.items() if new == module), module)


def answer_for_module(package: str) -> None:
    """Let a package that has taken the old name of a module answer for what that module held.

    Attributes are read with a warning, and set where they are now, so that patches of them work;
    what the package has itself comes first. It says `answer_for_module(__name__)`.
    """
    sys.modules[package].__class__ = _PackageForModule


class _PackageForModule(ModuleType):
    def _module(self) -> ModuleType:
        return importlib.import_module(MOVED[self.__name__])

    def _has_itself(self, name: str) -> bool:
        is_special = name.startswith("__") and name.endswith("__")  # asked of any module by tools
        return is_special or name in vars(self)

    def __getattr__(self, name: str) -> Any:
        if self._has_itself(name) or not hasattr(self._module(), name):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        _warn(f"{self.__name__}.{name}", f"{MOVED[self.__name__]}.{name}")
        return getattr(self._module(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._has_itself(name) or isinstance(value, ModuleType):  # importlib sets submodules
            super().__setattr__(name, value)
            return
        held = vars(self._module())
        if name in held:
            self._replaced().setdefault(name, held[name])
        setattr(self._module(), name, value)

    def __delattr__(self, name: str) -> None:
        if self._has_itself(name):
            super().__delattr__(name)
        elif name in self._replaced():  # so patches end, of what a package does not have itself
            setattr(self._module(), name, self._replaced()[name])
        else:
            delattr(self._module(), name)

    def _replaced(self) -> dict[str, Any]:
        """What the module held before something else was set."""
        found: dict[str, Any] = vars(self).setdefault("__replaced__", {})
        return found


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
