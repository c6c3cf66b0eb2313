"""A pool: webdataset tars with an image, a caption and a uid a sample. Nothing is copied.

The rows of a pool are its samples, shard after shard in the order of the tars' names, and are
numbered from 0. A sample's uid is the field `uid` of its JSON; without one it is derived from the
names of tar and key (`siftclip.datamodules.index.uids.derive_uid`).

Each tar's index is a file of its own. Joined, they are the *table* of the pool: arrays in files,
which are mapped into memory, so that opening a pool costs nothing and loader processes share them.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from siftclip.confidential import ConfidentialOptions, ConfidentialUrl
from siftclip.cores import cores_of_rank
from siftclip.datamodules.index.faults import WAY_OUT, FaultLog
from siftclip.datamodules.index.layouts import (
    COPY_AGAIN,
    WRITE_BOTH,
    MemberKinds,
    sort_tars,
    unpack_tars,
)
from siftclip.datamodules.index.tar_index import (
    APART,
    ARRAY_FIELDS,
    OTHER_FOLDERS,
    WITHOUT_CAPTION,
    WITHOUT_IMAGE,
    ShardIndex,
    load_shard_index,
)
from siftclip.datamodules.index.tar_walk import KeySplit, require_key_split
from siftclip.datamodules.index.uids import UidTable
from siftclip.datamodules.pool.metadata import read_metadata_uids
from siftclip.datamodules.pool.table_files import (
    NOTES_NAME,
    TableNotes,
    index_path,
    read_table,
    table_place,
)
from siftclip.datamodules.storage.local import (
    LocalStorage,
    ShardFile,
    Storage,
    default_cache,
    is_url,
)
from siftclip.errors import InputError, ParameterError, require_int, require_path
from siftclip.files import identity_hash, write_json, write_npy
from siftclip.locks import locked
from siftclip.progress import show_progress
from siftclip.records import read_record
from siftclip.writing import WriteError, delete_folder, make_folder, move, temporary_beside

log = logging.getLogger(__name__)

BEHIND_CUT = "lost behind the cut (estimated)"
LOST_TARS = (BEHIND_CUT, "lost with a tar", "cut off with")  # causes that begin so are of tars
PROCESSES_FROM_BYTES = 8 << 30  # below this much to index, starting processes takes longer
# 2,700 words, of which tokenizers keep 77 tokens or some hundreds; CLIP's takes 0.03 s for them.
MAX_CAPTION_BYTES = 16 << 10
_COLUMNS = (*ARRAY_FIELDS, "shard_of_row", "sorted_uids", "sorted_rows")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolOptions:
    """How a pool is opened.

    Args:
        root: a local folder with the tars in it or in its `shards/`, or any URL that fsspec reads,
            such as s3://bucket/pool.
        cache_dir: for indices and features; None: `.siftclip` in a writable folder, else one in the
            home directory.
        max_bad_fraction: how many samples may be damaged before that is an error, in [0, 1].
        key_split: the dot that ends a sample's key in the names of its members; "first_dot" is
            webdataset's rule, the other one "last_dot".
        index_workers: tars that are indexed at the same time; None: one per core.
        storage_options: of fsspec's file system, such as {"anon": True} for S3.
        shard_cache_gb: up to how much of a remote pool is kept as whole tars on the local disk;
            0 reads ranges.
        max_caption_bytes: samples with longer captions are bad; checked before they are decoded.
    """

    root: str
    cache_dir: str | None = None
    max_bad_fraction: float = 0.01
    key_split: KeySplit = "first_dot"
    index_workers: int | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    shard_cache_gb: float = 0
    max_caption_bytes: int = MAX_CAPTION_BYTES

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", ConfidentialUrl(self.root))
        object.__setattr__(self, "storage_options", ConfidentialOptions(self.storage_options))
        if not 0 <= self.max_bad_fraction <= 1:
            raise ParameterError(
                "must be in the range [0, 1]",
                owner="Pool",
                parameter="max_bad_fraction",
                value=self.max_bad_fraction,
            )
        if self.index_workers is not None:
            require_int("index_workers", self.index_workers, minimum=1, owner="Pool")
        require_int("max_caption_bytes", self.max_caption_bytes, minimum=1, owner="Pool")

    @property
    def cache_folder(self) -> Path:
        """Where indices and features of the pool are kept."""
        return default_cache(self.root) if self.cache_dir is None else Path(self.cache_dir)


@dataclass(frozen=True, slots=True, init=False, repr=False, eq=False)
class Pool:
    """The samples of a pool and where their bytes are. Arrays have one entry a row, n in all.

        pool = Pool("/data/pool")

    The arrays are read-only maps of the files in `table_folder`; pickling a pool stores the
    folder's name.
    """

    options: PoolOptions
    storage: Storage
    shards: tuple[ShardFile, ...]
    table_folder: Path
    uids: np.ndarray  # uint64 [n, 2]
    table: UidTable
    shard_of_row: np.ndarray  # int32 [n], index into `shards`
    keys: np.ndarray  # bytes [n], UTF-8
    sample_offsets_bytes: np.ndarray  # int64 [n], where all members of a sample begin
    sample_sizes_bytes: np.ndarray  # int64 [n]
    image_offsets_bytes: np.ndarray  # int64 [n]
    image_sizes_bytes: np.ndarray  # int64 [n]
    text_offsets_bytes: np.ndarray  # int64 [n]
    text_sizes_bytes: np.ndarray  # int64 [n]
    faults: FaultLog  # of the samples that are left out
    derived_uids: int  # samples whose uid was derived from tar and key
    repeated_uids: int  # samples that are left out because an earlier one has their uid
    hidden: FaultLog  # pairs inside a sample, by more dots in their names, that are not used
    key_split: KeySplit  # the dot that ends the key in the names of the tars' members
    fingerprint: str  # changes with names and sizes of tars and the uids, not with their place
    members_digest: str  # changes with the place or the size of any image or caption

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        max_bad_fraction: float = 0.01,
        key_split: KeySplit = "first_dot",
        index_workers: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
        shard_cache_gb: float = 0,
        max_caption_bytes: int = MAX_CAPTION_BYTES,
        progress: bool = True,
    ) -> None:
        """Open a pool; tars that are not known yet are indexed, which is kept.

        Args:
            root: as the following, see `PoolOptions`.
            cache_dir: see there.
            max_bad_fraction: see there.
            key_split: see there.
            index_workers: see there.
            storage_options: see there.
            shard_cache_gb: see there.
            max_caption_bytes: see there.
            progress: show a bar while tars are indexed.

        Raises:
            InputError: there is no pool, a tar cannot be read, or too many samples are bad.
        """
        given = PoolOptions(
            root=require_path("root", root, owner="Pool"),
            cache_dir=None
            if cache_dir is None
            else require_path("cache_dir", cache_dir, owner="Pool"),
            max_bad_fraction=max_bad_fraction,
            key_split=key_split,
            index_workers=index_workers,
            storage_options=storage_options or {},
            shard_cache_gb=shard_cache_gb,
            max_caption_bytes=max_caption_bytes,
        )
        storage = make_storage(
            given.root,
            cache_dir=given.cache_folder,
            options=given.storage_options,
            shard_cache_gb=given.shard_cache_gb,
        )
        for name, value in _open_table(storage, given, progress=progress).items():
            object.__setattr__(self, name, value)

    @classmethod
    def of_fields(cls, **fields_: Any) -> Pool:
        """Build a pool from its fields, which are not checked."""
        pool = object.__new__(cls)
        for each in fields(cls):
            object.__setattr__(pool, each.name, fields_[each.name])
        return pool

    def __len__(self) -> int:
        return len(self.uids)

    def __repr__(self) -> str:
        return f"Pool({self.root!r}: {len(self):,} samples in {len(self.shards):,} tars)"

    def __reduce__(self) -> tuple[Callable[..., Pool], tuple[Any, ...]]:
        return _map_pool, (self.options, self.storage, self.shards, self.table_folder)

    @property
    def root(self) -> str:
        """The folder or URL; credentials in it are ***."""
        return self.storage.root

    @property
    def tars_stamp(self) -> str:
        """Changes with the sizes and the times of the tars, also where a copy has others."""
        return identity_hash({shard.name: shard.stamp for shard in self.shards})

    @property
    def caption_identity(self) -> dict[str, int]:
        """What captions are read as depends on: their bound, where one of them exceeds it."""
        bound = self.options.max_caption_bytes
        exceeded = len(self) and int(self.text_sizes_bytes.max()) > bound
        return {"max_caption_bytes": bound} if exceeded else {}

    def place(self, row: int) -> str:
        """Return `<tar>:<key>` of a row, for messages."""
        return f"{self.shards[self.shard_of_row[row]].name}:{self.keys[row].decode()}"

    def shard_rows(self, shard: int) -> np.ndarray:
        """Return the rows of one shard, int64, in the order of the tar."""
        start, end = np.searchsorted(self.shard_of_row, [shard, shard + 1])
        return np.arange(start, end, dtype=np.int64)


def make_storage(
    root: str, *, cache_dir: Path, options: Mapping[str, Any], shard_cache_gb: float
) -> Storage:
    """Build the storage of a pool.

    Args:
        root: a local folder, or any URL that fsspec reads.
        cache_dir: for what is copied from a URL.
        options: of fsspec's file system, a pool's storage_options.
        shard_cache_gb: up to how much of a remote pool is kept as whole tars; 0 reads ranges.

    Raises:
        InputError: a local folder with options or a cache, which only a URL can have.
    """
    root = ConfidentialUrl(root.removeprefix("file://") if root.startswith("file://") else root)
    if not 0 <= shard_cache_gb < float("inf"):
        rule = "must be 0 or more"
        raise ParameterError(rule, parameter="shard_cache_gb", value=shard_cache_gb)
    if not is_url(root):
        if options or shard_cache_gb:
            raise ParameterError(
                f"is for pools behind a URL, and the root {root!r} is a local folder",
                parameter="storage_options" if options else "shard_cache_gb",
            )
        return LocalStorage(root)
    from siftclip.datamodules.storage.remote import RemoteStorage  # half a second: local pools wait
    from siftclip.datamodules.storage.shard_cache import ShardCache

    cache = None
    if shard_cache_gb:
        cache = ShardCache(cache_dir / "shards", limit_bytes=int(shard_cache_gb * 1e9))
    return RemoteStorage(root, options=options, cache=cache, folder=cache_dir)


def open_pool(
    storage: Storage,
    *,
    cache_dir: Path,
    max_bad_fraction: float,
    key_split: KeySplit = "first_dot",
    workers: int = 1,
    progress: bool = True,
) -> Pool:
    """Open the pool of a storage that is there already, see `Pool`; indices are in `cache_dir`."""
    options = PoolOptions(
        root=storage.root,
        cache_dir=str(cache_dir),
        max_bad_fraction=max_bad_fraction,
        key_split=key_split,
        index_workers=workers,
    )
    return Pool.of_fields(**_open_table(storage, options, progress=progress))


def _open_table(storage: Storage, options: PoolOptions, *, progress: bool) -> dict[str, Any]:
    """Map the table of a pool, which is made if it is not there; returns the pool's fields.

    Raises:
        InputError: there is no pool, a tar cannot be read, or too many samples are bad.
    """
    key_split = require_key_split("key_split", options.key_split)
    shards, folder = table_place(storage, options.cache_folder, key_split)

    def kept() -> dict[str, Any] | None:
        is_complete = (folder / NOTES_NAME).is_file()
        return _map_table(options, storage, shards, folder) if is_complete else None

    mapped = None
    with suppress(InputError):  # a damaged one is made again
        mapped = kept()
    if mapped is None:
        make_folder(folder.parent)
        lock, owner = folder.parent / "build.lock", f"the index of {storage.root}"
        workers = cores_of_rank() if options.index_workers is None else options.index_workers
        with locked(lock, owner=owner, wait=True):  # the other ranks wait for the one that builds
            try:
                mapped = kept()
            except InputError as error:
                log.warning("the index of %s is made again: %s", storage.root, error)
            if mapped is None:
                indices = _index_shards(
                    storage, shards, folder.parent, key_split, workers, progress
                )
                _write_table(folder, storage.root, key_split, shards, indices)
                mapped = _map_table(options, storage, shards, folder)
    _check_samples(Pool.of_fields(**mapped), options.max_bad_fraction)
    return mapped


def _check_samples(pool: Pool, max_bad_fraction: float) -> None:
    """Say what is odd about the samples of a pool; raise InputError if too many are bad."""
    total = len(pool) + pool.faults.samples
    found, way_out = _explain_faults(pool, total) if pool.faults.samples else ("", WAY_OUT)
    pool.faults.check(
        owner=f"pool {pool.root}",
        total=total,
        max_bad_fraction=max_bad_fraction,
        way_out=f"{found}{way_out}",
    )
    if len(pool) == 0:
        reason = (
            f" Left out: {pool.faults.summary()}. {found}{way_out}" if pool.faults.samples else ""
        )
        raise InputError(
            f"The pool {pool.root} holds {len(pool.shards)} tars without one sample.{reason}"
        )
    if pool.hidden.samples:
        log.warning(
            "pool %s: %s by more dots in their names are part of another sample and not used; with "
            "last_dot as the key split they are samples",
            pool.root,
            pool.hidden.summary(),
        )
    if pool.faults.samples:
        log.warning("pool %s: left out %s. %s", pool.root, pool.faults.summary(), found.rstrip())
    if pool.derived_uids:
        log.info(
            "pool %s: %d of %d uids derived from tar and key",
            pool.root,
            pool.derived_uids,
            len(pool),
        )
    if pool.repeated_uids:
        log.warning(
            "pool %s: %d samples with duplicate uids are left out; the first of each uid is used",
            pool.root,
            pool.repeated_uids,
        )


def _explain_faults(pool: Pool, total: int) -> tuple[str, str]:
    """Say what samples without an image or a caption have, and what to do if most are such ones."""
    notes = read_record(pool.table_folder / NOTES_NAME, TableNotes)
    incomplete = MemberKinds.from_state(notes.get("incomplete", []))  # an older table has none
    counts = pool.faults.counts
    found = f"{incomplete.describe()} " if incomplete.counts else ""
    cause, samples = counts.most_common(1)[0]
    is_local = isinstance(pool.storage, LocalStorage)
    tars = f"{shlex.quote(str(Path(pool.shards[0].path).parent))}/*.tar"
    of_tars = sum(count for cause, count in counts.items() if cause.startswith(LOST_TARS))
    if 2 * of_tars > pool.faults.samples:
        all_are_lost = is_local and len(pool) == 0
        return found, unpack_tars(tars, " ".join(counts)) if all_are_lost else COPY_AGAIN
    if 2 * samples < total:  # the layout is not to blame
        return found, WAY_OUT
    if cause in (APART, OTHER_FOLDERS):
        return found, sort_tars(
            tars, drop_folders=cause == OTHER_FOLDERS
        ) if is_local else WRITE_BOTH
    if cause in (WITHOUT_IMAGE, WITHOUT_CAPTION):
        return found, incomplete.way_out(tars, pool.options.key_split) if is_local else WRITE_BOTH
    return found, WAY_OUT


def _index_shards(
    storage: Storage,
    shards: Sequence[ShardFile],
    folder: Path,
    key_split: KeySplit,
    workers: int,
    progress: bool,
) -> list[ShardIndex]:
    """Index all tars. Each index is written when it is ready: a killed run continues there."""
    total = sum(shard.size_bytes for shard in shards)
    todo = sum(s.size_bytes for s in shards if not index_path(folder, s).exists())
    bar = show_progress(total=total, label="index", unit="B", bar=progress)
    indices = []
    with bar, _executor(storage, workers, todo) as executor:
        jobs = ((storage, shard, folder, key_split) for shard in shards)
        answers: Iterator[ShardIndex]
        answers = executor.map(_index_shard, jobs) if executor else map(_index_shard, jobs)
        for shard, index in zip(shards, answers, strict=True):
            indices.append(index)
            bar.update(shard.size_bytes)
            bar.set_postfix_str(f"{sum(map(len, indices))} samples", refresh=False)
    return indices


def _executor(
    storage: Storage, workers: int, todo_bytes: int
) -> AbstractContextManager[Executor | None]:
    if not isinstance(storage, LocalStorage):  # waits for the network: threads do
        return ThreadPoolExecutor(4 * workers)
    if workers > 1 and todo_bytes >= PROCESSES_FROM_BYTES:
        # spawned, because forking a process that may have threads can block
        return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    return nullcontext()


def _index_shard(job: tuple[Storage, ShardFile, Path, KeySplit]) -> ShardIndex:
    storage, shard, folder, key_split = job
    return load_shard_index(
        shard.name,
        shard.stamp,
        lambda: storage.open_tar(shard),
        index_path(folder, shard),
        key_split,
    )


def _write_table(
    folder: Path,
    root: str,
    key_split: KeySplit,
    shards: Sequence[ShardFile],
    indices: Sequence[ShardIndex],
) -> None:
    """Join the indices of all tars, and write the arrays; the folder appears when it is complete.

    Tables of an earlier state of the pool are deleted.
    """
    columns = {
        name: np.concatenate([getattr(index, name) for index in indices]) for name in ARRAY_FIELDS
    }
    lengths = [len(index) for index in indices]
    columns["shard_of_row"] = np.repeat(np.arange(len(shards), dtype=np.int32), lengths)
    samples = sum(lengths)
    table = UidTable.build(columns["uids"])
    if table.duplicates():
        first = table.find(columns["uids"]) == np.arange(samples)
        columns = {name: values[first] for name, values in columns.items()}
        table = UidTable.build(columns["uids"])
    digest = hashlib.sha256()
    for shard, length in zip(shards, lengths, strict=True):
        digest.update(f"{shard.name}:{length}:{shard.size_bytes}\n".encode())
    digest.update(columns["uids"].tobytes())
    members = hashlib.sha256()
    for name in ARRAY_FIELDS[2:]:
        members.update(columns[name].tobytes())
    columns["sorted_uids"], columns["sorted_rows"] = table.sorted_uids, table.rows
    hidden, incomplete = FaultLog(), MemberKinds()
    for index in indices:
        hidden.merge(index.hidden)
        incomplete.merge(index.incomplete)
    notes: TableNotes = {
        "pool": root,
        "fingerprint": digest.hexdigest()[:16],
        "members": members.hexdigest()[:16],
        "derived_uids": sum(index.derived_uids for index in indices),
        "repeated_uids": samples - len(columns["uids"]) + sum(i.repeated for i in indices),
        "key_split": key_split,
        "hidden": hidden.state(),
        "faults": _all_faults(indices, shards).state(),
        "incomplete": incomplete.state(),
    }
    temporary = temporary_beside(folder)
    delete_folder(temporary)
    try:
        for name, values in columns.items():
            write_npy(temporary / f"{name}.npy", values)
        write_json(temporary / NOTES_NAME, notes)
        delete_folder(folder)  # one without its notes, if any
        move(temporary, folder)
    finally:
        with suppress(WriteError):  # of a disk that fails; what counts is why
            delete_folder(temporary)
    for old in folder.parent.glob("table-*"):
        if old != folder:
            with suppress(WriteError):  # it may be another user's
                delete_folder(old)


def _all_faults(indices: Sequence[ShardIndex], shards: Sequence[ShardFile]) -> FaultLog:
    """Join the shards' faults; what a cut tar has lost is estimated from the whole ones."""
    faults = FaultLog()
    whole = [len(index) for index in indices if not index.truncated]
    for index, shard in zip(indices, shards, strict=True):
        faults.merge(index.faults)
        if index.truncated and whole:
            lost = int(np.median(whole)) - len(index) - 1  # the index itself has counted one
            if lost > 0:
                faults.add(BEHIND_CUT, shard.name, samples=lost)
    return faults


