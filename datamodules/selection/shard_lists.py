"""Webdataset's lists of tars: all samples of the tars in a list are a selection.

A list is text as `webdataset.WebDataset(...)` takes it: a tar each line, or several with `::`
between them, with braces for ranges (`/data/pool/shards/{00000..00127}.tar`). A tar that is listed
twice has its samples twice. Tars are told by their names, so that a list may be of a copy.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from braceexpand import braceexpand

from siftclip.datamodules.index.uids import sort_uids
from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.selection.algebra import CountedUids
from siftclip.datamodules.storage.local import is_url
from siftclip.errors import InputError
from siftclip.reading import read_text
from siftclip.redaction import printable

MAX_TARS = 10**6  # of a list: the largest public pools have some ten thousand
MAX_LIST_BYTES = 1 << 28
_TAR = re.compile(r"[^/\s'\"]+\.tar(?=$|[\s'\"?#|;&>])")
_RANGE = re.compile(r"\{(-?\d+|[A-Za-z])\.\.(-?\d+|[A-Za-z])(?:\.\.-?\d+)?\}")
_NUMBER = re.compile(r"(.*?)(\d+)([^/\d]*)", re.DOTALL)
_SHOWN = 3


def listed_tars(path: Path) -> Counter[str]:
    """Read how often a list names each tar, by the tar's name without folders.

    Raises:
        InputError: the file is missing, or a line of it names no tars, or far too many.
    """
    names: Counter[str] = Counter()
    for number, line in enumerate(read_text(path, most=MAX_LIST_BYTES).splitlines(), start=1):
        for url in line.split("::") if line.strip() else ():
            try:
                names.update(map(_name_of, _expanded(url.strip())))
            except ValueError as error:
                raise InputError(f"{path}, line {number}, {error}.") from None
            if names.total() > MAX_TARS:
                raise InputError(f"{path} names more than {MAX_TARS:,} tars.")
    if not names:
        raise InputError(f"{path} names no tars.")
    return names


def _expanded(pattern: str) -> Iterator[str]:
    """Expand the braces of a pattern.

    Raises:
        ValueError: its braces do not close, or stand for far too many names; before any is made.
    """
    ranges = [abs(_place(end) - _place(start)) + 1 for start, end in _RANGE.findall(pattern)]
    if math.prod(ranges) * (pattern.count(",") + 1) > MAX_TARS:
        raise ValueError(f"stands for more than {MAX_TARS:,} tars")
    try:
        yield from braceexpand(pattern)
    except ValueError:  # UnbalancedBracesError
        raise ValueError("has braces that do not close") from None


def _place(end: str) -> int:
    return ord(end) if end.isalpha() else int(end)


def _name_of(url: str) -> str:
    """Return the name of the tar that a URL, or a command behind `pipe:`, reads."""
    names = _TAR.findall(url)
    if not names:
        raise ValueError(f"must name a tar (*.tar). Got {printable(url[:200])!r}")
    return str(names[0])


def samples_of_tars(pool: Pool, tars: Counter[str]) -> CountedUids:
    """Select all samples of some tars of a pool, each as often as its tar is listed.

    Raises:
        InputError: the pool has no such tar, or these hold no sample.
    """
    numbers = {shard.name: number for number, shard in enumerate(pool.shards)}
    missing = [name for name in tars if name not in numbers]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(tars)} tars of the list are not in the pool {pool.root}: "
            f"{_shown(missing)}. Is this the pool that the list is of?"
        )
    counts = np.zeros(len(pool.shards), dtype=np.int64)
    for name, count in tars.items():
        counts[numbers[name]] = count
    multiplicities = counts[pool.shard_of_row]
    kept = np.flatnonzero(multiplicities)
    if not len(kept):
        raise InputError(f"The {len(tars)} tars of the list hold no sample of {pool.root}.")
    order = kept[sort_uids(pool.uids[kept])]
    return CountedUids(pool.uids[order], multiplicities[order])


def tars_of_samples(pool: Pool, selection: CountedUids) -> dict[str, int]:
    """Find the tars whose samples a selection is, and how often it has each: by path.

    Raises:
        InputError: a tar is selected in part, its samples repeat unequally, or samples are not in
            the pool.
    """
    rows = pool.table.find(selection.uids)
    absent = int((rows < 0).sum())
    if absent:
        raise InputError(
            f"{absent} of {len(rows)} selected uids are not in the pool {pool.root}, so that no "
            "list of its tars has them."
        )
    multiplicities = np.zeros(len(pool), dtype=np.int64)
    multiplicities[rows] = selection.multiplicities
    filled, starts = np.unique(pool.shard_of_row, return_index=True)  # a tar may hold no sample
    least, most = (np.asarray(f.reduceat(multiplicities, starts)) for f in (np.minimum, np.maximum))
    cut = np.flatnonzero(least != most)
    if len(cut):
        first = pool.shard_rows(int(filled[cut[0]]))
        chosen = int((multiplicities[first] > 0).sum())
        name = pool.shards[filled[cut[0]]].name
        parts = (
            f"of {name} it has {chosen} of {len(first)} samples"
            if chosen < len(first)
            else f"it repeats some samples of {name} more often than others"
        )
        raise InputError(
            f"A list of tars stands for all of their samples, and the selection has parts of "
            f"{len(cut)} of {len(pool.shards)} tars: {parts}. Write the uids instead, as npy, "
            "parquet or text; or have siftclip data compact copy the selection into tars of its "
            "own."
        )
    kept = np.flatnonzero(least)
    return {
        _url(pool, int(filled[place])): int(least[place])
        for place in kept.tolist()  # as many as there are tars
    }


def left_out_samples(pool: Pool) -> int:
    """Count the samples of the pool's tars that the pool leaves out, and webdataset would not."""
    return pool.faults.samples + pool.repeated_uids


