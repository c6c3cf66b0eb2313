"""`siftclip runs rm`: remove a run, or what else lies there."""

from __future__ import annotations

from siftclip.trainer.cli.application import application
from siftclip.trainer.cli.confirmation import confirmed
from siftclip.trainer.settings.commands import RunsRmCommand


@application("runs rm", RunsRmCommand, positional=("runs_rm.run",))
def main(settings: RunsRmCommand) -> None:
    """Say what would go, ask, and remove it."""
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.trainer.stages.runs import removal_stage, remove_all
    from siftclip.trainer.stages.runs_summary import describe_removal, describe_removed

    listing = removal_stage(settings)
    print(describe_removal(listing), flush=True)
    if not confirmed("Remove this", yes=settings.runs.yes, option="runs.yes"):
        print("nothing was removed")
        return
    for removed in remove_all(listing):
        print(describe_removed(removed), flush=True)
