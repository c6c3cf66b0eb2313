"""`siftclip select`: a selection, from scores."""

from __future__ import annotations

from omegaconf import DictConfig

from siftclip.trainer.cli.application import application
from siftclip.trainer.stages import describe_selection, select_stage


@application("select")
def main(config: DictConfig) -> None:
    """Select and print what was kept."""
    print(describe_selection(select_stage(config)))
