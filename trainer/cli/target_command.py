"""`siftclip target`: features of tasks, which selectors select for."""

from __future__ import annotations

from omegaconf import DictConfig

from siftclip.trainer.cli.application import application


@application("target")
def main(config: DictConfig) -> None:
    """Embed the tasks and say where the features are."""
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.trainer.target_embedding import target_stage

    folder, paths = target_stage(config)
    for path in paths:
        print(f"features   {path}")
    print(f"select with selector.target.path={folder}")
