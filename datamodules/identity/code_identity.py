"""The code behind an answer that is kept: digests of the modules that a selector's classes use.

A class depends on its own module, and on what that imports of the same project: the modules of its
package, and those beside it that belong to no installed distribution. Of other distributions the
version counts. Torch, numpy and the like are left out: they move answers by rounding alone. Files
beside a module that its text names, such as lists of words, count with their content.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, TypeGuard

import siftclip
from siftclip.datamodules.identity.kept_code import kept_code
from siftclip.files import content_digest
from siftclip.plugins import installed_points

log = logging.getLogger(__name__)

OURS = "siftclip"
# Packages whose versions move answers by rounding alone, or not at all
_NO_ANSWERS = (
    *("torch", "torchvision", "numpy", "scipy", "pandas", "pyarrow"),
    *("lazy_loader", "typing_extensions"),
)
_FLOORS = ("selectors", "datamodules", "eval", "trainer", "configs")
_INSTALLED = ("site-packages", "dist-packages")
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None))
_CODE = (".py", ".pyc", ".so", ".pyd")
_LONGEST_NAME = 256  # of a file; longer texts are sentences


class _Text(ast.Constant):
    """A constant of a module's text that is a text."""

    value: str


def code_identity(code: Iterable[type | FunctionType]) -> dict[str, str]:
    """Return what stands for the code of classes and functions: digests and versions by name.

    `{"my_package.scores": "<SHA-256>", "my_distribution": "1.2"}`. Classes of the standard library
    and of torch stand for nothing. Of a module that no file holds, as in a notebook, and of one
    whose file has changed since it was loaded, the functions in memory count. Built-in modules
    stand for what their answers are kept under, see `kept_code`.
    """
    loaded_ns: dict[str, int] = {}  # by module: when it was loaded, as far as its classes know
    for item in _with_bases(code):
        at = vars(item).get("loaded_ns", sys.maxsize)
        loaded_ns[item.__module__] = min(at, loaded_ns.get(item.__module__, sys.maxsize))
    built_in = [name for name in loaded_ns if _top(name) == OURS]
    of_others = {name: at for name, at in loaded_ns.items() if _top(name) != OURS}
    identity = {OURS: kept_code().siftclip, **_identity_of(of_others)}
    as_they_are: dict[str, str] = {}
    for name in built_in:
        digests = _identity_of({name: loaded_ns[name]})
        kept = kept_code().stands_for(name, digests)
        if kept is None:
            as_they_are |= {**digests, OURS: siftclip.__version__}
        else:
            identity |= kept
    identity |= as_they_are
    return dict(sorted(identity.items()))


