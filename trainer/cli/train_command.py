"""`siftclip train`: a CLIP on a selection, streamed from the original tars."""

from __future__ import annotations

from omegaconf import DictConfig

from siftclip.trainer.cli.application import application
from siftclip.trainer.run_dir import is_rank_zero
from siftclip.trainer.training import train_stage


@application("train")
def main(config: DictConfig) -> None:
    """Train and say where the run is."""
    run = train_stage(config)
    if is_rank_zero():
        print(f"run        {run.path}")
        print(f"model      {run.model} (open_clip: local-dir:{run.model})")
