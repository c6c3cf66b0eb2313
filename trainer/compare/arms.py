"""The compare stage: every arm with every seed, trained and evaluated at one budget, then a report.

An arm is a name with settings of its own. Runs are content-addressed, so that what is finished is
reused, whoever made it, and an interrupted comparison continues where it was. A run that fails
stops no other one.
"""

from __future__ import annotations

import html
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from siftclip.errors import InputError
from siftclip.locks import LOCK_NAME, locked
from siftclip.trainer.compare.forecast import forecast_arms, plan_table, seconds_left
from siftclip.trainer.compare.found_runs import runs_of_plan, write_comparison_record
from siftclip.trainer.compare.plan import ComposeArm, Plan, chosen_runs, plan_comparison
from siftclip.trainer.compare.run_notes import ArmRun, RunNotes
from siftclip.trainer.compare.running import train_all
from siftclip.trainer.compare.workers import shares_of, train_in_parallel, visible_gpus
from siftclip.trainer.runtime.launch import require_launcher
from siftclip.trainer.runtime.run_dir import is_rank_zero
from siftclip.trainer.settings.commands import CompareCommand, TrainCommand
from siftclip.trainer.stages.evaluation import tasks_from
from siftclip.trainer.stages.tracking import log_report

if TYPE_CHECKING:
    import pandas as pd

    from siftclip.trainer.compare.collect import ArmComparison

log = logging.getLogger(__name__)

_FAILED_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class CompareOutcome:
    """What a comparison leaves behind."""

    folder: Path
    table: str  # empty on other ranks than 0
    comparison: ArmComparison | None = None  # on rank 0
    failed: tuple[str, ...] = ()  # runs and tasks that should be there, each in a line
    seconds_left: float = 0.0  # of training, with compare.parallel runs at once: of a plan alone

    @property
    def frame(self) -> pd.DataFrame:
        """One row per run and metric, see `ArmComparison.results`.

        Raises:
            RuntimeError: this is another rank than 0, which has none.
        """
        if self.comparison is None:
            raise RuntimeError("rank 0 alone has the results of a comparison")
        return self.comparison.results

    @property
    def report(self) -> Path:
        """The report as a page that a browser shows."""
        return self.folder / "report.html"

    @property
    def files(self) -> str:
        """The files of the report, in lines for a terminal."""
        names = ("report.md", "report.html", "results.csv", "differences.csv")
        heads = ("report     ", "           ", "results    ", "           ")
        return "\n".join(
            f"{head}{self.folder / name}" for head, name in zip(heads, names, strict=True)
        )

    def __repr__(self) -> str:
        failed = f", {len(self.failed)} failed" if self.failed else ""
        return f"CompareOutcome({str(self.folder)!r}{failed})\n{self.table}"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.table)}</pre>"

    def require_complete(self) -> None:
        """Raise InputError if runs or tasks failed, once all else is done and printed."""
        if self.failed:
            shown = "; ".join(self.failed[:_FAILED_SHOWN]).rstrip(".")
            raise InputError(
                f"The comparison is not complete, {len(self.failed)} runs or tasks failed: "
                f"{shown}. The report says what; the same command tries them again."
            )


def arms_of_overrides(
    settings: CompareCommand,
    overrides: Sequence[str],
    compose: Callable[[Sequence[str]], TrainCommand],
) -> ComposeArm:
    """Return what makes the settings of an arm: the command line's overrides, then the arm's own.

    Args:
        settings: of the comparison, with its arms.
        overrides: those of the command line.
        compose: makes settings of overrides.
    """

    def composed(arm: str, seed: int) -> TrainCommand:
        return compose([*overrides, *settings.compare.arms[arm], f"seed={seed}"])

    return composed