def built_in_code(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Hash built-in modules and what each imports, by their current names."""
    return {name: _identity_of({name: sys.maxsize}) for name in names}


def _identity_of(loaded_ns: Mapping[str, int]) -> dict[str, str]:
    """Compute digests and versions of modules and of what they import.

    Args:
        loaded_ns: by module, when it was loaded, in ns since the epoch.
    """
    loaded_ns, identity = dict(loaded_ns), {}
    todo = list(loaded_ns)
    while todo:
        name = todo.pop()
        digest, imported, data_files = _module_identity(name, loaded_ns[name])
        if digest is not None:
            identity[name] = digest
        identity |= {f"{name}: {path.name}": content_digest(path) for path in data_files}
        identity |= _distribution_of(name)
        for other in imported:
            if other not in loaded_ns:
                loaded_ns[other] = loaded_ns[name]  # which has loaded it, or found it there
                if _is_followed(other, name):
                    todo.append(other)
                else:
                    identity |= _distribution_of(other)
    return identity


def _with_bases(code: Iterable[type | FunctionType]) -> Iterator[type | FunctionType]:
    """Yield the items and the classes that they inherit from, as far as they may be a project's."""
    for item in code:
        for kind in item.__mro__ if isinstance(item, type) else (item,):
            if _is_own(kind.__module__):
                yield kind


def _top(name: str) -> str:
    return name.partition(".")[0]


def _is_own(name: str) -> bool:
    """Return whether a module may be a project's: neither Python's nor a package for numerics."""
    top = _top(name)
    return top == "__main__" or top not in (*sys.stdlib_module_names, *_NO_ANSWERS)


def _is_followed(name: str, importer: str) -> bool:
    """Return whether the text of a module counts for one that imports it, not only its version."""
    if _top(importer) == OURS:  # a method and the kernels that it imports
        return name.startswith(f"{OURS}.selectors") or _is_shared(name)
    if _top(name) == OURS or not _is_own(name):
        return False
    if _top(name) == _top(importer):
        return True
    if _distribution_of(name) and _distribution_of(name) == _distribution_of(importer):
        return True
    path = _source_file(name)
    return path is not None and not set(path.parts) & set(_INSTALLED)


def _is_shared(name: str) -> bool:
    """Return whether a module is one that all of Siftclip shares, such as `siftclip.errors`."""
    package, _, rest = name.partition(".")
    return package == OURS and rest != "" and "." not in rest and rest not in _FLOORS


@functools.lru_cache(maxsize=1)
def _distributions() -> dict[str, dict[str, str]]:
    """Find the names and versions of installed distributions, by the packages that they bring."""
    versions: dict[str, dict[str, str]] = {}
    for top, names in packages_distributions().items():
        for name in names:
            try:
                versions.setdefault(top, {})[name] = version(name)
            except PackageNotFoundError:  # removed at this moment
                continue
    for point in installed_points():  # also those that do not list their files
        if point.dist is not None:
            versions.setdefault(_top(point.module), {})[point.dist.name] = point.dist.version
    return versions


def _distribution_of(name: str) -> dict[str, str]:
    """Return name and version of what installed a module; empty for Siftclip and if nothing has."""
    if _top(name) == OURS or not _is_own(name):
        return {}
    return _distributions().get(_top(name), {})


def _source_file(name: str) -> Path | None:
    """Find the file of a module without running it; None if it has none."""
    module = sys.modules.get(name)
    origin = getattr(getattr(module, "__spec__", None), "origin", None)
    if origin is None:
        origin = getattr(module, "__file__", None)
    if origin is None and module is None:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError, AttributeError):  # of an optional dependency, say
            return None
        origin = None if spec is None else spec.origin
    path = None if origin is None else _resolved(origin)
    return path if path is not None and path.is_file() else None


@functools.lru_cache(maxsize=4096)
def _resolved(origin: str) -> Path:
    """Resolve the links in the place of a file, which takes a look at each folder above it."""
    return Path(origin).resolve()


def _module_identity(
    name: str, loaded_ns: int
) -> tuple[str | None, tuple[str, ...], tuple[Path, ...]]:
    """Return what stands for a module, the modules that it imports, and the files that it names."""
    path, module = _source_file(name), sys.modules.get(name)
    if path is None:
        return (None if module is None else _in_memory(module)), (), ()
    status = path.stat()
    stamp = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    digest, imported, texts = _read(path, name, *stamp)
    if status.st_mtime_ns > loaded_ns and module is not None:
        _warn_of_change(path)
        digest = _in_memory(module)
    return digest, imported, () if _top(name) == OURS else _data_files(path.parent, texts)


def _data_files(folder: Path, texts: Iterable[str]) -> tuple[Path, ...]:
    """Find the files in or below a folder of code that texts of the code name, but for code."""
    inside = [text for text in texts if (folder / text).is_dir()]
    places = [folder, *(folder / text for text in inside)]
    paths = {place / text for place in places for text in texts if not text.endswith(_CODE)}
    return tuple(sorted(path for path in paths if path.is_file()))


@functools.lru_cache(maxsize=64)  # once a file
def _warn_of_change(path: Path) -> None:
    log.warning(
        "%s has changed since this process loaded it, and the loaded code is what runs. Start "
        "again to use the file as it is now.",
        path,
    )


@functools.lru_cache(maxsize=4096)
def _read(path: Path, name: str, *_stamp: int) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Read a module's file: its digest, the modules it imports, and texts that may name files.

    Args:
        path: of the file.
        name: of the module.
        _stamp: changes with the file, so that an edited one is read again.
    """
    data = path.read_bytes()
    names: tuple[str, ...] = ()
    texts: set[str] = set()
    if path.suffix == ".py":
        try:
            tree = ast.parse(data)
            names = tuple(_imports(tree, name, path.name == "__init__.py"))
            texts = {node.value for node in ast.walk(tree) if _may_name_a_file(node)}
        except SyntaxError:  # edited since it was imported
            names = ()
    return hashlib.sha256(data).hexdigest(), names, tuple(sorted(texts))


def _may_name_a_file(node: ast.AST) -> TypeGuard[_Text]:
    """Return whether a node of a module's text is a constant relative name in a folder."""
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        return False
    text = node.value
    is_relative = text[:1] not in ("", "/") and text.isprintable() and not text.startswith("..")
    return is_relative and len(text) < _LONGEST_NAME and text != "."


