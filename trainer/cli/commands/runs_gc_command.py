"""`siftclip runs gc`: free what no result needs."""

from __future__ import annotations

from siftclip.trainer.cli.application import application
from siftclip.trainer.cli.confirmation import confirmed
from siftclip.trainer.settings.commands import RunsGcCommand


@application("runs gc", RunsGcCommand, positional=("runs_gc.kinds",))
def main(settings: RunsGcCommand) -> None:
    """Say what could go; of the kinds that were asked for, ask and remove it."""
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.trainer.stages.runs import free_all, garbage_stage
    from siftclip.trainer.stages.runs_summary import describe_garbage, describe_removed, total_of

    plan = garbage_stage(settings)
    print(describe_garbage(plan), flush=True)
    if not plan.kinds:
        print("nothing was removed; siftclip runs gc KIND removes a kind, after asking")
        return
    if not plan.items:
        return
    if not confirmed(f"Remove {total_of(plan)}", yes=settings.runs.yes, option="runs.yes"):
        print("nothing was removed")
        return
    for removed in free_all(plan):
        print(describe_removed(removed), flush=True)
