"""What kept results are known by: parameters, code and files, and nothing that does not matter."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from siftclip.datamodules.identity.code_identity import _in_memory, built_in_code, code_identity
from siftclip.datamodules.identity.identities import (
    differences,
    kept_identity,
    named_files,
    say_why_not,
    selector_identity,
    stored_targets,
)
from siftclip.files import content_digest, file_stamp, identity_hash, write_json
from siftclip.selectors.core.source import FeatureFile
from siftclip.selectors.methods.clip_score import ClipScore
from siftclip.selectors.methods.clipcov.clipcov import ClipCov
from siftclip.selectors.methods.normsim import NormSim

SELECTOR = """
    from torch import Tensor, zeros

    from siftclip.selectors.core.base import Chunk, ScoreSelector

    {imports}


    class Mine(ScoreSelector):
        def __init__(self, *, weight: float = 1.0, **rule) -> None:
            super().__init__(**rule)
            {keep}

        def score(self, chunk: Chunk) -> Tensor:
            return zeros(len(chunk)) + {score}
"""

Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes modules into a folder that Python imports from; they are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def write(name: str, text: str, **parts: str) -> None:
        defaults = {"imports": "", "keep": "self.weight = weight", "score": "1.0"}
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).format(**(defaults | parts)))

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def load(name: str) -> ModuleType:
    """Import a module as a new process would."""
    for known in [known for known in sys.modules if known.partition(".")[0] == name.split(".")[0]]:
        del sys.modules[known]
    importlib.invalidate_caches()
    return importlib.import_module(name)


def identity(name: str, **parameters: Any) -> str:
    return identity_hash(selector_identity(load(name).Mine(fraction=0.5, **parameters)))


def test_an_edited_selector_is_another_one(write: Write) -> None:
    write("mine_a.py", SELECTOR)
    first = identity("mine_a")
    assert identity("mine_a") == first
    write("mine_a.py", SELECTOR, score="2.0")
    assert identity("mine_a") != first
    write("mine_a.py", SELECTOR)
    assert identity("mine_a") == first


@pytest.mark.parametrize(
    ("module", "helper", "imports"),
    [
        ("mine_b/scores.py", "mine_b/kernels.py", "from mine_b.kernels import K"),
        ("mine_b/scores.py", "mine_b/kernels.py", "from .kernels import K"),
        ("mine_b/scores.py", "mine_b/kernels.py", "from . import kernels; K = kernels.K"),
        ("mine_b/scores.py", "mine_b/sub/kernels.py", "import mine_b.sub.kernels as k; K = k.K"),
        ("mine_b/scores.py", "mine_b/__init__.py", "from mine_b import K"),
        ("mine_c.py", "beside.py", "from beside import K"),
    ],
)
def test_what_a_selector_imports_of_its_project_counts(
    write: Write, module: str, helper: str, imports: str
) -> None:
    name = module.removesuffix(".py").replace("/", ".")
    for folder in {Path(module).parent, Path(helper).parent} - {Path(".")}:
        write(f"{folder}/__init__.py", "")
    write(module, SELECTOR, imports=imports, score="K")
    write(helper, "K = 1.0\n")
    first = identity(name)
    write(helper, "K = 3.0\n")
    sys.modules.pop("beside", None)
    assert identity(name) != first
    write(helper, "K = 1.0\n")
    sys.modules.pop("beside", None)
    assert identity(name) == first


def test_the_base_class_counts_and_other_modules_do_not(write: Write) -> None:
    write("parent.py", SELECTOR)
    write("unused.py", "K = 1\n")
    write("mine_d.py", "import parent\n\n\nclass Mine(parent.Mine):\n    pass\n")
    first = identity("mine_d")
    write("unused.py", "K = 2\n")
    assert identity("mine_d") == first
    write("parent.py", SELECTOR, score="2.0")
    sys.modules.pop("parent")
    assert identity("mine_d") != first


def test_parameters_in_private_attributes_count(write: Write) -> None:
    write("mine_e.py", SELECTOR, keep="self._weight = weight")
    assert identity("mine_e", weight=1.0) != identity("mine_e", weight=2.0)


def test_scores_do_not_depend_on_how_much_is_kept(write: Write) -> None:
    write("mine_f.py", SELECTOR, keep="self._weight = weight")
    mine = load("mine_f").Mine
    whole = [selector_identity(mine(fraction=f), without=("rule",)) for f in (0.1, 0.2)]
    assert whole[0] == whole[1]
    assert selector_identity(mine(fraction=0.1)) != selector_identity(mine(fraction=0.2))


def test_code_that_was_edited_after_it_was_loaded_is_not_what_runs(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write("mine_g.py", SELECTOR)
    selector = load("mine_g").Mine(fraction=0.5)
    first = selector_identity(selector)
    time.sleep(0.02)  # the clock of a file system is coarse
    write("mine_g.py", SELECTOR, score="2.0")
    stale = selector_identity(selector)  # runs the old code, and must not pass for the new one
    assert "has changed since this process loaded it" in caplog.text
    new = selector_identity(load("mine_g").Mine(fraction=0.5))
    codes = [found["code"]["mine_g"] for found in (first, stale, new)]
    assert len(set(codes)) == 3


@pytest.mark.parametrize("group", ["siftclip.selectors", "siftclip.task_kinds"])
def test_a_distribution_counts_by_its_version(write: Write, tmp_path: Path, group: str) -> None:
    info = tmp_path / "mine_h-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine-h\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\nmine = mine_h:Mine\n")
    write("mine_h.py", SELECTOR)
    from siftclip.datamodules.identity import code_identity as module

    module._distributions.cache_clear()
    try:
        selector = load("mine_h").Mine(fraction=0.5)
        code = selector_identity(selector)["code"]
    finally:
        module._distributions.cache_clear()
    assert code["mine-h"] == "1.0"
    assert len(code["mine_h"]) == 64


def test_our_methods_count_with_the_kernels_that_they_import() -> None:
    modules = code_identity({ClipCov})
    assert {"siftclip.selectors.clipcov", "siftclip.selectors.clipcov_greedy"} <= modules.keys()
    assert "siftclip.selectors.semdedup" not in modules
    assert not any(name.startswith("siftclip.datamodules") for name in modules)


def test_our_methods_do_not_depend_on_what_only_type_checkers_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> None:
        raise AssertionError("all installed distributions were read")

    monkeypatch.setattr("siftclip.datamodules.identity.code_identity._distributions", refuse)
    (digests,) = built_in_code(["siftclip.selectors.methods.clip_score"]).values()
    assert all(name.startswith("siftclip.") for name in digests)


def test_files_that_a_parameter_names_count_by_content(tmp_path: Path) -> None:
    path = tmp_path / "target.npy"
    np.save(path, np.ones((2, 3), np.float32))
    selector = NormSim(features="l14", target=FeatureFile(path=str(path)), fraction=0.5)
    first, status = selector_identity(selector), path.stat()
    np.save(path, np.zeros((2, 3), np.float32))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as if it had not changed
    assert path.stat().st_size == status.st_size
    assert selector_identity(selector)["files"] != first["files"]
    assert named_files(["l14", "", ".", "/", "../", "a\0b", "x" * 5000, "nothing.npy"]) == {}


def test_stamps_see_a_change_in_the_checksums_of_an_npz(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    stamps = []
    for value in (0.0, 1.0):
        np.savez(path, l14_img=np.full((50_000, 4), value, np.float32))
        os.utime(path, ns=(1, 1))
        stamps.append(file_stamp(path))
    assert stamps[0][:3] == stamps[1][:3]
    assert stamps[0] != stamps[1]
    assert len(content_digest(path)) == 64


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.zeros(3), torch.ones(3)),
        (np.zeros(3), np.ones(3)),
        (b"a", b"b"),
        ({1, 2}, {1, 3}),
        ({"b": 1, "a": 2}, {"a": 2, "b": 1}),
        (torch.float16, torch.bfloat16),
    ],
)
def test_values_of_parameters_are_told_apart(write: Write, first: Any, second: Any) -> None:
    write("mine_i.py", SELECTOR)
    assert identity("mine_i", weight=first) == identity("mine_i", weight=first)
    assert identity("mine_i", weight=first) != identity("mine_i", weight=second)


def test_differences_are_said_in_words(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clip = ClipScore(features="l14", fraction=0.5)
    old = kept_identity("scores", {**selector_identity(clip), "pool": "a"})
    new = {
        **old,
        "code": {**old["code"], "siftclip.selectors.methods.clip_score": "0"},
        "pool": "b",
    }
    assert differences(old, new) == ["the code (siftclip.selectors.methods.clip_score)", "the pool"]
    assert differences(old, old) == []
    assert "earlier version" in differences({"selector": old["selector"]}, new)[0]
    write_json(tmp_path / "x" / "identity.json", old)
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "identity.json").write_text("no JSON")
    say_why_not("scores", new, tmp_path.glob("*/identity.json"), like="selector")
    assert "not reused: scores of" in caplog.text
    assert "the code (siftclip.selectors.methods.clip_score); the pool" in caplog.text


def test_modules_and_files_that_code_names_in_a_text_count(write: Write, tmp_path: Path) -> None:
    imports = """import importlib, pathlib; importlib.import_module("helps"); \
