"""`siftclip data bench`: how fast samples come, what the limit is, and whether a copy would pay."""

from __future__ import annotations

from siftclip.trainer.cli.application import application
from siftclip.trainer.settings.commands import BenchCommand


@application("data bench", BenchCommand)
def main(settings: BenchCommand) -> None:
    """Measure and print the tables."""
    # Here, since importing Lightning and open_clip takes seconds, which `--help` need not cost.
    from siftclip.trainer.bench.stage import bench_stage, describe_bench

    print(describe_bench(bench_stage(settings)))
