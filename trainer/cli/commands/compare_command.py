"""`siftclip compare`: selectors x seeds at one budget, with a report."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig

from siftclip.progress import duration
from siftclip.trainer.cli.application import application, opened
from siftclip.trainer.cli.confirmation import asked, at_terminal
from siftclip.trainer.cli.explanations import composed
from siftclip.trainer.settings.commands import CompareCommand, TrainCommand

if TYPE_CHECKING:
    from siftclip.trainer.compare.plan import ComposeArm


@application("compare", CompareCommand, flags={"--part": "compare.part"})
def main(settings: CompareCommand) -> None:
    """Run all arms, print the table and say where the report is."""
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.trainer.compare.arms import arms_of_overrides, compare_stage
    from siftclip.trainer.runtime.run_dir import is_rank_zero

    arms = arms_of_overrides(
        settings,
        list(HydraConfig.get().overrides.task),
        lambda overrides: composed(TrainCommand, "compare", [*map(opened, overrides)]),
    )
    if not _is_wanted(settings, arms):
        print("Nothing was trained. plan=true prints the plan alone.")
        return
    outcome = compare_stage(settings, arms, words=sys.argv[1:])
    if not is_rank_zero():
        return
    print(outcome.table)
    if outcome.comparison is not None:
        print(f"\n{outcome.files}")
    outcome.require_complete()


def _is_wanted(settings: CompareCommand, arms: ComposeArm) -> bool:
    """Print the plan at a terminal, and ask where it is a long one.

    Not where other processes do the same: ranks, parts, and the processes of compare.parallel.
    """
    from siftclip.trainer.compare.arms import compare_stage
    from siftclip.trainer.runtime.launch import find_launch

    compare, limit = settings.compare, settings.compare.ask_above_hours
    is_part = compare.part is not None or bool(compare.only) or find_launch(os.environ) is not None
    if settings.common.plan or is_part or limit is None or not at_terminal():
        return True
    planned = compare_stage(replace(settings, common=replace(settings.common, plan=True)), arms)
    print(planned.table, flush=True)
    if planned.seconds_left <= 3600 * limit:
        return True
    return asked(f"Train for about {duration(planned.seconds_left)}")
