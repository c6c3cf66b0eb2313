"""`siftclip data compact`: a copy of a selection, as tars of its own."""

from __future__ import annotations

from omegaconf import DictConfig

from siftclip.trainer.cli.application import application
from siftclip.trainer.pool_stages import compact_stage, describe_compaction


@application("data compact")
def main(config: DictConfig) -> None:
    """Copy and say where the copy is."""
    print(describe_compaction(compact_stage(config)))
