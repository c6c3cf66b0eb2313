"""The five folders at the top are the package siftclip, and hide nothing of the standard library.

`selectors/` shares its name with a module that subprocess, asyncio and multiprocessing import. With
the repository root first on `sys.path` only the guard in `selectors/__init__.py` keeps them alive.
"""

from __future__ import annotations

import ast
import importlib
import importlib.resources
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("trainer", "datamodules", "selectors", "eval", "configs")

# Imports everything that needs the standard library's selectors, and says which one it got.
PROBE = """
import asyncio, json, multiprocessing.connection, selectors, socketserver, subprocess, sys
selectors.DefaultSelector().close()
subprocess.run([sys.executable, "-c", ""], check=True)
print(json.dumps({"path": sys.path[0], "selectors": selectors.__file__}))
"""

# The same, then our own package beside it.
BOTH = (
    PROBE
    + """
import siftclip.selectors, siftclip.errors
assert siftclip.selectors.__name__ == "siftclip.selectors"
assert siftclip.selectors is not selectors is sys.modules["selectors"]
"""
)

LOADER_PROBE = """
import os, sys
from torch.utils.data import DataLoader, Dataset

class Probe(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        import asyncio, selectors, socketserver, subprocess
        import siftclip.selectors.core.base
        return os.getpid(), selectors.__file__, sys.path[0]

if __name__ == "__main__":
    for method in sys.argv[1:]:
        loader = DataLoader(
            Probe(), batch_size=None, num_workers=1, multiprocessing_context=method
        )
        for pid, file, first in loader:
            assert pid != os.getpid()
            print(method, file, first)
"""

TORCHRUN_PROBE = """
import asyncio, os, selectors, socketserver, subprocess, sys
from pathlib import Path
import siftclip.selectors.core.base
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1])
dist.all_reduce(total)
line = f"{total.item()} {selectors.__file__} {sys.path[0]}"
Path(sys.argv[1], f"rank{dist.get_rank()}").write_text(line)
dist.destroy_process_group()
"""


def standard_selectors() -> Path:
    """Where the running Python has the standard library's module."""
    return Path(os.__file__).parent / "selectors.py"


def environment(**extra: str) -> dict[str, str]:
    """This process's environment, without what would keep the root off `sys.path`."""
    names = ("PYTHONSAFEPATH", "PYTHONPATH", "PYTEST_ADDOPTS")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return {**kept, "OMP_NUM_THREADS": "1", **extra}


