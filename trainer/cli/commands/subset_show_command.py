"""`siftclip subset show`: a subset, and what made it."""

from __future__ import annotations

from siftclip.trainer.cli.application import application
from siftclip.trainer.settings.commands import SubsetShowCommand


@application("subset show", SubsetShowCommand, positional=("subset_show.name",))
def main(settings: SubsetShowCommand) -> None:
    """Print what its manifest says."""
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.trainer.stages.subset import show_stage
    from siftclip.trainer.stages.subset_summary import describe_entry

    print(describe_entry(show_stage(settings)))
