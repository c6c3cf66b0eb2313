"""`siftclip select`: a selection, from scores."""

from __future__ import annotations

from omegaconf import DictConfig

from siftclip.trainer.cli.application import application


@application("select")
def main(config: DictConfig) -> None:
    """Select and print what was kept."""
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.trainer.selection_summary import clip_score_overlap, describe_selection
    from siftclip.trainer.stages import select_stage

    outcome = select_stage(config, may_launch=True)
    overlap = clip_score_overlap(config, outcome) if config.overlap else None
    if outcome.source.ranks.rank == 0:
        print(describe_selection(outcome, overlap))