def compare_stage(
    settings: CompareCommand, compose: ComposeArm, *, words: Sequence[str] = ()
) -> CompareOutcome:
    """Run all arms with all seeds and write the report.

    Args:
        settings: of the command.
        compose: makes the settings of an arm with a seed.
        words: of the command line that this is, for processes that each train a run; empty: there
            is none, and no process can be started.

    Raises:
        InputError: an arm is not a valid configuration, the arms differ in budget, or there is
            nothing to evaluate on; all of this before the first run.
    """
    compare = settings.compare
    if compare.parallel > 1 and not words:
        raise InputError("compare.parallel is for siftclip compare alone: its processes are that.")
    if compare.parallel == 1:
        require_launcher("compare", settings.trainer, os.environ)
    tasks_from(settings.eval)
    plan = plan_comparison(settings, compose)
    runs = chosen_runs(plan, only=compare.only, part=compare.part)
    notes = RunNotes(folder=settings.common.output_root / "compare" / compare.name)
    if settings.common.plan:
        forecasts = forecast_arms(plan, notes, progress=settings.common.progress)
        return CompareOutcome(
            folder=notes.folder,
            table=plan_table(forecasts, parallel=compare.parallel),
            seconds_left=seconds_left(forecasts) / compare.parallel,
        )
    if is_rank_zero():
        _set_aside_another(notes, plan)
        if not compare.only:
            write_comparison_record(notes.folder, plan, compare, words)
    if compare.parallel > 1:
        shares = shares_of(
            compare.parallel,
            settings.trainer,
            sorted(os.sched_getaffinity(0)),
            visible_gpus(os.environ),
        )
        train_in_parallel(runs, notes, shares, words, progress=settings.common.progress)
    else:
        train_all(runs, notes, progress=settings.common.progress)
    if not is_rank_zero():
        return CompareOutcome(folder=notes.folder, table="")
    found = {run.name: notes.read(run) for run in plan.runs}
    done = sum(note is not None and note.state != "running" for note in found.values())
    if compare.only or (compare.part is not None and done < len(plan.runs)):
        own = [note for run in runs if (note := found[run.name]) is not None]
        return CompareOutcome(
            folder=notes.folder,
            table=f"{done} of {len(plan.runs)} runs of the comparison are done.",
            failed=tuple(note.failure() for note in own if note.state == "failed"),
        )
    arms = {run.arm: run.settings for run in reversed(plan.runs)}  # of the first seed
    runs_now = runs_of_plan(plan, notes)
    outcome = report_runs(settings, runs_now, arms, notes.folder, words)
    with locked(notes.folder / LOCK_NAME, owner=str(notes.folder), wait=True):
        log_report(
            settings.logger,
            notes.folder,
            comparison=compare.name,
            runs=[run.run for run in runs_now if run.run is not None],
            results=outcome.frame.to_dict("records"),  # type: ignore[arg-type]
        )
    return outcome


def report_runs(
    settings: CompareCommand,
    runs: Sequence[ArmRun],
    arms: Mapping[str, TrainCommand],
    folder: Path,
    words: Sequence[str],
) -> CompareOutcome:
    """Read runs back, and write their report.

    Args:
        settings: of the comparison.
        runs: all that there should be, also unfinished and failed ones.
        arms: the settings of a run of each arm; without them its scores are not shown.
        folder: of the report.
        words: of the command line that made the runs; empty: there was none.

    Raises:
        InputError: no run is finished, or a file of a run is damaged.
    """
    # Here, since importing pandas and jinja2 takes a second.
    from siftclip.trainer.compare.collect import collect
    from siftclip.trainer.compare.page.pool_view import open_view
    from siftclip.trainer.compare.report import write_report
    from siftclip.trainer.compare.sentences import mixed_notes
    from siftclip.trainer.compare.tables import format_main_table

    comparison = collect(settings, runs)
    for text in mixed_notes(comparison):
        log.warning(text)
    samples = open_view(settings, comparison, arms)
    with locked(folder / LOCK_NAME, owner=str(folder), wait=True):
        write_report(comparison, folder, samples=samples, words=words)
    return CompareOutcome(
        folder=folder,
        table=format_main_table(comparison),
        comparison=comparison,
        failed=tuple(missing.text() for missing in comparison.missing if missing.failed),
    )


def _set_aside_another(notes: RunNotes, plan: Plan) -> None:
    """Move the report of another comparison under this name, and say so."""
    if notes.is_of_another(plan):
        with locked(
            notes.folder.with_name(f".{notes.folder.name}.lock"), owner=str(notes.folder), wait=True
        ):
            if notes.is_of_another(plan):
                log.warning(
                    "%s holds another comparison of this name, with other arms, seeds or options: "
                    "it is now %s",
                    notes.folder,
                    notes.set_aside(),
                )
