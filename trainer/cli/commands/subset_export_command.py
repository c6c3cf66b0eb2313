"""`siftclip subset export`: a subset as a file that other tools read."""

from __future__ import annotations

from siftclip.trainer.cli.application import application
from siftclip.trainer.settings.commands import SubsetExportCommand


@application(
    "subset export",
    SubsetExportCommand,
    positional=("subset_export.subset", "subset_export.path"),
)
def main(settings: SubsetExportCommand) -> None:
    """Export, and say what was written."""
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.trainer.stages.subset import export_stage
    from siftclip.trainer.stages.subset_summary import describe_exported

    print(describe_exported(export_stage(settings)))
