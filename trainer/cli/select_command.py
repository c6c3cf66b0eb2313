"""`siftclip select`: a selection, from scores."""

from __future__ import annotations

from omegaconf import DictConfig

from siftclip.trainer.cli.application import application
from siftclip.trainer.stages import describe_selection, select_stage


@application("select")
def main(config: DictConfig) -> None:
    """Select and print what was kept."""
    outcome = select_stage(config, may_launch=True)
    if outcome.source.ranks.rank == 0:
        print(describe_selection(outcome))
