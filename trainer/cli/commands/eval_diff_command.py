"""`siftclip eval diff`: two results, task by task."""

from __future__ import annotations

from siftclip.trainer.cli.application import application
from siftclip.trainer.settings.commands import DiffCommand


@application("eval diff", DiffCommand, positional=["diff.a", "diff.b"])
def main(settings: DiffCommand) -> None:
    """Print the differences and how sure they are."""
    from siftclip.trainer.stages.eval_diff import diff_stage

    print(diff_stage(settings).table())
    if settings.diff.output is not None:
        print(f"\nwritten: {settings.diff.output}")