def _url(pool: Pool, shard: int) -> str:
    """Return what webdataset opens a tar by; without credentials."""
    path = pool.shards[shard].path
    if not is_url(pool.root):
        return str(Path(path).absolute())
    return path if "://" in path else f"{pool.root.partition('://')[0]}://{path}"


def list_of_tars(tars: dict[str, int]) -> list[str]:
    """Write tars as the lines of a list, those with following numbers as one with braces.

    Args:
        tars: how often each is listed, by its path, in the order of the pool.

    Raises:
        InputError: a path has what would part it in a list.

    Example:
        >>> from siftclip.datamodules.selection.shard_lists import list_of_tars
        >>> list_of_tars({"/p/008.tar": 1, "/p/009.tar": 1, "/p/010.tar": 1, "/p/012.tar": 1})
        ['/p/{008..010}.tar', '/p/012.tar']
    """
    for path in tars:
        if "::" in path or len(path.splitlines()) != 1 or path != path.strip():
            raise InputError(f"{path!r} cannot stand in a list of tars, which '::' parts.")
    lines: list[str] = []
    for count, group in groupby(tars.items(), key=lambda item: item[1]):
        for run in _runs([path for path, _ in group]):
            lines += [_pattern(run)] * count
    return lines


def _runs(paths: Sequence[str]) -> Iterator[list[str]]:
    """Part paths where their numbers do not follow each other."""
    run: list[str] = []
    for path in paths:
        if run and not _follows(run[-1], path):
            yield run
            run = []
        run.append(path)
    if run:
        yield run


def _follows(path: str, other: str) -> bool:
    before, behind = _NUMBER.fullmatch(path), _NUMBER.fullmatch(other)
    if before is None or behind is None:
        return False
    same = (before[1], before[3], len(before[2])) == (behind[1], behind[3], len(behind[2]))
    return same and int(behind[2]) == int(before[2]) + 1


def _pattern(run: Sequence[str]) -> str:
    """Write paths with following numbers, or a single one, as one pattern."""
    first, last = (_NUMBER.fullmatch(path) for path in (run[0], run[-1]))
    if len(run) == 1 or first is None or last is None:
        return _escaped(run[0])
    return f"{_escaped(first[1])}{{{first[2]}..{last[2]}}}{_escaped(first[3])}"


def _escaped(text: str) -> str:
    return re.sub(r"([\\{}])", r"\\\1", text)


def _shown(names: Iterable[str]) -> str:
    shown = [printable(name) for name in names]
    return ", ".join(shown[:_SHOWN]) + (", ..." if len(shown) > _SHOWN else "")
