"""Finds runs that a report can be of: those of a comparison's folder, or any others.

What is read is data of others: it names arms and says where runs lie, and nothing that is executed.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from siftclip.errors import InputError
from siftclip.files import has_content, identity_hash, write_json
from siftclip.records import Count, Text, read_record
from siftclip.redaction import shown
from siftclip.trainer.compare.plan import Plan
from siftclip.trainer.compare.run_notes import NOTES, ArmRun, RunNotes, read_notes
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.runtime.run_records import read_config
from siftclip.trainer.settings.tools import CompareSettings

RECORD_NAME = "comparison.json"
# What a configuration decides about a run, but for its seed
_DECIDES = (
    *("pool", "features", "selector", "data", "model", "loss", "optim", "online", "scale"),
    "budget",
)
_RUN_NAME = re.compile(r"(?P<arm>.+)-s\d+-[0-9a-f]{8}")
_ARM_CHARACTERS = re.compile(r"[^A-Za-z0-9_.+-]")
_DEEPEST = 2  # folders below one that is named, in which runs are looked for


class ComparisonRecord(TypedDict):
    """What a comparison is, in its folder: enough to write its report again."""

    name: Text
    arms: list[Text]
    seeds: dict[Text, list[Count]]  # by arm
    baseline: Text
    again: Text | None
    columns: list[Text]
    truth: Text | None
    words: list[Text]  # of the command line, without credentials


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundRuns:
    """Runs, by arm and seed, and the comparison that they are of."""

    runs: tuple[ArmRun, ...]
    record: ComparisonRecord | None
    folder: Path | None  # of the comparison

    @property
    def first(self) -> dict[str, RunDir]:
        """A run of each arm that has its configuration, where there is one."""
        runs: dict[str, RunDir] = {}
        for run in self.runs:
            if run.run is not None and run.run.config.is_file():
                runs.setdefault(run.arm, run.run)
        return runs


def write_comparison_record(
    folder: Path, plan: Plan, compare: CompareSettings, words: Sequence[str]
) -> None:
    """Write down what a comparison is, before its first run.

    Args:
        folder: of the comparison.
        plan: its runs.
        compare: its options.
        words: of the command line; empty: there was none.
    """
    record: ComparisonRecord = {
        "name": compare.name,
        "arms": [*plan.arms],
        "seeds": {arm: [*seeds] for arm, seeds in plan.seeds.items()},
        "baseline": plan.baseline,
        "again": plan.again,
        "columns": [*compare.columns],
        "truth": compare.truth,
        "words": [shown(word) for word in words],
    }
    write_json(folder / RECORD_NAME, record)


def find_runs(paths: Sequence[Path]) -> FoundRuns:
    """Find the runs that paths name.

    Args:
        paths: a comparison's folder alone; or run directories, and folders in which they lie.

    Raises:
        InputError: there are none, or a record is damaged.
    """
    if len(paths) == 1 and (has_content(paths[0] / RECORD_NAME) or (paths[0] / NOTES).is_dir()):
        return _of_comparison(paths[0])
    found = [run for path in paths for run in _runs_below(path, _DEEPEST)]
    if not found:
        raise InputError(
            f"report.runs must name a comparison's folder or run directories. Got "
            f"{', '.join(map(str, paths))}, in which no run lies."
        )
    return FoundRuns(runs=tuple(_named([*dict.fromkeys(found)])), record=None, folder=None)


def _of_comparison(folder: Path) -> FoundRuns:
    record: ComparisonRecord | None = None
    if has_content(folder / RECORD_NAME):
        way_out = "Without it, siftclip report takes the runs themselves."
        record = read_record(folder / RECORD_NAME, ComparisonRecord, way_out=way_out)
    notes = {(note.arm, note.seed): note for note in read_notes(folder)}
    places = list(notes)
    if record is not None:
        order = _order(record)
        places = [*order, *(place for place in places if place not in order)]
    runs = tuple(ArmRun.of_note(*place, notes.get(place), folder) for place in places)
    return FoundRuns(runs=runs, record=record, folder=folder)


def _order(record: ComparisonRecord) -> list[tuple[str, int]]:
    """Return arms and seeds in the order of the plan that a record is of."""
    seeds, again = record["seeds"], record["again"]
    arms = [arm for arm in record["arms"] if arm in seeds and arm != again]
    longest = max((len(seeds[arm]) for arm in arms), default=0)
    order = [(arm, seeds[arm][at]) for at in range(longest) for arm in arms if at < len(seeds[arm])]
    return order + [(again, seed) for seed in seeds.get(again or "", ()) if again is not None]


def runs_of_plan(plan: Plan, notes: RunNotes) -> list[ArmRun]:
    """Return the runs of a plan as far as they are known."""
    return [ArmRun.of_note(run.arm, run.seed, notes.read(run), notes.folder) for run in plan.runs]


def _runs_below(path: Path, depth: int) -> Iterator[RunDir]:
    """Yield the run directories at a path and some folders below it, in the order of names."""
    run = RunDir(path=path)
    if run.config.is_file():
        yield run
    elif depth and path.is_dir():
        for name in sorted(os.listdir(path)):
            if not (path / name).is_symlink():
                yield from _runs_below(path / name, depth - 1)


def _named(runs: Sequence[RunDir]) -> Iterator[ArmRun]:
    """Yield runs with the arms that they belong to: runs of one arm differ in their seed alone."""
    configs = {run: read_config(run.config) for run in runs}
    kinds = {run: identity_hash(_without_seed(config)) for run, config in configs.items()}
    names: dict[str, str] = {}  # by kind
    for run, kind in kinds.items():
        match = _RUN_NAME.fullmatch(run.path.name)
        names.setdefault(kind, _ARM_CHARACTERS.sub("-", match["arm"] if match else run.path.name))
    times = Counter(names.values())
    numbers: Counter[str] = Counter()
    for kind, name in names.items():
        numbers[name] += 1
        if times[name] > 1:
            names[kind] = f"{name}-{numbers[name]}"
    taken: set[tuple[str, int]] = set()
    for run, config in configs.items():
        seed = config.get("seed")
        place = (names[kinds[run]], seed if type(seed) is int else 0)
        if place in taken:
            raise InputError(
                f"report.runs names two runs of {place[0]} with seed {place[1]}; one of them is "
                f"{run.path}. Name one alone."
            )
        taken.add(place)
        yield ArmRun(arm=place[0], seed=place[1], run=run)


def _without_seed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides about a run, with the run's seed left out wherever it stands."""
    seed = config.get("seed")

    def cleaned(value: Any) -> Any:
        if isinstance(value, Mapping):
            kept = {k: v for k, v in value.items() if not (k == "seed" and v == seed)}
            return {key: cleaned(inner) for key, inner in kept.items()}
        return [cleaned(inner) for inner in value] if isinstance(value, list) else value

    return {name: cleaned(config.get(name)) for name in _DECIDES}
