"""A folder with inputs of every command, and the answers of commands that nobody broke off."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from broken_off import WORKS, Work, answers
from python_server import environment_of_children

from siftclip.trainer.demo.pool import DemoData


@dataclass(frozen=True, kw_only=True)
class Whole:
    """What a command answers when nothing disturbs it, and how long it takes."""

    answers: dict[str, Any]
    seconds: float
    size_bytes: int  # of what it has written


class Folders:
    """Makes folders with the inputs, and runs commands in them."""

    def __init__(self, parent: Path, data: DemoData, server: Any, environment: Any) -> None:
        self._parent, self._server, self._environment = parent, server, environment
        self._inputs = parent / "inputs"
        self._inputs.mkdir()
        for source, name in ((data.pool, "pool"), (data.tasks, "tasks")):
            shutil.copytree(source, self._inputs / name)
        shutil.copytree(data.root / "features", self._inputs / "features")
        self._whole: dict[str, Whole] = {}
        self._count = 0

    def make(self, work: Work, parent: Path | None = None) -> Path:
        """Make a folder with what the command reads."""
        if work.needs_run and not (self._inputs / "run").exists():
            self._make_run()
        self._count += 1
        folder = (parent or self._parent) / f"folder-{self._count}"
        shutil.copytree(self._inputs, folder)
        return folder

    def _make_run(self) -> None:
        folder = self._parent / "of-run"
        shutil.copytree(self._inputs, folder)
        words = [*WORKS["train"].words, "run_dir=run", "scale.samples_seen=64"]
        result = self._run(folder, words)
        assert result.returncode == 0, result.stderr
        shutil.copytree(folder / "run", self._inputs / "run")

    def whole(self, name: str) -> Whole:
        """Run a command that nothing disturbs, once."""
        if name not in self._whole:
            work = WORKS[name]
            folder = self.make(work)
            before = _size_bytes(folder)
            start = time.monotonic()
            self.finish(folder, work)
            seconds = time.monotonic() - start
            size_bytes = _size_bytes(folder) - before
            self._whole[name] = Whole(
                answers=answers(folder, work), seconds=seconds, size_bytes=size_bytes
            )
            shutil.rmtree(folder)
        return self._whole[name]

    def start(self, folder: Path, work: Work, *, ranks: int | None = None) -> Any:
        """Start a command; what it prints goes to a folder beside."""
        return self._server.start(
            *("-m", "siftclip.trainer.cli", *work.words),
            cwd=folder,
            folder=self._printed(folder),
            env=self._environment,
            ranks=ranks,
        )

    def errors(self, folder: Path) -> str:
        """Read what the command that started last in a folder has said."""
        return self.all_errors(folder)[-1]

    def all_errors(self, folder: Path) -> list[str]:
        """Read what the commands in a folder have said, in the order of their starts."""
        printed = sorted(folder.parent.glob(f"{folder.name}.printed-*"), key=_number)
        return [(path / "stderr").read_text(encoding="utf-8") for path in printed]

    def run(self, folder: Path, work: Work, *, ranks: int | None = None) -> Any:
        """Run a command to its end."""
        return self._run(folder, [*work.words], ranks)

    def finish(self, folder: Path, work: Work, *, ranks: int | None = None) -> None:
        """Run a command, which must end well."""
        result = self.run(folder, work, ranks=ranks)
        assert result.returncode == 0, result.stderr[-4000:]

    def _run(self, folder: Path, words: list[str], ranks: int | None = None) -> Any:
        return self._server.run(
            *("-m", "siftclip.trainer.cli", *words),
            cwd=folder,
            folder=self._printed(folder),
            env=self._environment,
            ranks=ranks,
        )

    def _printed(self, folder: Path) -> Path:
        self._count += 1
        printed = folder.with_name(f"{folder.name}.printed-{self._count}")
        printed.mkdir()
        return printed


def _number(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="session")
def folders(
    demo_data: DemoData, python_server: Any, tmp_path_factory: pytest.TempPathFactory
) -> Folders:
    """See `Folders`."""
    environment = environment_of_children()
    return Folders(tmp_path_factory.mktemp("promises"), demo_data, python_server, environment)
