"""`siftclip subset import`: a file of uids, or a selection, under a name."""

from __future__ import annotations

from siftclip.trainer.cli.application import application
from siftclip.trainer.settings.commands import SubsetImportCommand


@application(
    "subset import",
    SubsetImportCommand,
    positional=("subset_import.path", "subset_import.name"),
)
def main(settings: SubsetImportCommand) -> None:
    """Import, and say what it is."""
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.trainer.stages.subset import import_stage
    from siftclip.trainer.stages.subset_summary import describe_made

    print(describe_made(import_stage(settings)))
