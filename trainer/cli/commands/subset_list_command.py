"""`siftclip subset list`: all named subsets."""

from __future__ import annotations

from siftclip.trainer.cli.application import application
from siftclip.trainer.settings.commands import SubsetListCommand


@application("subset list", SubsetListCommand)
def main(settings: SubsetListCommand) -> None:
    """Print a table of the subsets."""
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.trainer.stages.subset import list_stage
    from siftclip.trainer.stages.subset_summary import describe_list

    print(describe_list(list_stage(settings)))
