"""`siftclip runs list`: what lies in the folder of outputs."""

from __future__ import annotations

from siftclip.trainer.cli.application import application
from siftclip.trainer.settings.commands import RunsListCommand


@application("runs list", RunsListCommand, positional=("runs_list.kinds",))
def main(settings: RunsListCommand) -> None:
    """Print a table."""
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.trainer.stages.runs import list_stage
    from siftclip.trainer.stages.runs_summary import describe_outputs

    print(describe_outputs(list_stage(settings)))
