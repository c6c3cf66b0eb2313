"""`siftclip eval watch`: evaluate the checkpoints of a run when they appear."""

from __future__ import annotations

from siftclip.trainer.cli.application import application
from siftclip.trainer.settings.commands import WatchCommand


@application("eval watch", WatchCommand, positional=["watch.run"])
def main(settings: WatchCommand) -> None:
    """Evaluate each checkpoint and print its averages."""
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.errors import InputError
    from siftclip.trainer.stages.eval_watch import watch_folder, watch_stage

    failed = []
    for step, summary in watch_stage(settings):
        print(f"step {step}\n{summary.table()}\n", flush=True)
        failed += [f"{failure.key} at step {step}" for failure in summary.failures]
    print(f"written    {watch_folder(settings.watch)}")
    if failed:
        raise InputError(f"{len(failed)} tasks failed: {', '.join(failed)}.")