def run_python(
    *arguments: str, cwd: Path, extra: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run this Python in `cwd`, as a user would."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment(**(extra or {})),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def python_files() -> Iterator[Path]:
    """All Python files of the repository's own."""
    for folder in (*FOLDERS, "tests", "benchmarks"):
        yield from (ROOT / folder).rglob("*.py")
    yield from (ROOT / "src" / "siftclip").glob("*.py")


# ---- the standard library's selectors stays reachable -------------------------------------------
@pytest.mark.parametrize("folder", [".", "src/siftclip", "tests"])
def test_python_finds_the_standard_library(folder: str) -> None:
    result = run_python("-c", PROBE, cwd=ROOT / folder)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["path"] == ""  # the folder itself comes first, else this proves nothing
    assert Path(found["selectors"]) == standard_selectors()


def test_both_modules_live_in_one_process() -> None:
    result = run_python("-c", BOTH, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_the_guard_is_what_helps(tmp_path: Path) -> None:
    """A folder without the guard breaks the same probe, so the tests above can fail."""
    package = tmp_path / "selectors"
    package.mkdir()
    (package / "__init__.py").touch()
    assert "has no attribute 'SelectSelector'" in run_python("-c", PROBE, cwd=tmp_path).stderr
    shutil.copy(ROOT / "selectors" / "__init__.py", package)
    result = run_python("-c", PROBE, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_pytest_starts_from_the_root(tmp_path: Path) -> None:
    test = tmp_path / "test_probe.py"
    test.write_text(f"def test_probe():\n    exec({BOTH!r}, {{}})\n")
    for mode in ("importlib", "prepend"):
        options = ("-q", "-p", "no:cacheprovider", f"--import-mode={mode}", f"--rootdir={ROOT}")
        result = run_python("-m", "pytest", *options, str(test), cwd=ROOT)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "1 passed" in result.stdout


@pytest.mark.slow
def test_loader_workers_start(tmp_path: Path) -> None:
    (tmp_path / "loader_probe.py").write_text(LOADER_PROBE)
    methods = ("fork", "spawn", "forkserver")
    # with -m the root comes first, here and, through multiprocessing, in the workers
    extra = {"PYTHONPATH": str(tmp_path)}
    result = run_python("-m", "loader_probe", *methods, cwd=ROOT, extra=extra)
    assert result.returncode == 0, result.stderr
    expected = [f"{method} {standard_selectors()} {ROOT}" for method in methods]
    assert result.stdout.splitlines() == expected


@pytest.mark.slow
def test_torchrun_starts_two_ranks(tmp_path: Path) -> None:
    (tmp_path / "rank_probe.py").write_text(TORCHRUN_PROBE)
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", "2")
    rendezvous = ("--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0")
    program = ("-m", "rank_probe", str(tmp_path))
    extra = {"PYTHONPATH": str(tmp_path)}
    result = run_python(*torchrun, *rendezvous, *program, cwd=ROOT, extra=extra)
    assert result.returncode == 0, result.stderr
    for rank in (0, 1):
        line = (tmp_path / f"rank{rank}").read_text()
        assert line == f"3 {standard_selectors()} {ROOT}"


# ---- the five folders are the package -----------------------------------------------------------
def test_src_holds_links_and_what_all_folders_share() -> None:
    package = ROOT / "src" / "siftclip"
    shared = {path.name for path in package.glob("*.py")}
    assert "__init__.py" in shared
    found = {path.name for path in package.iterdir()} - {"__pycache__"}
    assert found == {"py.typed", "__init__.pyi", *shared, *FOLDERS}
    for folder in FOLDERS:
        assert (package / folder).is_symlink()
        assert os.readlink(package / folder) == f"../../{folder}"
        assert (package / folder).resolve() == ROOT / folder


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_a_subpackage(folder: str) -> None:
    module = importlib.import_module(f"siftclip.{folder}")
    assert module.__file__ == str(ROOT / folder / "__init__.py")  # the real file, not the link


def test_configs_load_from_the_top_level_folder() -> None:
    tree = importlib.resources.files("siftclip.configs")
    assert Path(str(tree)) == ROOT / "configs"
    assert tree.joinpath("siftclip.yaml").is_file()


def test_every_folder_with_code_is_a_package() -> None:
    missing = [
        str(path.parent.relative_to(ROOT))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if not (path.parent / "__init__.py").is_file()
    ]
    assert not missing, f"without __init__.py: {sorted(set(missing))}"


def test_no_other_module_bears_a_standard_name() -> None:
    """`python selectors/x.py` puts `selectors/` first on the path: a `random.py` would win."""
    found = {path.relative_to(ROOT) for path in python_files()}
    names = {path for path in found if path.stem in sys.stdlib_module_names}
    assert not names


def test_no_other_code_at_the_root() -> None:
    """The root is on siftclip's path in a checkout, so what lies there would be part of it.

    A new folder needs a link in src/siftclip, a line in each of the lists of pyproject.toml, and
    its name in FOLDERS above.
    """
    assert not list(ROOT.glob("*.py"))
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(FOLDERS)


def test_imports_say_siftclip() -> None:
    """`import trainer` works only in some ways of starting Python, relative imports in others."""
    found = []
    files = list(python_files())
    assert len(files) > 40
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = ["." * node.level + (node.module or "")]
                if node.module == "siftclip" and any(alias.name == "eval" for alias in node.names):
                    names.append("eval")  # it would hide the builtin
            else:
                continue
            bad = [name for name in names if name.startswith(".") or name.split(".")[0] in FOLDERS]
            found += [f"{path.relative_to(ROOT)}:{node.lineno}: {name}" for name in bad]
    assert not found, "\n".join(found)
