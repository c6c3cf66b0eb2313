"""`siftclip select`: select samples by score."""

from __future__ import annotations

from siftclip.trainer.cli.application import application
from siftclip.trainer.settings.commands import SelectCommand


@application("select", SelectCommand)
def main(settings: SelectCommand) -> None:
    """Select and print what was kept."""
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.trainer.builders.selection import select_stage
    from siftclip.trainer.stages.selection_summary import clip_score_overlap, describe_selection

    outcome = select_stage(settings, may_launch=True)
    overlap = None
    if settings.options.overlap:
        overlap = clip_score_overlap(settings.features.name, outcome)
    if outcome.source.ranks.rank == 0:
        print(describe_selection(outcome, overlap))
