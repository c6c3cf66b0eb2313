"""`siftclip compare`: selectors x seeds at one budget, with a report."""

from __future__ import annotations

import sys

from hydra.core.hydra_config import HydraConfig

from siftclip.trainer.cli.application import application, opened
from siftclip.trainer.cli.explanations import composed
from siftclip.trainer.settings.commands import CompareCommand, TrainCommand


@application("compare", CompareCommand)
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
    outcome = compare_stage(settings, arms, words=sys.argv[1:])
    if not is_rank_zero():
        return
    print(outcome.table)
    if outcome.comparison is not None:
        print(f"\n{outcome.files}")
    outcome.require_complete()
