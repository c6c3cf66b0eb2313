"""`siftclip index`: where a pool's samples are, looked up once."""

from __future__ import annotations

from omegaconf import DictConfig

from siftclip.trainer.cli.application import application


@application("index")
def main(config: DictConfig) -> None:
    """Index the pool and print what is in it."""
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.trainer.pool_stages import describe_index, index_stage

    print(describe_index(index_stage(config)))
