"""A selection: which uids are kept and how often, with its provenance; DataComp's subset files."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from siftclip.datamodules.files import atomic_path, read_json, write_json
from siftclip.datamodules.pool import Coverage, Pool
from siftclip.datamodules.uids import UID_DTYPE, from_structured, sort_uids, to_structured
from siftclip.selectors.errors import InputError

SUBSET_NAME = "selection.npy"
MANIFEST_NAME = "selection.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Distinct uids in ascending order with how often each is kept, and where they come from."""

    uids: np.ndarray  # uint64 [n, 2], ascending by (high, low)
    multiplicities: np.ndarray  # int64 [n], at least 1
    manifest: dict[str, Any]

    def __len__(self) -> int:
        """All samples, repetitions counted."""
        return int(self.multiplicities.sum())

    @property
    def digest(self) -> str:
        """The identity of the selection: SHA-256 of its DataComp subset file's content."""
        return hashlib.sha256(self.to_subset().tobytes()).hexdigest()

    def to_subset(self) -> np.ndarray:
        """DataComp's subset, structured `u8,u8` [len(self)], sorted, repetitions repeated."""
        return to_structured(np.repeat(self.uids, self.multiplicities, axis=0))


def make_selection(
    uids: np.ndarray, multiplicities: np.ndarray, manifest: dict[str, Any]
) -> Selection:
    """Build a selection from distinct uids, uint64 [n, 2], and multiplicities, int64 [n].

    Raises:
        InputError: nothing is kept.
    """
    kept = np.flatnonzero(multiplicities)
    if len(kept) == 0:
        raise InputError(
            f"The selection keeps none of {len(uids)} samples. Raise selector.fraction, or lower "
            "selector.threshold, or look at the scores' quantiles with `siftclip score`."
        )
    order = kept[sort_uids(uids[kept])]
    return Selection(uids=uids[order], multiplicities=multiplicities[order], manifest=manifest)


def read_subset(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a DataComp subset file: distinct uids, uint64 [n, 2], ascending, and multiplicities.

    Raises:
        InputError: the file is missing, or is not a one-dimensional npy of dtype `u8,u8`.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except Exception as error:  # numpy raises zipfile, value, EOF and OS errors for a damaged file
        raise InputError(f"{path} is not a readable npy file: {error}.") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path} must be a DataComp subset in npy format. It is an npz file.")
    if array.dtype != UID_DTYPE or array.ndim != 1:
        raise InputError(
            f"{path} must be a DataComp subset, one-dimensional with dtype 'u8,u8'. "
            f"It has dtype {array.dtype} and shape {array.shape}."
        )
    uids, counts = np.unique(from_structured(array), axis=0, return_counts=True)
    return uids, counts.astype(np.int64)


def write_selection(selection: Selection, folder: Path) -> None:
    """Write DataComp's subset file and the manifest into `folder`; the manifest last."""
    with atomic_path(folder / SUBSET_NAME) as temporary, temporary.open("wb") as file:
        np.save(file, selection.to_subset())
    write_json(folder / MANIFEST_NAME, {**selection.manifest, "digest": selection.digest})


def read_selection(folder: Path) -> Selection:
    """Read what `write_selection` wrote.

    Raises:
        InputError: a file is missing, or the subset is not the one that the manifest describes.
    """
    manifest = read_json(folder / MANIFEST_NAME)
    uids, multiplicities = read_subset(folder / SUBSET_NAME)
    digest = manifest.pop("digest", None)
    selection = Selection(uids=uids, multiplicities=multiplicities, manifest=manifest)
    if selection.digest != digest:
        raise InputError(
            f"{folder / SUBSET_NAME} is not the subset that {MANIFEST_NAME} describes: its SHA-256 "
            f"is {selection.digest}, not {digest}. Delete the folder and select again."
        )
    return selection


def expand_rows(selection: Selection, pool: Pool) -> tuple[np.ndarray, Coverage]:
    """The pool's rows of a selection, int64, repetitions repeated, and how many it covers.

    The rows are sorted, so that the result depends on the selection and the pool alone.

    Raises:
        InputError: none of the selection's uids is in the pool.
    """
    rows = pool.table.find(selection.uids)
    present = rows >= 0
    expanded = np.sort(np.repeat(rows[present], selection.multiplicities[present]))
    coverage = Coverage(named=len(selection), present=len(expanded))
    if len(expanded) == 0:
        raise InputError(
            f"None of the {len(selection)} selected uids is in the pool {pool.root}. "
            "Is this the pool that the selection was made for?"
        )
    return expanded, coverage
