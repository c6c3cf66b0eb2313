"""Whether a subset still fits its pool: other pools, tars that have changed, uids that are gone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from siftclip.datamodules.pool.index_changes import IndexChanges
from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.selection.algebra import CountedUids
from siftclip.datamodules.selection.registry import SubsetPool, TarRecords, tar_records
from siftclip.redaction import printable

_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check has found."""

    check: Literal["uids", "pool", "tars", "index", "repeats"]
    is_fault: bool
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TarDifferences:
    """In what the tars of a pool differ from those that were noted; names."""

    missing: tuple[str, ...]
    changed: tuple[str, ...]  # of another size, or with another number of samples
    new: tuple[str, ...]
    rewritten: tuple[str, ...]  # with the same size and number, and another time or content


def compare_tars(before: TarRecords, now: TarRecords) -> TarDifferences:
    """Compare the tars that were noted with those that there are."""
    both = [name for name in before if name in now]

    def differ(name: str) -> bool:
        return any(before[name][key] != now[name][key] for key in ("size_bytes", "samples"))

    changed = tuple(name for name in both if differ(name))
    return TarDifferences(
        missing=tuple(name for name in before if name not in now),
        changed=changed,
        new=tuple(name for name in now if name not in before),
        rewritten=tuple(
            name
            for name in both
            if name not in changed and before[name]["stamp"] != now[name]["stamp"]
        ),
    )


def verify_subset(
    counted: CountedUids,
    pool: Pool,
    *,
    noted: SubsetPool | None,
    tars: TarRecords | None,
    index: IndexChanges,
) -> list[Finding]:
    """Check a subset against a pool.

    Args:
        counted: the samples of the subset.
        pool: that they should be of.
        noted: what was noted of the pool when the subset was made; None: nothing.
        tars: the tars then; None: not noted.
        index: what the tars differed in from the kept index, before the pool was opened.
    """
    findings = [*_index(index)]
    present = int((pool.table.find(counted.uids) >= 0).sum())
    findings.append(_uids(present, len(counted.uids), pool))
    findings += _pool(noted, pool, is_another=present == 0)
    if tars is not None and present:
        findings += _tars(compare_tars(tars, tar_records(pool)))
    return [*findings, *_repeats(counted, pool)]


def _index(index: IndexChanges) -> Iterator[Finding]:
    words = {
        "changed since it was indexed": index.changed,
        "missing, and indexed before": index.missing,
    }
    for what, names in words.items():
        if names:
            yield Finding(check="index", is_fault=True, text=f"{what}: {_names(names)}")
    if not index.changed and not index.missing:
        count = len(index.new)
        was = "up to date" if not count else f"made now, of {count} tars that were not in it"
        yield Finding(check="index", is_fault=False, text=was)


def _uids(present: int, distinct: int, pool: Pool) -> Finding:
    absent = distinct - present
    if not absent:
        return Finding(check="uids", is_fault=False, text=f"all {distinct} are in the pool")
    where = "none is" if not present else f"{absent} of {distinct} are not"
    return Finding(check="uids", is_fault=True, text=f"{where} in the pool {pool.root}")


def _pool(noted: SubsetPool | None, pool: Pool, *, is_another: bool) -> Iterator[Finding]:
    if noted is None:
        yield Finding(check="pool", is_fault=False, text="not noted when the subset was made")
        return
    if noted["fingerprint"] != pool.fingerprint:
        what = "another pool" if is_another else "the pool has changed, or is another one"
        samples = f", {noted['samples']} samples" if "samples" in noted else ""
        yield Finding(
            check="pool",
            is_fault=True,
            text=f"{what}: made for {noted['fingerprint']} ({printable(noted['root'])}{samples}), "
            f"this is {pool.fingerprint} ({len(pool)} samples)",
        )
        return
    members = noted.get("members")
    if members is not None and members != pool.members_digest:
        yield Finding(
            check="pool",
            is_fault=True,
            text="images or captions have other sizes or places in tars of the same size",
        )
        return
    yield Finding(check="pool", is_fault=False, text=f"the same, {pool.fingerprint}")


def _tars(differences: TarDifferences) -> Iterator[Finding]:
    words = {
        "missing": differences.missing,
        "changed": differences.changed,
        "not there when the subset was made": differences.new,
    }
    faults = [f"{what}: {_names(names)}" for what, names in words.items() if names]
    yield from (Finding(check="tars", is_fault=True, text=text) for text in faults)
    if differences.rewritten:
        yield Finding(
            check="tars",
            is_fault=False,
            text=f"written or copied since, with the same sizes: {_names(differences.rewritten)}",
        )
    elif not faults:
        yield Finding(check="tars", is_fault=False, text="as they were when the subset was made")


def _repeats(counted: CountedUids, pool: Pool) -> Iterator[Finding]:
    repeated = int((counted.multiplicities > 1).sum())
    if repeated:
        most = int(counted.multiplicities.max())
        text = f"{repeated} uids of the subset are kept more than once, up to {most} times"
        yield Finding(check="repeats", is_fault=False, text=text)
    if pool.repeated_uids:
        yield Finding(
            check="repeats",
            is_fault=False,
            text=f"{pool.repeated_uids} samples of the pool have the uid of an earlier one and are "
            "left out",
        )


def _names(names: Iterable[str]) -> str:
    shown = [printable(name) for name in names]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return f"{', '.join(shown[:_SHOWN])}{more}"
