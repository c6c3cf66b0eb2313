"""Old names of modules that have moved: the same modules, with a warning, and nothing else."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import re
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from siftclip import aliases
from siftclip.aliases import MOVED, old_name

ROOT = Path(__file__).parents[1]

# A package that another one has moved into: `old_methods` is now `methods.scores`, and `tasks`,
# once a module, is a package that holds it as `tasks.folders`.
FILES = {
    "__init__.py": "",
    "methods/__init__.py": "",
    "methods/scores.py": "class Score: pass\n\ndef score(): return 1\n",
    "tasks/__init__.py": "from siftclip.aliases import answer_for_module\n"
    "answer_for_module(__name__)\n",
    "tasks/folders.py": "LIMIT = 3\n_private = 4\n",
    "tasks/samples.py": "",
}
TABLE = {
    "movable.old_methods": "movable.methods.scores",
    "movable.tasks": "movable.tasks.folders",
    "movable.gone": "movable.nowhere",
}


@pytest.fixture
def movable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package on the path, with its moves in the table; forgotten afterwards."""
    for name, text in FILES.items():
        path = tmp_path / "movable" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    for old, new in TABLE.items():
        monkeypatch.setitem(MOVED, old, new)
    yield tmp_path / "movable"
    for name in [name for name in sys.modules if name.partition(".")[0] == "movable"]:
        del sys.modules[name]


# ---- modules whose old name is free -------------------------------------------------------------
@pytest.mark.parametrize("old_first", [True, False])
def test_both_names_are_one_module_whichever_comes_first(movable: Path, old_first: bool) -> None:
    names = ("movable.old_methods", "movable.methods.scores")
    with pytest.warns(DeprecationWarning, match=re.escape("is now movable.methods.scores")):
        first, second = map(importlib.import_module, names if old_first else names[::-1])
    assert first is second is sys.modules["movable.old_methods"]
    assert first.__name__ == "movable.methods.scores"
    assert first.__spec__ is not None
    assert first.__spec__.name == "movable.methods.scores"
    assert first.__spec__.origin == first.__file__ == str(movable / "methods" / "scores.py")
    assert first.__package__ == "movable.methods"
    assert importlib.reload(first) is second


