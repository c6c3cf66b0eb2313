"""`siftclip embed`: features of a pool with an open_clip model."""

from __future__ import annotations

from omegaconf import DictConfig

from siftclip.trainer.cli.application import application


@application("embed")
def main(config: DictConfig) -> None:
    """Embed the pool and say where the features are."""
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.trainer.embedding import embed_stage

    folder = embed_stage(config)
    print(f"features   {folder}")
