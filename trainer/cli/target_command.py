"""`siftclip target`: features of tasks, which selectors select for."""

from __future__ import annotations

from omegaconf import DictConfig

from siftclip.trainer.cli.application import application
from siftclip.trainer.target_embedding import target_stage


@application("target")
def main(config: DictConfig) -> None:
    """Embed the tasks and say where the features are."""
    folder, paths = target_stage(config)
    for path in paths:
        print(f"features   {path}")
    print(f"select with selector.target.path={folder}")
