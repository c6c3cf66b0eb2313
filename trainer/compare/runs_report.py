"""The report stage: the report of runs that are there, whoever trained them, wherever they lie."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from siftclip.errors import InputError
from siftclip.trainer.compare.arms import CompareOutcome, report_runs
from siftclip.trainer.compare.found_runs import FoundRuns, find_runs
from siftclip.trainer.settings.commands import ReportCommand, TrainCommand
from siftclip.trainer.settings.kept_config import KeptConfig
from siftclip.trainer.stages.reproduce import read_kept

log = logging.getLogger(__name__)

# The groups of a run's configuration that say what a report shows; none of them names a class
SHOWN_GROUPS = ("pool", "features", "data", "model", "optim", "scale", "eval")


def kept_of_report(found: FoundRuns) -> KeptConfig | None:
    """Read what the first run that is found says of pool, model, budget and tasks; None without it.

    Raises:
        InputError: its configuration is damaged.
    """
    run = next(iter(found.first.values()), None)
    return None if run is None else read_kept(run.path)[1].part(SHOWN_GROUPS)


def report_stage(
    settings: ReportCommand, compose: Callable[[KeptConfig], TrainCommand]
) -> CompareOutcome:
    """Write the report of runs.

    Args:
        settings: of the command.
        compose: makes settings of what a run has kept.

    Raises:
        InputError: no run is finished, or a file of them is damaged.
    """
    found = find_runs([Path(path) for path in settings.report.runs])
    arms: dict[str, TrainCommand] = {}
    for arm, run in found.first.items():
        try:
            arms[arm] = compose(read_kept(run.path)[1])
        except InputError as error:  # a class of somebody else: its scores are not shown
            log.warning("the report shows no scores of %s: %s", arm, error)
    folder = _folder(settings, found)
    words = () if found.record is None else found.record["words"]
    return report_runs(_as_compared(settings, found), found.runs, arms, folder, words)


def _folder(settings: ReportCommand, found: FoundRuns) -> Path:
    if settings.report.folder is not None:
        return Path(settings.report.folder)
    if found.folder is not None:
        return found.folder
    return settings.common.output_root / "compare" / settings.compare.name


def _as_compared(settings: ReportCommand, found: FoundRuns) -> ReportCommand:
    """Set the arms that there are; what is not typed is the comparison's own."""
    compare, record = settings.compare, found.record
    arms = [*dict.fromkeys(run.arm for run in found.runs)]
    again = None if record is None else record["again"]
    compare = replace(
        compare,
        arms={arm: () for arm in arms if arm != again},
        seeds=(),  # each arm has those of its runs
        name=compare.name if found.folder is None else found.folder.name,
    )
    if record is not None:
        compare = replace(
            compare,
            name=record["name"],
            baseline=compare.baseline or record["baseline"],
            columns=compare.columns or tuple(record["columns"]),
            truth=compare.truth or _there(record["truth"]),
        )
    if compare.baseline is not None and compare.baseline not in arms:
        raise InputError(f"compare.baseline must be one of {arms}. Got {compare.baseline!r}.")
    return replace(settings, compare=compare)


def _there(truth: str | None) -> str | None:
    if truth is not None and not Path(truth).is_file():
        log.warning("the report counts no kinds of samples: %s is not there", truth)
        return None
    return truth