def test_the_warning_names_both_places_and_the_line(movable: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from movable.old_methods import Score  # type: ignore[import-not-found]

        importlib.import_module("movable.old_methods")
    (one,) = caught
    assert str(one.message) == (
        "movable.old_methods is now movable.methods.scores; the old name goes with the next release"
    )
    assert one.filename == __file__
    assert "import Score" in Path(__file__).read_text().splitlines()[one.lineno - 1]
    assert Score.__module__ == "movable.methods.scores"


def test_the_warning_names_the_line_that_calls_importlib(movable: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        importlib.import_module("movable.old_methods")
    (one,) = caught
    assert one.filename == __file__


def test_a_warning_that_is_an_error_is_one_each_time(movable: Path) -> None:
    for _ in range(2):
        with pytest.raises(DeprecationWarning, match="is now"):
            importlib.import_module("movable.old_methods")


@pytest.mark.filterwarnings("ignore:.* is now .*:DeprecationWarning")
def test_patches_pickles_and_specs_by_old_names(movable: Path) -> None:
    spec = importlib.util.find_spec("movable.old_methods")
    assert spec is not None
    assert "movable.old_methods" not in sys.modules  # found, not loaded
    pickled = b"cmovable.old_methods\nScore\n."  # the class by its module's old name
    new = importlib.import_module("movable.methods.scores")
    assert pickle.loads(pickled) is new.Score  # noqa: S301 - our own bytes
    with mock.patch("movable.old_methods.score", return_value=2):
        assert new.score() == 2
    assert new.score() == 1
    assert importlib.util.find_spec("movable.old_methods") is new.__spec__


def test_unknown_names_are_unknown(movable: Path) -> None:
    for name in ("movable.nothing", "movable.old_methods_too", "siftclip.nothing"):
        with pytest.raises(ModuleNotFoundError, match=f"No module named '{name}'"):
            importlib.import_module(name)
        assert importlib.util.find_spec(name) is None
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'movable\.nowhere'"):
        importlib.import_module("movable.gone")
    assert "movable.gone" not in sys.modules


# ---- packages that have taken the old name of a module ------------------------------------------
def test_a_package_answers_for_the_module_whose_name_it_has(movable: Path) -> None:
    package = importlib.import_module("movable.tasks")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert (package.LIMIT, package._private) == (3, 4)
    assert [str(one.message).partition(";")[0] for one in caught] == [
        "movable.tasks.LIMIT is now movable.tasks.folders.LIMIT",
        "movable.tasks._private is now movable.tasks.folders._private",
    ]
    assert {one.filename for one in caught} == {__file__}
    with pytest.raises(AttributeError, match=r"module 'movable\.tasks' has no attribute 'NOTHING'"):
        _ = package.NOTHING
    with pytest.raises(ImportError, match="cannot import name 'NOTHING'"):
        from movable.tasks import NOTHING  # type: ignore[import-not-found]  # noqa: F401
    assert not hasattr(package, "__wrapped__")


@pytest.mark.filterwarnings("ignore:.* is now .*:DeprecationWarning")
def test_patches_of_a_package_reach_the_module(
    movable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = importlib.import_module("movable.tasks")
    module = importlib.import_module("movable.tasks.folders")
    with mock.patch("movable.tasks.LIMIT", 5):
        assert package.LIMIT == module.LIMIT == 5
    assert package.LIMIT == module.LIMIT == 3
    with monkeypatch.context() as patch:
        patch.setattr("movable.tasks.LIMIT", 6)
        patch.setattr(package, "LIMIT", 7)
        patch.setattr(package, "EXTRA", 8, raising=False)
        patch.delattr(package, "_private")
        assert (module.LIMIT, module.EXTRA, hasattr(module, "_private")) == (7, 8, False)
    assert (module.LIMIT, hasattr(module, "EXTRA"), module._private) == (3, False, 4)
    assert "LIMIT" not in vars(package)


def test_submodules_of_a_package_come_without_a_warning(movable: Path) -> None:
    from movable.tasks import samples  # type: ignore[import-not-found]

    assert samples is importlib.import_module("movable.tasks.samples")
    with pytest.warns(DeprecationWarning, match=r"tasks\.LIMIT is now"):
        from movable.tasks import LIMIT
    assert LIMIT == 3


# ---- Siftclip's own table -----------------------------------------------------------------------
def test_old_names() -> None:
    assert old_name("siftclip.trainer.cli.main") == "siftclip.trainer.cli.main"
    assert {old_name(new): new for new in MOVED.values()} == MOVED  # a new name has one old name
    assert list(MOVED) == sorted(MOVED)


@pytest.mark.usefixtures("movable")
def test_an_old_name_is_that_of_the_module_that_moved() -> None:
    assert old_name("movable.methods.scores") == "movable.old_methods"
    assert old_name("movable.tasks.folders") == "movable.tasks"
    assert old_name("movable.tasks.samples") == "movable.tasks.samples"


# All in one process, because imports of the large packages take seconds.
EVERY_NAME = """
import importlib, json, sys, types, warnings
from siftclip.aliases import MOVED

for number, (old, new) in enumerate(MOVED.items()):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, second = (old, new) if number % 2 else (new, old)
        importlib.import_module(first), importlib.import_module(second)
        at_old, at_new = sys.modules[old], sys.modules[new]
        assert at_new.__name__ == at_new.__spec__.name == new, new
        if hasattr(at_old, "__path__"):  # a package has this name now
            # its own functions and classes, that no submodule of the package hides
            names = [name for name, value in vars(at_new).items()
                     if getattr(value, "__module__", None) == new and not name.startswith("__")]
            for name in names[:1]:
                assert getattr(at_old, name) is getattr(at_new, name), (old, name)
            expected = [f"{old}.{names[0]} is now {new}.{names[0]}"]
        else:
            assert at_old is at_new, old
            expected = [f"{old} is now {new}"]
        importlib.import_module(old)
    texts = [str(one.message) for one in caught if issubclass(one.category, DeprecationWarning)]
    ours = [text.partition(";")[0] for text in texts if "the old name goes" in text]
    assert ours == expected, (ours, expected)
print(len(MOVED))
"""


@pytest.mark.slow
def test_every_name_of_the_table_is_the_module_that_it_names(
    run_python: Any, tmp_path: Path
) -> None:
    script = tmp_path / "every_name.py"
    script.write_text(textwrap.dedent(EVERY_NAME))
    result = run_python(str(script), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == len(MOVED)


# What is kept has the names that classes had first.
OF_WHAT_IS_KEPT = ("test_identities.py", "test_description.py", "test_kept_config.py")


def test_nothing_here_uses_an_old_name() -> None:
    """Else a warning of ours would meet people who have done nothing wrong."""
    folders = ("src", "selectors", "datamodules", "eval", "trainer", "configs", "docs", "tests")
    paths = [path for name in (*folders, "benchmarks") for path in (ROOT / name).rglob("*.*")]
    paths += [*ROOT.glob("*.md"), ROOT / "pyproject.toml", ROOT / "Makefile"]
    used = re.compile(r"\b(siftclip(?:\.\w+)+)(?:\s+import\s+\(?\s*(\w+))?")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in paths
        if path.suffix in {".py", ".yaml", ".md", ".toml", ""}
        and path.name not in ("aliases.py", *OF_WHAT_IS_KEPT)
        for match in used.finditer(path.read_text(encoding="utf-8"))
        if uses_old_name(f"{match[1]}.{match[2] or ''}".rstrip("."))
    ]
    assert len(paths) > 400
    assert not found, "\n".join(found)


def uses_old_name(dotted: str) -> bool:
    """Whether a dotted name begins with that of a module that has moved.

    Where a package has its name now, only what the package does not hold itself is old.
    """
    parts = dotted.split(".")
    for end in range(2, len(parts) + 1):
        name = ".".join(parts[:end])
        if name in MOVED:
            spec = importlib.util.find_spec(name)
            if spec is None or spec.submodule_search_locations is None:
                return True
            if end < len(parts) and importlib.util.find_spec(f"{name}.{parts[end]}") is None:
                return True
    return False


def test_what_an_old_name_is(movable: Path) -> None:
    old = ("movable.old_methods", "movable.old_methods.score", "movable.tasks.LIMIT")
    new = ("movable.methods.scores.score", "movable.tasks", "movable.tasks.folders.LIMIT")
    assert all(map(uses_old_name, old))
    assert not any(map(uses_old_name, new))


def test_importing_siftclip_stays_light() -> None:
    code = "import sys; old = set(sys.modules); import siftclip; print(*sys.modules.keys() - old)"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    imported = set(result.stdout.split())
    assert {"siftclip", "siftclip.aliases"} <= imported
    assert not {"torch", "numpy", "hydra", "importlib.abc", "inspect"} & imported


def test_the_finder_is_there_once() -> None:
    aliases.install()
    assert sum(type(finder).__name__ == "_OldNames" for finder in sys.meta_path) == 1
