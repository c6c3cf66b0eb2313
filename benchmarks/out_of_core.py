"""Selectors on a feature set that is larger than memory: seconds, peak memory, share of the disk.

    python benchmarks/make_features.py /tmp/bench/features --samples 12800000 --dim 768
    python benchmarks/out_of_core.py /tmp/bench/features clip_score vas

Each selector runs in a process of its own, from nothing to the kept rows. `disk` is the rate at
which a plain loop reads the same bytes in the same process tree, just before.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import describe_machine

from siftclip.datamodules.features.rows import find_npz_array
from siftclip.datamodules.index.faults import FaultLog
from siftclip.datamodules.index.uids import UidTable
from siftclip.datamodules.pool.pool import Pool, PoolOptions
from siftclip.datamodules.selection.pool_source import PoolSource
from siftclip.datamodules.storage.local import LocalStorage
from siftclip.selectors.core.base import Selector
from siftclip.selectors.core.compose import Then
from siftclip.selectors.core.source import FeatureFile
from siftclip.selectors.methods.clip_score import ClipScore
from siftclip.selectors.methods.normsim import NormSim
from siftclip.selectors.methods.removal.vas_d import VasD
from siftclip.selectors.methods.vas import Vas

TARGETS = 20_000


def selectors(target: Path) -> dict[str, Callable[[], Selector]]:
    """The selectors by name, with the arguments of the published recipes for DataComp-small."""
    return {
        "clip_score": lambda: ClipScore(features="l14", fraction=0.3),
        "vas": lambda: Vas(features="l14", target=FeatureFile(path=str(target)), fraction=0.3),
        "normsim2": lambda: NormSim(
            features="l14", target=FeatureFile(path=str(target)), p=2, fraction=0.3
        ),
        "vas_d": lambda: Then(
            stages=[
                ClipScore(features="l14", fraction=0.45),
                VasD(features="l14", fraction=0.3, steps=168),
            ]
        ),
    }


def open_uids(folder: Path) -> Pool:
    """A pool that has the uids of a feature set and no tars."""
    uids = np.concatenate([np.load(path)["uids"] for path in sorted(folder.glob("*.npz"))])
    nothing = np.broadcast_to(np.int64(0), (len(uids),))
    fields = ("sample", "image", "text")
    places = {f"{name}_{kind}_bytes": nothing for name in fields for kind in ("offsets", "sizes")}
    return Pool.of_fields(
        options=PoolOptions(root=str(folder)),
        storage=LocalStorage(str(folder)),
        shards=(),
        table_folder=folder,
        uids=uids,
        table=UidTable.build(uids),
        shard_of_row=nothing,
        keys=nothing,
        faults=FaultLog(),
        derived_uids=0,
        repeated_uids=0,
        hidden=FaultLog(),
        key_split="first_dot",
        fingerprint=folder.name,
        members_digest="",
        **places,
    )


def read_all(folder: Path, keys: tuple[str, ...]) -> float:
    """Bytes a second of a plain loop over the arrays."""
    start, size_bytes = time.perf_counter(), 0
    for path in sorted(folder.glob("*.npz")):
        for key in keys:
            place = find_npz_array(path, key)
            if place is None:
                raise ValueError(f"{path} is compressed")
            left = int(np.prod(place.shape))
            with path.open("rb") as file:
                file.seek(place.offset_bytes)
                while left:
                    left -= len(np.fromfile(file, place.dtype, min(left, 1 << 26)))
            size_bytes += int(np.prod(place.shape)) * place.dtype.itemsize
    return size_bytes / (time.perf_counter() - start)


def select(folder: Path, target: Path, name: str, chunk_samples: int, measure_disk: bool) -> None:
    """Run one selector and print a row of the table."""
    torch.set_num_threads(2)
    start = time.perf_counter()
    pool = open_uids(folder)
    opened = time.perf_counter() - start
    scores = Path(tempfile.mkdtemp(dir=folder))
    source = PoolSource(
        pool,
        features=[folder],
        scores_root=scores,
        chunk_samples=chunk_samples,
        max_bad_fraction=0.0,
        progress=True,
    )
    selector = selectors(target)[name]()
    keys = selector.requires.features
    disk = read_all(folder, keys) if measure_disk else 0.0
    start, cpu_start = time.perf_counter(), time.process_time()
    kept = int(selector.select(source).multiplicities.sum())
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    dim = find_npz_array(next(iter(sorted(folder.glob("*.npz")))), keys[0]).shape[1]  # type: ignore[union-attr]
    size_bytes = len(pool) * dim * 2 * len(keys)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    shutil.rmtree(scores)
    print(
        f"| {name} | {len(pool):,} x {dim} | {kept:,} | {opened:.0f} | {seconds:.0f} | "
        f"{cpu_seconds:.0f} | {memory:.1f} | {size_bytes / seconds / 1e9:.2f} | {disk / 1e9:.2f} |",
        flush=True,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("selectors", nargs="+")
    parser.add_argument("--chunk-samples", type=int, default=65536)
    parser.add_argument("--disk", action="store_true", help="read all features once before")
    arguments = parser.parse_args()
    print(describe_machine())
    print(
        "| selector | features | kept | opening s | select s | CPU s | peak GiB | GB/s of one pass "
        "| GB/s of the disk |\n|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        first = sorted(arguments.folder.glob("*.npz"))[0]
        place = find_npz_array(first, "l14_img")
        dim = place.shape[1] if place else 0
        target = Path(folder) / "target.npy"
        count = min(TARGETS, place.shape[0] if place else 0)
        values = np.fromfile(first, np.float16, count * dim, offset=place.offset_bytes)  # type: ignore[union-attr]
        np.save(target, values.reshape(-1, dim))
        for name in arguments.selectors:
            child = multiprocessing.get_context("spawn").Process(
                target=select,
                args=(arguments.folder, target, name, arguments.chunk_samples, arguments.disk),
            )
            child.start()
            child.join()


if __name__ == "__main__":
    main()
