"""`siftclip index`: where a pool's samples are, looked up once."""

from __future__ import annotations

from siftclip.trainer.cli.application import application
from siftclip.trainer.settings.commands import PoolSections


@application("index", PoolSections)
def main(settings: PoolSections) -> None:
    """Index the pool and print what is in it."""
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.trainer.stages.pool import describe_index, index_stage

    print(describe_index(index_stage(settings)))
