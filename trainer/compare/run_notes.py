"""What has become of each run of a comparison: a small file each in the comparison's folder.

`runs/ARM-sSEED.json` says where the run is and whether it is finished. A process that trains a run
writes its file alone, so that any number of them can work on one comparison, on any machine that
sees the folder, and a killed one leaves no lock behind.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from typing_extensions import TypedDict

from siftclip.errors import InputError
from siftclip.files import has_content, write_json
from siftclip.records import Count, Text, read_record
from siftclip.trainer.compare.plan import Plan, PlannedRun
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.writing import make_folder, move

NOTES = "runs"
LOGS = "logs"
RESULTS_NAME = "results.csv"

State = Literal["running", "finished", "failed"]


class _NoteRecord(TypedDict):
    """A note in JSON."""

    arm: Text
    seed: Count
    settings: Text
    state: State
    run: Text
    reason: Text
    log: Text


@dataclass(frozen=True, slots=True, kw_only=True)
class RunNote:
    """What has become of one run."""

    arm: str
    seed: int
    settings: str  # `PlannedRun.digest`
    state: State
    run: str = ""  # its directory, from the comparison's folder; "" before it is known
    reason: str = ""  # why it has failed
    log: str = ""  # a file that says more, from the comparison's folder; "" for none

    def failure(self) -> str:
        """Say in a line that it has failed, and why."""
        log = f" (log {self.log})" if self.log else ""
        return f"{self.arm}, seed {self.seed}: {self.reason}{log}"

    def run_dir(self, folder: Path) -> RunDir | None:
        """Return the run, where it is known."""
        return RunDir(path=Path(os.path.normpath(folder / self.run))) if self.run else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmRun:
    """One run of a comparison."""

    arm: str
    seed: int
    run: RunDir | None  # None: it is not known where it is
    failure: str = ""  # why it has failed

    @classmethod
    def of_note(cls, arm: str, seed: int, note: RunNote | None, folder: Path) -> ArmRun:
        """Return the run of a note in the folder of a comparison; None: nothing is known of it."""
        at = None if note is None else note.run_dir(folder)
        failure = note.reason if note is not None and note.state == "failed" else ""
        return cls(arm=arm, seed=seed, run=at, failure=failure)

    @property
    def finished(self) -> RunDir | None:
        """The run, if it is finished."""
        there = self.run is not None and self.run.summary is not None and not self.failure
        return self.run if there else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunNotes:
    """The notes of a comparison."""

    folder: Path

    def write(
        self, run: PlannedRun, state: State, *, at: RunDir | None, reason: str = "", log: str = ""
    ) -> RunNote:
        """Write the note of a run, in the place of the one before.

        Args:
            run: of the plan.
            state: of the run.
            at: its directory.
            reason: why it has failed.
            log: a file that says more; a path.
        """
        note = RunNote(
            arm=run.arm,
            seed=run.seed,
            settings=run.digest,
            state=state,
            run="" if at is None else self._relative(at.path),
            reason=reason,
            log=log and self._relative(Path(log)),
        )
        path = self.path_of(run)
        make_folder(path.parent)
        write_json(path, asdict(note))
        return note

    def read(self, run: PlannedRun) -> RunNote | None:
        """Read the note of a run; None if there is none, or it is of other settings."""
        path = self.path_of(run)
        if not has_content(path):
            return None
        note = read_note(path)
        return note if note.settings == run.digest else None

    def log_of(self, run: PlannedRun) -> Path:
        """Return the file for what a process of its own says while it trains a run."""
        return self.folder / LOGS / f"{run.arm}-s{run.seed}.log"

    def path_of(self, run: PlannedRun) -> Path:
        """Return the file of a run's note."""
        return self.folder / NOTES / f"{run.arm}-s{run.seed}.json"

    def is_of_another(self, plan: Plan) -> bool:
        """Return whether the folder holds the report of a comparison that this one does not extend.

        A comparison of the same runs and more, arms or seeds, goes on in the same folder.
        """
        if not has_content(self.folder / RESULTS_NAME):
            return False
        planned = {self.path_of(run).name: run for run in plan.runs}
        kept = sorted((self.folder / NOTES).glob("*.json"))
        return not kept or any(
            path.name not in planned or self.read(planned[path.name]) is None for path in kept
        )

    def set_aside(self) -> Path:
        """Move the folder of another comparison, and return where to."""
        name = f"{self.folder.name}.replaced-{datetime.now():%Y%m%d-%H%M%S}"
        aside = self.folder.with_name(name)
        move(self.folder, aside)
        return aside

    def _relative(self, path: Path) -> str:
        return os.path.relpath(path.absolute(), self.folder.absolute())


def read_note(path: Path) -> RunNote:
    """Read a note.

    Raises:
        InputError: it is damaged.
    """
    way_out = "Delete it: the same command writes it again."
    return RunNote(**_known(read_record(path, _NoteRecord, way_out=way_out)))


def read_notes(folder: Path) -> Sequence[RunNote]:
    """Read all notes of a comparison's folder.

    Raises:
        InputError: there are none, or one is damaged.
    """
    paths = sorted((folder / NOTES).glob("*.json"))
    if not paths:
        raise InputError(f"{folder} is not the folder of a comparison: it has no {NOTES}/*.json.")
    return [read_note(path) for path in paths]


def _known(record: _NoteRecord) -> _NoteRecord:
    """Leave out what a later version has added."""
    return {name: record[name] for name in _NoteRecord.__annotations__}  # type: ignore[literal-required,return-value]
