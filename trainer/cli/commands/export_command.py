"""`siftclip export`: a trained model in the layouts of open_clip and DataComp."""

from __future__ import annotations

from siftclip.trainer.cli.application import application
from siftclip.trainer.settings.commands import ExportCommand


@application("export", ExportCommand, positional=("export.source", "export.path"))
def main(settings: ExportCommand) -> None:
    """Export, and say what was written and how to load it."""
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.trainer.stages.export import describe_export, export_stage

    print(describe_export(export_stage(settings.export)))
