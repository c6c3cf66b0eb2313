"""`siftclip report`: the report of runs that are there, wherever they lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from siftclip.trainer.cli.application import application, opened
from siftclip.trainer.cli.explanations import composed
from siftclip.trainer.settings.commands import ReportCommand, TrainCommand

_RUNS = "report.runs"
_OF_THE_REPORT = ("report.", "compare.", "eval.", "logger", "experiment=")


def words_of_runs(words: Sequence[str]) -> list[str]:
    """Return the overrides that compose what the named runs have, in front of those that are typed.

    Raises:
        InputError: there are no runs.
    """
    named = [word for word in words if word.startswith(f"{_RUNS}=")]
    if not named:
        return []
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from siftclip.trainer.compare.found_runs import find_runs
    from siftclip.trainer.stages.report import kept_of_report

    try:
        value = OverridesParser.create().parse_override(named[-1]).value()
    except HydraException:
        return []  # what is wrong with it is told when all words are read
    if not isinstance(value, list):
        return []
    paths = [Path(str(getattr(run, "text", run))) for run in value]
    kept, folder = kept_of_report(paths), find_runs(paths).folder
    more = []
    if kept is not None:
        kept.register()
        more += kept.words(words)
    if folder is not None:  # of outputs, with the scores of its runs
        root = str(folder.parent.parent).replace("\\", "\\\\").replace("'", "\\'")
        more.append(f"output_dir='{root}'")
    return more


@application("report", ReportCommand, rest=_RUNS, prepare=words_of_runs)
def main(settings: ReportCommand) -> None:
    """Write the report, print its table and say where it is; or serve it until Ctrl-C."""
    from siftclip.trainer.stages.report import report_stage
    from siftclip.trainer.stages.serving import serve_report

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
    print(f"\nreport     {outcome.folder / 'report.md'}")
    print(f"           {outcome.report}")
    print(f"results    {outcome.folder / 'results.csv'}")
    print(f"           {outcome.folder / 'differences.csv'}")
