"""What the checks cost that keep answers right: identities, changed files, agreement, results.

    python benchmarks/checks.py

Medians of some rounds, on data that it makes. Nothing is compared: each check is work that a run
would not do without it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import describe_machine

from siftclip import files
from siftclip.datamodules.identity import code_identity
from siftclip.datamodules.identity.identities import selector_identity
from siftclip.datamodules.streaming.order import SampleOrder, rows_digest
from siftclip.eval.metrics.outcomes import Outcomes
from siftclip.eval.results.files import TaskResult, append_result, read_kept
from siftclip.file_identity import FileIdentity
from siftclip.selectors.fitting.clusters import KMeans
from siftclip.selectors.kernels.hardware import _int8_is_exact
from siftclip.selectors.methods.clip_score import ClipScore
from siftclip.selectors.methods.clipcov.clipcov import ClipCov

BATCH = 32_768


def median_seconds(work: Callable[[], object], rounds: int, *, times: int = 1) -> float:
    """Of one call, where a round makes so many."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(times):
            work()
        found.append((time.perf_counter() - start) / times)
    return statistics.median(found)


def forget_code() -> None:
    """As at the start of a process, which has read no source yet."""
    for cached in [*vars(code_identity).values(), *vars(files).values()]:
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()


def identities(rounds: int) -> dict[str, float]:
    """Of selectors with little and with much code behind them."""
    found = {}
    clustering = KMeans(clusters=100, seed=0)
    for selector in (
        ClipScore(features="l14", fraction=0.3),
        ClipCov(features="l14", fraction=0.3, clustering=clustering, label_weight=0),
    ):
        name = type(selector).__name__

        def first(selector: object = selector) -> None:
            forget_code()
            selector_identity(selector)

        found[f"the code behind {name}, first time"] = median_seconds(first, rounds)
        again = median_seconds(lambda selector=selector: selector_identity(selector), rounds)
        found[f"the code behind {name}, again"] = again
    return found


def fstat(rounds: int, folder: Path) -> float:
    """Of the check behind a joined read of a tar."""
    path = folder / "file"
    path.write_bytes(bytes(1 << 20))
    identity = FileIdentity.of(path)
    with path.open("rb") as file:
        return median_seconds(lambda: identity.is_of(file.fileno()), rounds, times=10_000)


def order(rounds: int, samples: int, copies: int) -> float:
    """Of a pass over so many samples, each so often."""
    rows = np.repeat(np.arange(samples // copies), copies)

    def first_batch() -> None:
        SampleOrder(rows=rows, seed=0, global_batch=BATCH // 8).span(0, 1)

    return median_seconds(first_batch, rounds)


def results(rounds: int, folder: Path, units: int) -> float:
    """Of reading the results of 38 tasks, with so many units each."""
    path = folder / "eval_results.jsonl"
    generator = np.random.default_rng(0)
    for number in range(38):
        hits = (generator.random(units) < 0.5).astype(np.float32)
        value = float(hits.mean(dtype=np.float64))
        append_result(
            path,
            TaskResult(
                key=f"task{number}",
                dataset=f"Task {number}",
                metrics={"main_metric": value, "acc1": value},
                main_metric_name="acc1",
                samples=units,
                interval=None,
                seconds=1.0,
                model="a" * 64,
                outcomes=Outcomes(statistic="mean", arrays={"value": hits}),
                units=np.arange(units, dtype=np.uint64),
            ),
        )
    assert len(read_kept(path).results) == 38
    return median_seconds(lambda: read_kept(path), rounds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2_000_000, help="of a pass")
    parser.add_argument("--units", type=int, default=20_000, help="of a task")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rounds, samples = options.rounds, options.samples
    rows = np.random.default_rng(0).integers(0, samples, BATCH)
    found = identities(rounds)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found["fstat behind a joined read of a local tar"] = fstat(rounds, folder)
        found[f"digest of {BATCH:,} rows"] = median_seconds(lambda: rows_digest(rows), rounds)
        found[f"order of a pass of {samples:,} samples"] = order(rounds, samples, 1)
        found["the same, each sample twice"] = order(rounds, samples, 2)
        found[f"38 results of {options.units:,} units, read and checked"] = results(
            rounds, folder, options.units
        )
    found["trial of int8 products"] = median_seconds(_int8_is_exact.__wrapped__, rounds)
    print(describe_machine(), "\n")
    print("| check | ms |\n|---|---:|")
    for check, seconds in found.items():
        print(f"| {check} | {1e3 * seconds:.4g} |")


if __name__ == "__main__":
    main()
