"""`siftclip data compact`: a copy of a selection, as tars of its own."""

from __future__ import annotations

from siftclip.trainer.cli.application import application
from siftclip.trainer.settings.commands import CompactCommand


@application("data compact", CompactCommand)
def main(settings: CompactCommand) -> None:
    """Copy and say where the copy is."""
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.trainer.stages.pool import compact_stage, describe_compaction

    print(describe_compaction(compact_stage(settings)))
