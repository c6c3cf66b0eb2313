"""Files that commands have left are damaged: the same command mends them, or names a way out.

What it can make again, it makes again, to the same bytes. What only it knows, such as how far a run
is, it refuses in one line that names the file. Never does it end in an internal error, wait for a
pipe, or go on with another answer.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from broken_off import WORKS, Work, answers
from damages import DAMAGES

TIMES = {"embed": 4, "target": 3, "score": 4, "select": 6, "train": 6, "eval": 3, "compare": 2}
NIGHTLY_TIMES = 60  # of each command
UNFINISHED = ("summary.json", "model", "checkpoints/step-18.ckpt")  # of a run, taken away again
# What no command reads again. Logs of a finished run, and what only people read.
NOT_READ = ("metrics.jsonl", "metrics.csv", "report.html", "report.md", "results.csv")


def _files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def finished(folders: Any) -> Any:
    """`finished(name, breaks_off)`: a folder in which a command has run, and what it has left."""
    made: dict[tuple[str, bool], tuple[Path, list[Path]]] = {}

    def finish(name: str, breaks_off: bool) -> tuple[Path, list[Path]]:
        if (name, breaks_off) not in made:
            work = WORKS[name]
            folder = folders.make(work)
            inputs = _files(folder)
            folders.finish(folder, work)
            for run in folder.glob("outputs/train/*") if breaks_off else ():
                for part in UNFINISHED:
                    path = run / part
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            left = sorted(_files(folder) - inputs)
            made[name, breaks_off] = folder, [path for path in left if path.parts[0] != "cache"]
        return made[name, breaks_off]

    return finish


def damage_at_random(
    folders: Any, finished: Any, tmp_path: Path, name: str, seed: int, *, breaks_off: bool = False
) -> None:
    """Damage a random file in a random way, and run the command again."""
    work: Work = WORKS[name]
    base, left = finished(name, breaks_off)
    chosen = random.Random(f"{name} {seed} {breaks_off}")
    place, damage = chosen.choice(left), chosen.choice(sorted(DAMAGES))
    folder = tmp_path / "copy"
    shutil.copytree(base, folder)
    path = folder / place
    content = path.read_bytes()
    path.unlink()
    DAMAGES[damage](path, content)
    result = folders.run(folder, work)
    told = f"{place} {damage}: {result.stderr[-3000:]}"
    assert "Traceback" not in result.stderr, told
    if result.returncode == 0:
        if place.name not in NOT_READ and path.is_file():
            assert answers(folder, work) == folders.whole(name).answers, told
        return
    assert result.returncode == 2, told
    last = [line for line in result.stderr.splitlines() if line.strip()][-1]
    assert last.startswith(f"siftclip {name.split()[0]}"), told
    assert place.name in last or place.parent.name in last, told
    assert any(word in last for word in ("Delete", "hoose", "replace", "cannot be read")), told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "seed"), [(name, seed) for name, times in TIMES.items() for seed in range(times)]
)
def test_a_damaged_file(name: str, seed: int, folders: Any, finished: Any, tmp_path: Path) -> None:
    damage_at_random(folders, finished, tmp_path, name, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_file_of_a_run_that_was_broken_off(
    seed: int, folders: Any, finished: Any, tmp_path: Path
) -> None:
    damage_at_random(folders, finished, tmp_path, "train", seed, breaks_off=True)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(1000, 1000 + NIGHTLY_TIMES))
@pytest.mark.parametrize("name", TIMES)
def test_a_damaged_file_of_every_command(
    name: str, seed: int, folders: Any, finished: Any, tmp_path: Path
) -> None:
    damage_at_random(folders, finished, tmp_path, name, seed)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(1000, 1000 + NIGHTLY_TIMES))
def test_a_damaged_file_of_a_run_that_was_broken_off_at_length(
    seed: int, folders: Any, finished: Any, tmp_path: Path
) -> None:
    damage_at_random(folders, finished, tmp_path, "train", seed, breaks_off=True)
