"""The stages of `siftclip index` and `siftclip data compact`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from siftclip.datamodules.compaction import Compaction, compact_pool
from siftclip.datamodules.identities import when
from siftclip.datamodules.locks import LOCK_NAME, locked
from siftclip.datamodules.pool import Pool
from siftclip.datamodules.selection import SUBSET_NAME, WEIGHTS_NAME
from siftclip.selectors.errors import InputError, require_int
from siftclip.trainer.build.options import options_of, under
from siftclip.trainer.stages import pool_cache, pool_from, select_stage


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexOutcome:
    """An opened pool, and what opening took."""

    pool: Pool
    is_new: bool  # or was there already
    seconds: float


def index_stage(config: DictConfig) -> IndexOutcome:
    """Open the pool, which builds what is missing of its index."""
    start = time.perf_counter()
    before: set[str] = set()
    if config.pool.get("root") is not None:  # pool_from has the words for a missing one
        before = {path.name for path in pool_cache(config).glob("index*/table-*")}
    pool = pool_from(config)
    return IndexOutcome(
        pool=pool,
        is_new=pool.table_folder.name not in before,
        seconds=time.perf_counter() - start,
    )


def describe_index(outcome: IndexOutcome) -> str:
    """A few lines about a pool, for the terminal."""
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
    written = when(pool.table_folder / "notes.json")
    return f"reused     the index of {written}, opened in {seconds:.2f} s"


def compact_stage(config: DictConfig) -> Compaction:
    """Select, and copy what was selected; a finished copy is returned as it is.

    Raises:
        InputError: an option is wrong, the folder holds something else, or samples are bad.
    """
    if OmegaConf.is_missing(config.compact, "output"):
        raise InputError(
            "compact.output must name the folder of the copy, such as compact.output=/data/copy."
        )
    require_int("compact.shard_samples", config.compact.shard_samples, minimum=1)
    selected = select_stage(config)
    folder = Path(str(config.compact.output))
    held = locked(folder / LOCK_NAME, owner=f"compact.output={str(folder)!r}")
    with held, options_of(under("compact", "shard_samples", folder="output")):
        return compact_pool(
            selected.pool,
            selected.selection,
            folder,
            shard_samples=config.compact.shard_samples,
            max_bad_fraction=config.pool.max_bad_fraction,
            progress=config.progress,
        )


def describe_compaction(outcome: Compaction) -> str:
    """A few lines about a copy, for the terminal."""
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
