"""Which tars of a pool are others than those that its kept index is of."""

from __future__ import annotations

from dataclasses import dataclass

from siftclip.datamodules.index.tar_index import index_state
from siftclip.datamodules.index.tar_walk import require_key_split
from siftclip.datamodules.pool.pool import PoolOptions, make_storage
from siftclip.datamodules.pool.table_files import NOTES_NAME, index_path, table_place


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexChanges:
    """Names of tars."""

    changed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    new: tuple[str, ...] = ()  # without an index; all of them where nothing was indexed yet


def index_changes(options: PoolOptions) -> IndexChanges:
    """Compare the tars of a pool with its kept index, which opening the pool brings up to date.

    Raises:
        InputError: there is no pool, or a tar cannot be read.
    """
    key_split = require_key_split("key_split", options.key_split)
    storage = make_storage(
        options.root,
        cache_dir=options.cache_folder,
        options=options.storage_options,
        shard_cache_gb=options.shard_cache_gb,
    )
    shards, table = table_place(storage, options.cache_folder, key_split)
    if (table / NOTES_NAME).is_file():
        return IndexChanges()
    places = table.parent
    states = {
        shard.name: index_state(index_path(places, shard), shard.stamp, key_split)
        for shard in shards
    }
    stems = {shard.stem for shard in shards}
    indexed = sorted(path.stem for path in places.glob("*.npz")) if places.is_dir() else []
    return IndexChanges(
        changed=tuple(name for name, state in states.items() if state == "other"),
        missing=tuple(f"{stem}.tar" for stem in indexed if stem not in stems),
        new=tuple(name for name, state in states.items() if state == "none"),
    )