WORDS = pathlib.Path(__file__).parent / "lists" / "words.txt\""""
    write("mine.py", SELECTOR, imports=imports)
    write("helps.py", "def f(x): return x")
    write("lists/words.txt", "a")

    def identity() -> dict[str, str]:
        return code_identity({load("mine").Mine})

    first = identity()
    assert {"helps", "mine: words.txt"} <= first.keys()
    write("lists/words.txt", "b")
    second = identity()
    assert {name for name in first if first[name] != second[name]} == {"mine: words.txt"}
    write("helps.py", "def f(x): return -x")
    third = identity()
    assert {name for name in first if second[name] != third[name]} == {"helps"}


def test_files_of_a_folder_that_a_parameter_names_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "lists"
    write_json(folder / "a" / "words.json", 1)
    first = named_files([str(folder)])
    write_json(folder / ".cache" / "index.json", 1)
    assert named_files([str(folder)]) == first  # what tools keep there moves no answer
    write_json(folder / "a" / "words.json", 2)
    assert named_files([str(folder)]) != first
    monkeypatch.setattr("siftclip.datamodules.identity.identities._FILES_OF_A_FOLDER", 0)
    assert named_files([str(folder)]) == {str(folder): "too many files"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("class A:\n    alpha = 1.0", "class A:\n    alpha = 2.0"),
        ("@deco\ndef f(x): return x", "@deco\ndef f(x): return -x"),
        ("TABLE = [1]\ndef f(x): return TABLE", "TABLE = [2]\ndef f(x): return TABLE"),
        (
            "class A:\n    @functools.cached_property\n    def f(self): return 1",
            "class A:\n    @functools.cached_property\n    def f(self): return 2",
        ),
        (
            "SET = {'a', 'b'}\ndef f(x): return [SET for _ in x]",
            "SET = {'a', 'c'}\ndef f(x): return [SET for _ in x]",
        ),
    ],
)
def test_code_in_memory_is_told_apart(before: str, after: str) -> None:
    head = """
import functools
def deco(f):
    @functools.wraps(f)
    def inner(*args): return f(*args)
    return inner
"""

    def digest(text: str) -> str:
        module = ModuleType("notebook")
        exec(head + text, module.__dict__)  # noqa: S102 - as a notebook does
        return _in_memory(module)

    assert digest(before) == digest(before)
    assert digest(before) != digest(after)


def test_a_class_of_a_module_without_a_file_counts_by_what_is_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = ModuleType("notebook")
    exec("class Mine:\n    def score(self): return 1\n", module.__dict__)  # noqa: S102
    monkeypatch.setitem(sys.modules, "notebook", module)
    assert code_identity([module.Mine])["notebook"] == _in_memory(module)


def test_targets_of_ours_have_the_names_that_are_kept() -> None:
    file = {"_target_": "siftclip.selectors.FeatureFile", "path": "a.npz"}
    node = {
        "_target_": "siftclip.selectors.Then",
        "stages": [{"_target_": "my_package.Mine", "file": file}],
        "seed": 1,
    }
    found = stored_targets(node)
    assert found["_target_"] == "siftclip.selectors.compose.Then"
    (stage,) = found["stages"]
    assert stage["_target_"] == "my_package.Mine"
    assert stage["file"] == {**file, "_target_": "siftclip.selectors.source.FeatureFile"}
    assert (found["seed"], file["_target_"]) == (1, "siftclip.selectors.FeatureFile")
