"""`siftclip data compact`: a copy of a selection, as tars of its own."""

from __future__ import annotations

from omegaconf import DictConfig

from siftclip.trainer.cli.application import application


@application("data compact")
def main(config: DictConfig) -> None:
    """Copy and say where the copy is."""
    # Here, since importing torch takes seconds, which `--help` need not cost.
    from siftclip.trainer.pool_stages import compact_stage, describe_compaction

    print(describe_compaction(compact_stage(config)))