def _imports(tree: ast.AST, name: str, is_package: bool) -> Iterator[str]:
    """Yield the modules that a module imports anywhere in its text."""
    package = name if is_package else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _with_parents(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute("." * node.level + (node.module or ""), package)
            if base:
                yield from _with_parents(base)
                yield from (
                    full for alias in node.names if _is_module(full := f"{base}.{alias.name}")
                )
        elif isinstance(node, ast.Call) and node.args:
            called = node.func
            caller = getattr(called, "attr", None) or getattr(called, "id", None)
            text = getattr(node.args[0], "value", None)
            if caller in ("import_module", "__import__") and isinstance(text, str):
                yield from _with_parents(_absolute(text, package))


def _absolute(name: str, package: str) -> str:
    """Return the full name of a module; a relative one begins with a dot for each level."""
    level = len(name) - len(name.lstrip("."))
    if not level:
        return name
    above = package.split(".")[: len(package.split(".")) - level + 1]
    return ".".join(part for part in (*above, name[level:]) if part)


def _with_parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        yield ".".join(parts[:length])


def _is_module(name: str) -> bool:
    if name in sys.modules:
        return True
    if not hasattr(sys.modules.get(name.rpartition(".")[0]), "__path__"):
        return False
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def _in_memory(module: ModuleType) -> str:
    """Hash the functions and classes of a loaded module and its constants."""
    functions: dict[str, FunctionType] = {}
    constants: dict[str, str] = {}
    for name, value in vars(module).items():
        is_its_class = isinstance(value, type) and value.__module__ == module.__name__
        for member, item in vars(value).items() if is_its_class else [("", value)]:
            plain = _behind_decorators(item)
            if isinstance(plain, FunctionType):
                if plain.__module__ == module.__name__:
                    functions[f"{name}.{member}"] = plain
            elif _is_constant(item) and not member.startswith("__") and member != "loaded_ns":
                constants[f"{name}.{member}"] = _constant_text(item)
    used = {part for item in functions.values() for part in _names(item.__code__)}
    constants = {
        name: text
        for name, text in constants.items()
        if not name.endswith(".") or name[:-1] in used
    }
    codes = {name: _described_code(item.__code__) for name, item in functions.items()}
    defaults = {name: (item.__defaults__, item.__kwdefaults__) for name, item in functions.items()}
    text = repr([sorted(codes.items()), sorted(constants.items()), sorted(defaults.items())])
    return "in memory: " + hashlib.sha256(text.encode()).hexdigest()


def _behind_decorators(item: Any) -> Any:
    """Unwrap the function that a property, a method or a decorated function was made from."""
    for name in ("fget", "__func__", "func"):
        item = getattr(item, name, item)
    return inspect.unwrap(item) if callable(item) else item


def _is_constant(value: Any) -> bool:
    """Return whether a value is made of constants alone, also in lists, sets and dictionaries."""
    if isinstance(value, dict):
        return all(_is_constant(item) for pair in value.items() for item in pair)
    if isinstance(value, (list, set, tuple, frozenset)):
        return all(_is_constant(item) for item in value)
    return isinstance(value, _CONSTANTS)


def _constant_text(value: Any) -> str:
    """Return the text of a constant, in which the items of sets have an order."""
    if isinstance(value, dict):
        return repr([(_constant_text(k), _constant_text(v)) for k, v in value.items()])
    if isinstance(value, (list, tuple)):
        return repr([_constant_text(item) for item in value])
    if isinstance(value, (set, frozenset)):
        return repr(sorted(_constant_text(item) for item in value))
    return repr(value)


def _names(code: CodeType) -> set[str]:
    """Return the names that some code uses, with the functions inside it."""
    inner = [_names(value) for value in code.co_consts if isinstance(value, CodeType)]
    return set(code.co_names).union(*inner)


def _described_code(code: CodeType) -> list[Any]:
    constants = [
        _described_code(value) if isinstance(value, CodeType) else repr(value)
        for value in code.co_consts
    ]
    return [code.co_code.hex(), code.co_names, code.co_varnames, constants]
