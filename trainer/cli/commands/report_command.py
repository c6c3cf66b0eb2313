"""`siftclip report`: the report of runs that are there, wherever they lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from siftclip.errors import InputError
from siftclip.trainer.cli.application import application, opened
from siftclip.trainer.cli.explanations import composed, quoted, typed_value
from siftclip.trainer.cli.flags import marked
from siftclip.trainer.settings.commands import ReportCommand, TrainCommand

_RUNS = "report.runs"
_OF_THE_REPORT = ("report.", "compare.", "eval.", "logger", "experiment=")


def words_of_runs(words: Sequence[str]) -> list[str]:
    """Return the overrides that compose what the named runs have, in front of those that are typed.

    Raises:
        InputError: no runs are named, or there are none.
    """
    runs = typed_value(words, _RUNS)
    if not runs and not any(is_hydras for _, is_hydras in marked(words)):
        raise InputError(
            f"{_RUNS} must name a comparison's folder or run directories: siftclip report RUNS."
        )
    if not isinstance(runs, list):
        return []
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.trainer.compare.found_runs import find_runs
    from siftclip.trainer.compare.runs_report import kept_of_report

    found = find_runs([Path(run) for run in runs])
    kept, folder = kept_of_report(found), found.folder
    more = ["compare.name=report"]
    if kept is not None:
        kept.register()
        more += kept.words(words)
    if folder is not None:  # of outputs, with the scores of its runs
        more.append(f"output_dir={quoted(str(folder.parent.parent))}")
    return more


@application(
    "report",
    ReportCommand,
    rest=_RUNS,
    prepare=words_of_runs,
    flags={"--serve": "report.serve=true"},
)
def main(settings: ReportCommand) -> None:
    """Write the report, print its table and say where it is; or serve it until Ctrl-C."""
    from siftclip.trainer.compare.runs_report import report_stage
    from siftclip.trainer.compare.serving import serve_report

    typed = [
        word
        for word in map(opened, HydraConfig.get().overrides.task)
        if not word.lstrip("+~").startswith(_OF_THE_REPORT) and "of_run_" not in word
    ]

    def composed_of(kept: Any) -> TrainCommand:
        kept.register()
        return composed(TrainCommand, "train", [*kept.words(typed), *typed])

    report = settings.report
    if report.serve:
        serve_report(
            lambda: report_stage(settings, composed_of),
            port=report.port,
            interval_seconds=report.interval_seconds,
            serving=lambda address: print(f"serving    {address} until Ctrl-C", flush=True),
        )
    outcome = report_stage(settings, composed_of)
    print(outcome.table)
    print(f"\n{outcome.files}")
