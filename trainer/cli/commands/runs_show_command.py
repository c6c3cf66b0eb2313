"""`siftclip runs show`: a run or what else lies there, what it uses and what uses it."""

from __future__ import annotations

from siftclip.trainer.cli.application import application
from siftclip.trainer.settings.commands import RunsShowCommand


@application("runs show", RunsShowCommand, positional=("runs_show.run",))
def main(settings: RunsShowCommand) -> None:
    """Print what is known of it."""
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.trainer.stages.runs import show_stage
    from siftclip.trainer.stages.runs_summary import describe_entry

    print(describe_entry(show_stage(settings)))
