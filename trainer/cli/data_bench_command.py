"""`siftclip data bench`: how fast samples come, what the limit is, and whether a copy would pay."""

from __future__ import annotations

from omegaconf import DictConfig

from siftclip.trainer.cli.application import application


@application("data bench")
def main(config: DictConfig) -> None:
    """Measure and print the tables."""
    # Here, since importing Lightning and open_clip takes seconds, which `--help` need not cost.
    from siftclip.trainer.data_bench import bench_stage, describe_bench

    print(describe_bench(bench_stage(config)))
