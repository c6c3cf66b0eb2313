"""The stages of `siftclip index` and `siftclip data compact`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from siftclip.datamodules.identity.identities import when
from siftclip.datamodules.pool.pool import Pool, PoolOptions
from siftclip.datamodules.pool.table_files import NOTES_NAME
from siftclip.datamodules.selection.compaction import Compaction, compact_pool
from siftclip.datamodules.selection.selection import SUBSET_NAME, WEIGHTS_NAME
from siftclip.locks import LOCK_NAME, locked
from siftclip.trainer.builders.selection import pool_from, select_stage
from siftclip.trainer.options.faults import options_of, under
from siftclip.trainer.settings.commands import CompactCommand, PoolSections


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexOutcome:
    """An opened pool, and what opening took."""

    pool: Pool
    is_new: bool  # or was there already
    seconds: float


def index_stage(settings: PoolSections) -> IndexOutcome:
    """Open the pool, which builds what is missing of its index."""
    start = time.perf_counter()
    cache = PoolOptions(root=settings.pool.root, cache_dir=settings.pool.cache_dir).cache_folder
    before = {path.name for path in cache.glob("index*/table-*")}
    pool = pool_from(settings.pool, progress=settings.common.progress)
    return IndexOutcome(
        pool=pool,
        is_new=pool.table_folder.name not in before,
        seconds=time.perf_counter() - start,
    )


def describe_index(outcome: IndexOutcome) -> str:
    """Describe a pool in a few lines, for the terminal."""
    pool, seconds = outcome.pool, outcome.seconds
    size_bytes = sum(shard.size_bytes for shard in pool.shards)
    rate = f", {len(pool) / seconds:.0f} samples/s" if outcome.is_new else ""
    lines = [
        f"pool       {pool.root}",
        f"shards     {len(pool.shards)}, {size_bytes / 1e9:.2f} GB",
        f"samples    {len(pool)}",
        f"uids       {pool.derived_uids} derived from tar and key, the others from the JSON",
        f"left out   {pool.faults.samples} samples",
        *(
            f"           {count} {cause} (such as {', '.join(pool.faults.examples[cause])})"
            for cause, count in pool.faults.counts.most_common()
        ),
        f"index      {pool.table_folder.parent}",
        f"built      {seconds:.2f} s{rate}" if outcome.is_new else _index_reused(pool, seconds),
    ]
    return "\n".join(lines)


def _index_reused(pool: Pool, seconds: float) -> str:
    written = when(pool.table_folder / NOTES_NAME)
    return f"reused     the index of {written}, opened in {seconds:.2f} s"


def compact_stage(settings: CompactCommand) -> Compaction:
    """Select, and copy what was selected; a finished copy is returned as it is.

    Raises:
        InputError: an option is wrong, the folder holds something else, or samples are bad.
    """
    selected = select_stage(settings)
    folder = Path(settings.compact.output)
    held = locked(folder / LOCK_NAME, owner=f"compact.output={str(folder)!r}")
    with held, options_of(under("compact", "shard_samples", folder="output")):
        return compact_pool(
            selected.pool,
            selected.selection,
            folder,
            shard_samples=settings.compact.shard_samples,
            max_bad_fraction=settings.pool.max_bad_fraction,
            progress=settings.common.progress,
        )


def describe_compaction(outcome: Compaction) -> str:
    """Describe a copy in a few lines, for the terminal."""
    if outcome.copied_bytes:
        rate = f", {outcome.copied_bytes / outcome.seconds / 1e6:.0f} MB/s"
    else:
        rate = ": reused a finished copy"
    faults = outcome.faults
    weights = outcome.folder / WEIGHTS_NAME
    return "\n".join(
        [
            f"copied     {outcome.samples} samples, {outcome.size_bytes / 1e9:.2f} GB in "
            f"{len(outcome.shards)} tars",
            *([f"left out   {faults.summary()}"] if faults.samples else []),
            f"took       {outcome.seconds:.1f} s{rate}",
            f"written    {outcome.folder}",
            f"train with pool.root={outcome.folder} selector=external "
            f"selector.path={outcome.folder / SUBSET_NAME}"
            + (f" loss.weights.path={weights}" if weights.is_file() else ""),
        ]
    )
