"""`siftclip new`: packages that pass their own tests and work in the commands, and refusals."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from siftclip.errors import InputError
from siftclip.eval.results.files import read_results
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.scaffold.packages import EXAMPLE_TASKS, KINDS, write_package

ROOT = Path(__file__).parents[3]
NAMES = {"selector": "repeated_words", "loss": "focal", "task": "counting"}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment, in which the three packages are installed.

    It sees the packages of this environment, which take minutes to install.
    """
    folder = tmp_path_factory.mktemp("scratch")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    python = folder / "env" / "bin" / "python"
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    places = [ROOT / "src", sysconfig.get_path("purelib")]
    (site / "host.pth").write_text("".join(f"{place}\n" for place in places))
    packages = []
    for kind, name in NAMES.items():
        write_package(kind, name, folder / name)
        packages += ["-e", str(folder / name)]
    install = ["install", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), *install, *packages],
        check=True,
        capture_output=True,
    )
    return python


@pytest.fixture
def run(scratch: Path, child_environment: dict[str, str], tmp_path: Path) -> Callable[..., str]:
    """Run words with the Python of the scratch environment, and return what it prints."""

    def started(*words: str) -> str:
        result = subprocess.run(
            [str(scratch), *words],
            cwd=tmp_path,
            env=child_environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
        return result.stdout

    return started


@pytest.mark.slow
def test_packages_pass_their_own_tests(scratch: Path, run: Callable[..., str]) -> None:
    folders = [str(scratch.parents[2] / name) for name in NAMES.values()]
    printed = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *folders)
    assert "4 passed" in printed


@pytest.fixture
def installed(scratch: Path, child_environment: dict[str, str]) -> None:
    """The commands of this environment find the three packages, too."""
    (site,) = scratch.parents[1].glob("lib/python*/site-packages")
    places = [site, *(scratch.parents[2] / name for name in NAMES.values())]
    child_environment["PYTHONPATH"] = os.pathsep.join(map(str, places))


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_the_packages_work_in_the_commands(
    base: list[str], scratch: Path, cli: Any, tmp_path: Path
) -> None:
    def run(*words: str) -> str:
        result = cli(*words)
        assert result.returncode == 0, result.stderr[-3000:]
        return str(result.stdout)

    words = [option for option in base if not option.startswith("scale.samples")]
    mine = ("selector=plugin", "selector.plugin=repeated_words", "selector.parameters.penalty=0.1")
    train = ("train", *words, "scale.samples_seen=160")
    loss = ("loss=plugin", "loss.plugin=focal", "loss.parameters.gamma=2")
    run(*train, *mine, *loss, "trainer.micro_batch_size=8", "online=every_epoch")
    (path,) = (tmp_path / "outputs" / "train").iterdir()
    in_loop = ("selector@online.selector=plugin", "online.selector.plugin=repeated_words")
    run(*train, "selector=random", "selector.fraction=1", *loss, "online=every_step", *in_loop)
    (looped,) = {*(tmp_path / "outputs" / "train").iterdir()} - {path}
    assert looped.name.startswith("random+repeated_words+focal-s0-")
    chosen = RunDir(path=looped).summary
    assert chosen is not None
    assert chosen["steps"] == 10
    assert chosen["loaded_samples"] > chosen["trained_samples"]
    summary = RunDir(path=path).summary
    assert summary is not None
    assert summary["steps"] == 10
    assert path.name.startswith("repeated_words+infobatch+focal-s0-")
    tasks = scratch.parents[2] / NAMES["task"] / EXAMPLE_TASKS
    printed = run(
        *("eval", str(path), f"eval.root={tasks}"),
        *("trainer.accelerator=cpu", "data.num_workers=0", "progress=false"),
    )
    assert "counting" in printed
    (result,) = read_results(path / "eval_results.jsonl")
    assert (result.samples, result.chances) == (4, {"acc": 0.1})
    assert set(result.metrics) >= {"acc", "acc_within_1"}


def test_files_of_a_package(tmp_path: Path) -> None:
    files = write_package("selector", "repeated_words", tmp_path / "new")
    assert [path.name for path in files] == [
        "pyproject.toml",
        "README.md",
        "repeated_words_selector.py",
        "test_repeated_words_selector.py",
    ]
    code = files[2].read_text()
    assert "class RepeatedWords(ReadsFeatures, ScoreSelector):" in code
    assert len(code.splitlines()) <= 40
    assert 'repeated_words = "repeated_words_selector:RepeatedWords"' in files[0].read_text()


def test_a_kind_of_task_comes_with_a_task(tmp_path: Path) -> None:
    files = write_package("task", "counting", tmp_path / "new")
    folder = tmp_path / "new" / "example_tasks" / "counting"
    assert [path.relative_to(folder).as_posix() for path in files[4:]] == [
        "dataset_type.txt",
        "test/nshards.txt",
        "test/0.tar",
    ]
    with tarfile.open(files[-1]) as archive:
        assert archive.getnames()[:2] == ["s1.png", "s1.json"]
        assert len(archive.getnames()) == 8
    assert "eval.root=example_tasks" in files[1].read_text()
    loss = write_package("loss", "counting", tmp_path / "loss")
    assert "example_tasks" not in loss[1].read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_examples_are_short_and_formatted(kind: str, tmp_path: Path) -> None:
    written = write_package(kind, "my_example", tmp_path / "new")
    files = [path for path in written if path.suffix == ".py"]
    ruff = Path(sysconfig.get_path("scripts")) / "ruff"
    for command in (
        ["check", "--isolated", "--select", "E,F,I,B"],
        ["format", "--isolated", "--check"],
    ):
        subprocess.run([str(ruff), *command, "--line-length", "100", *map(str, files)], check=True)
    assert len(files[0].read_text().splitlines()) <= 40


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("tasks", "a", r"KIND must be one of selector, loss, task\. Got 'tasks'"),
        ("loss", "Focal", r"NAME must consist of small letters.*Got 'Focal'"),
        ("loss", "../focal", "NAME must consist of"),
        ("loss", "a-b", "NAME must consist of"),
        ("loss", "class", "NAME must not be a word or a module of Python"),
        ("selector", "json", "NAME must not be"),
    ],
)
def test_wrong_words(kind: str, name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        write_package(kind, name, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("precious")
    with pytest.raises(InputError, match="must be a new folder, or an empty one"):
        write_package("loss", "focal", tmp_path)
    with pytest.raises(InputError, match="must be a new folder"):
        write_package("loss", "focal", tmp_path / "mine.py")


def test_the_command(cli: Any, tmp_path: Path) -> None:
    result = cli("new", "loss", "focal")
    assert result.returncode == 0
    assert (tmp_path / "focal" / "focal_loss.py").is_file()
    assert "loss=plugin loss.plugin=focal" in result.stdout
    again = cli("new", "loss", "focal")
    assert again.returncode == 2
    assert again.stderr.startswith("siftclip new: error: focal must be a new folder")
    assert "usage: siftclip new KIND NAME" in cli("new").stdout
    assert cli("new", "loss").returncode == 2
