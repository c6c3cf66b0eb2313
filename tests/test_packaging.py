"""The wheel and the sdist hold the whole package, and an installed wheel works away from here."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import siftclip
from siftclip.trainer.settings.describing.help import register_resolvers

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("trainer", "datamodules", "selectors", "eval", "configs")
VERSION = "0.1.0"


def run(*command: str, cwd: Path, **extra: str) -> str:
    """Run this Python with `command` and give what it printed."""
    names = ("PYTHONSAFEPATH", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    result = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**kept, "OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **extra},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def package_files() -> set[str]:
    """The files of the five folders, relative to the root."""
    found = {
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in {".py", ".pyi", ".yaml", ".j2", ".json"}
    }
    assert len(found) > 60
    return found


def shared_files() -> set[str]:
    """The files of the package itself, which the lists in pyproject.toml name one by one."""
    found = {path.name for path in (ROOT / "src" / "siftclip").iterdir() if not path.is_symlink()}
    assert {"__init__.py", "py.typed", "aliases.py"} <= found
    return found - {"__pycache__"}


def wheel_names(wheel: Path) -> set[str]:
    """What a wheel holds."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with wheel and sdist, built without a network."""
    folder = tmp_path_factory.mktemp("dist")
    run("-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", str(folder), cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    """The wheel."""
    return dist / f"siftclip-{VERSION}-py3-none-any.whl"


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel is installed in; on PYTHONPATH it comes before the checkout."""
    target = tmp_path_factory.mktemp("installed")
    options = ("--quiet", "--no-deps", "--no-index", "--no-compile", "--target", str(target))
    run("-m", "pip", "install", *options, str(wheel), cwd=target)
    return target


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = wheel_names(wheel)
    expected = {f"siftclip/{name}" for name in package_files()}
    assert not expected - names
    assert {name.split("/")[0] for name in names} == {"siftclip", f"siftclip-{VERSION}.dist-info"}
    assert {name.split("/")[1] for name in names if name.startswith("siftclip/")} == {
        *shared_files(),
        *FOLDERS,
    }


def test_wheel_of_the_sdist_is_the_same(dist: Path, wheel: Path, tmp_path: Path) -> None:
    """An sdist that followed the links under src/ would have lost the real folders."""
    with tarfile.open(dist / f"siftclip-{VERSION}.tar.gz") as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
        for member in archive:
            archive.extract(member, tmp_path, filter="data")
    assert not package_files() - names
    assert not {f"src/siftclip/{name}" for name in shared_files()} - names
    unpacked = tmp_path / f"siftclip-{VERSION}"
    run("-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path), cwd=unpacked)
    assert wheel_names(tmp_path / wheel.name) == wheel_names(wheel)


def test_installed_wheel_is_what_runs(installed: Path, tmp_path: Path) -> None:
    code = f"""
import importlib, importlib.resources, json, siftclip
modules = [siftclip] + [importlib.import_module(f"siftclip.{{name}}") for name in {FOLDERS!r}]
tree = importlib.resources.files("siftclip.configs")
print(json.dumps([[m.__file__ for m in modules], tree.joinpath("siftclip.yaml").is_file()]))
"""
    files, has_configs = json.loads(run("-c", code, cwd=tmp_path, PYTHONPATH=str(installed)))
    assert files == [
        str(installed / "siftclip" / folder / "__init__.py") for folder in ("", *FOLDERS)
    ]
    assert has_configs
    usage = run("-m", "siftclip.trainer.cli", "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert "siftclip COMMAND" in usage


def test_installed_wheel_finds_its_configs(installed: Path, tmp_path: Path) -> None:
    command = ("-m", "siftclip.trainer.cli", "select", "--help")
    text = run(*command, cwd=tmp_path, PYTHONPATH=str(installed))
    register_resolvers()
    config = OmegaConf.load(installed / "siftclip" / "configs" / "select.yaml")
    assert text.rstrip() == str(config.hydra.help.template).rstrip()


def test_installed_wheel_takes_an_experiment_of_ones_own(installed: Path, tmp_path: Path) -> None:
    experiment = tmp_path / "mine" / "experiment" / "mine.yaml"
    experiment.parent.mkdir(parents=True)
    experiment.write_text(
        "# @package _global_\n"
        "defaults:\n  - override /selector: random\n  - override /model: vit_tiny\n"
        "scale:\n  samples_seen: 1234\n"
    )
    options = ("--config-dir", str(experiment.parents[1]), "--cfg", "job")
    overrides = ("experiment=mine", "pool.root=x", "selector.fraction=0.7")
    command = ("-m", "siftclip.trainer.cli", "train", *options, *overrides)
    text = run(*command, cwd=tmp_path, PYTHONPATH=str(installed))
    for line in ("  samples_seen: 1234", "  name: vit_tiny", "  name: random", "  fraction: 0.7"):
        assert line in text.splitlines()
    assert "  root: x" in text.splitlines()


# ---- what must not be in the repository ---------------------------------------------------------
REGISTRY = re.compile(
    rb"(?<!no-emit-)(index-url|find-links|index_url|find_links)"
    rb"|(https?|file)://\S*/simple\b|(https?|file)://\S*(pypi|wheels|pythonhosted)",
    re.IGNORECASE,
)


def repository_files() -> Iterator[Path]:
    """The files of the checkout that .gitignore does not name."""
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    ignored = [".git", *(line.strip("/") for line in lines if line and not line.startswith("#"))]

    def kept(name: str) -> bool:
        return not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)

    for folder, folders, files in os.walk(ROOT):
        folders[:] = filter(kept, folders)
        for name in filter(kept, files):
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink():
                yield path


@pytest.mark.parametrize(
    "line",
    [
        b"--index-url https://example.org/simple",
        b"--extra-index-url=x",
        b"find-links = /opt",
        b"https://example.org/root/simple/torch",
    ],
)
def test_a_registry_address_is_recognised(line: bytes) -> None:
    assert REGISTRY.search(line)


def test_no_file_holds_a_registry_address() -> None:
    """Where packages come from is a setting of the machine that installs them."""
    files = [path for path in repository_files() if path != Path(__file__).resolve()]
    assert {ROOT / "pyproject.toml", ROOT / "constraints.txt", ROOT / "Makefile"} <= set(files)
    found = {str(path.relative_to(ROOT)) for path in files if REGISTRY.search(path.read_bytes())}
    assert not found


def test_version_is_the_same_in_code_and_metadata() -> None:
    assert importlib.metadata.version("siftclip") == siftclip.__version__