def _map_pool(
    options: PoolOptions, storage: Storage, shards: tuple[ShardFile, ...], folder: Path
) -> Pool:
    return Pool.of_fields(**_map_table(options, storage, shards, folder))


def _map_table(
    options: PoolOptions, storage: Storage, shards: tuple[ShardFile, ...], folder: Path
) -> dict[str, Any]:
    """Map the arrays of a pool from the files in `folder`; returns the pool's fields.

    Raises:
        InputError: a file is missing or damaged.
    """
    notes, columns = read_table(folder, _COLUMNS, len(shards))
    table = UidTable(sorted_uids=columns.pop("sorted_uids"), rows=columns.pop("sorted_rows"))
    return {
        "options": options,
        "storage": storage,
        "shards": shards,
        "table_folder": folder,
        "table": table,
        "faults": FaultLog.from_state(notes["faults"]),
        "derived_uids": notes["derived_uids"],
        "repeated_uids": notes["repeated_uids"],
        "hidden": FaultLog.from_state(notes["hidden"]),
        "key_split": notes["key_split"],
        "fingerprint": notes["fingerprint"],
        "members_digest": notes["members"],
        **columns,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How much of what is named somewhere is really there."""

    named: int
    present: int

    @property
    def fraction(self) -> float:
        return self.present / self.named if self.named else 1.0

    def __str__(self) -> str:
        return f"{self.present} of {self.named} ({100 * self.fraction:.1f} %)"


def metadata_tables(pool: Pool) -> list[Path]:
    """List the parquet files of the pool's metadata (DataComp's layout), by name; empty without.

    Those that img2dataset writes beside the tars are not metadata: they have no uids.
    """
    folder = pool.storage.metadata((".parquet",))
    return sorted(folder.glob("*.parquet")) if folder.name == "metadata" else []


def metadata_coverage(pool: Pool) -> Coverage | None:
    """Count the samples of the pool's metadata that its shards hold; None if it has no metadata."""
    named = present = 0
    for path in metadata_tables(pool):
        uids, valid, _ = read_metadata_uids(path)
        named += len(uids)
        present += int((pool.table.find(uids[valid]) >= 0).sum())
    return Coverage(named=named, present=present) if named else None
