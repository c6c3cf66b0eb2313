"""A selection: which uids are kept and how often, with its provenance; DataComp's subset files.

A selector may also say what a sample counts in the loss. DataComp's format has no place for that,
so that weights lie in a file of their own beside the subset.
"""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from siftclip.datamodules.index.uids import (
    UID_DTYPE,
    distinct_uids,
    format_uids,
    from_structured,
    parse_uids,
    sort_uids,
    to_structured,
)
from siftclip.datamodules.pool.pool import Coverage, Pool
from siftclip.errors import DamagedError, InputError, require_path
from siftclip.files import read_json_object, read_npy, write_json, write_npy
from siftclip.selectors.core.rules import can_be_kept
from siftclip.uid_texts import UID_RULE, plain_uid
from siftclip.writing import delete_file

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

SUBSET_NAME = "selection.npy"
WEIGHTS_NAME = "weights.npy"
WEIGHTS_COLUMN = "weight"
_WEIGHTS_DTYPE = np.dtype([*UID_DTYPE.descr, (WEIGHTS_COLUMN, "<f4")])
SCORES_NAME = "scores.npy"
MANIFEST_NAME = "selection.json"
# In manifests, the number of samples without a score: older ones have it under this name.
UNSCORED_KEY = "unjudged_samples"


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Distinct uids in ascending order with how often each is kept, and where they come from."""

    uids: np.ndarray  # uint64 [n, 2], ascending by (high, low)
    multiplicities: np.ndarray  # int64 [n], at least 1
    manifest: dict[str, Any]
    weights: np.ndarray | None = None  # float32 [n], what each counts in the loss; None: 1
    scores: np.ndarray | None = None  # float32 [n], by which they were chosen; None: not known

    def __len__(self) -> int:
        """Count all samples, with repetitions."""
        return int(self.multiplicities.sum())

    @property
    def digest(self) -> str:
        """The identity of the selection: SHA-256 of its DataComp subset file's content.

        Where it has weights, they follow.
        """
        digest = hashlib.sha256(self.to_subset().tobytes())
        if self.weights is not None:
            digest.update(self.weights.astype("<f4").tobytes())
        return digest.hexdigest()

    @property
    def ids(self) -> np.ndarray:
        """The uids as 32 hexadecimal digits each, str [n], in their order."""
        return format_uids(self.uids)

    @property
    def frame(self) -> pd.DataFrame:
        """One row per distinct sample: uid, multiplicity, and score and weight where there are.

        Example:
            >>> import numpy as np
            >>> from siftclip.datamodules import make_selection
            >>> uids = np.array([[0, 9], [0, 4]], dtype=np.uint64)
            >>> make_selection(uids, np.array([2, 1]), {}).frame
                                            uid  multiplicity
            0  00000000000000000000000000000004             1
            1  00000000000000000000000000000009             2
        """
        import pandas as pd

        columns = {"uid": self.ids, "multiplicity": self.multiplicities}
        more = {"score": self.scores, "weight": self.weights}
        return pd.DataFrame(columns | {k: v for k, v in more.items() if v is not None})

    def to_datacomp(self, path: str | os.PathLike[str]) -> Path:
        """Write DataComp's subset file (`.npy`, `u8,u8`), which has no place for weights.

        Example:
            >>> import tempfile
            >>> import numpy as np
            >>> from siftclip.datamodules import make_selection
            >>> uids = np.array([[0, 9], [0, 4]], dtype=np.uint64)
            >>> selection = make_selection(uids, np.array([2, 1]), {})
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     np.load(selection.to_datacomp(f"{folder}/subset.npy")).tolist()
            [(0, 4), (0, 9), (0, 9)]
        """
        path = Path(require_path("path", path, owner="to_datacomp"))
        if self.weights is not None:
            log.warning("%s lacks the weights of the selection: DataComp's format has none", path)
        write_npy(path, self.to_subset())
        return path

    def to_subset(self) -> np.ndarray:
        """Convert to DataComp's subset, structured `u8,u8` [len(self)], sorted, with copies."""
        return to_structured(np.repeat(self.uids, self.multiplicities, axis=0))


def make_selection(
    uids: np.ndarray,
    multiplicities: np.ndarray,
    manifest: dict[str, Any],
    *,
    weights: np.ndarray | None = None,
    scores: np.ndarray | None = None,
) -> Selection:
    """Build a selection from distinct uids, uint64 [n, 2], and multiplicities, int64 [n].

    `weights`, float32 [n], and `scores`, float [n], are of all of them; those of what is not kept
    are left out.

    Raises:
        InputError: nothing is kept.

    Example:
        >>> import numpy as np
        >>> from siftclip.datamodules import make_selection
        >>> uids = np.array([[0, 9], [0, 4], [0, 7]], dtype=np.uint64)
        >>> selection = make_selection(uids, np.array([2, 1, 0]), {"selector": "mine"})
        >>> selection.uids[:, 1], selection.multiplicities, len(selection)
        (array([4, 9], dtype=uint64), array([1, 2]), 3)
    """
    kept = np.flatnonzero(multiplicities)
    if len(kept) == 0:
        if scores is not None and len(scores) and not can_be_kept(scores).any():
            raise InputError(
                f"The selection keeps none of {len(uids)} samples: each of them has no score (NaN) "
                "or the score -inf, which says never. Look at what the scores are made from."
            )
        raise InputError(
            f"The selection keeps none of {len(uids)} samples. Raise the selector's fraction, or "
            "lower its threshold, or look at the scores' quantiles with `siftclip score`."
        )
    order = kept[sort_uids(uids[kept])]
    return Selection(
        uids=uids[order],
        multiplicities=multiplicities[order],
        manifest=manifest,
        weights=None if weights is None else weights[order],
        scores=None if scores is None else scores[order].astype(np.float32),
    )


def read_subset(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a DataComp subset file: distinct uids, uint64 [n, 2], ascending, and multiplicities.

    Raises:
        InputError: the file is missing, or is not a one-dimensional npy of dtype `u8,u8`.
    """
    array = read_npy(path)
    if array.ndim == 1 and array.dtype.kind in "SU":
        listed = _uids_of_texts(array, path)
    elif array.dtype != UID_DTYPE or array.ndim != 1:
        raise InputError(
            f"{path} must be a DataComp subset, one-dimensional with dtype 'u8,u8', or uids as "
            f"texts. It has dtype {array.dtype} and shape {array.shape}."
        )
    else:
        listed = from_structured(array)
    return distinct_uids(listed)


def _uids_of_texts(texts: np.ndarray, path: Path) -> np.ndarray:
    """Parse a one-dimensional array of texts: uint64 [n, 2].

    Raises:
        InputError: one of them is no uid.
    """
    plain = [
        plain_uid(text)
        for text in (
            np.char.decode(texts, "latin-1") if texts.dtype.kind == "S" else texts
        ).tolist()
    ]
    if None in plain:
        wrong = plain.index(None)
        raise InputError(f"{path} must hold {UID_RULE}. Row {wrong} is {str(texts[wrong])!r}.")
    return parse_uids([uid for uid in plain if uid is not None])


def write_subset(selection: Selection, folder: Path) -> None:
    """Write DataComp's subset file into `folder`, and `weights.npy` if there are weights.

    That is a structured array of the distinct uids (f0, f1) with the field `weight`, which
    `loss.weights.path` reads.
    """
    weights = folder / WEIGHTS_NAME
    if selection.weights is None:
        delete_file(weights)
    else:
        table = np.empty(len(selection.uids), dtype=_WEIGHTS_DTYPE)
        table["f0"], table["f1"] = selection.uids.T
        table[WEIGHTS_COLUMN] = selection.weights
        write_npy(weights, table)
    write_npy(folder / SUBSET_NAME, selection.to_subset())


def write_selection(selection: Selection, folder: Path, *, scores: bool = False) -> None:
    """Write the files of `write_subset` and the manifest into `folder`; the manifest last.

    With `scores` also these, where there are some: `scores.npy`, float32, in the order of the
    distinct uids.
    """
    write_subset(selection, folder)
    if scores and selection.scores is not None:
        write_npy(folder / SCORES_NAME, selection.scores)
    write_json(folder / MANIFEST_NAME, {**selection.manifest, "digest": selection.digest})


def read_selection(folder: Path) -> Selection:
    """Read what `write_selection` wrote.

    Raises:
        InputError: a file is missing or damaged, or the subset is not the one that the manifest
            describes.
    """
    try:
        manifest = read_json_object(folder / MANIFEST_NAME)
        uids, multiplicities = read_subset(folder / SUBSET_NAME)
        weights = read_weights(folder / WEIGHTS_NAME, uids)
        scores = _read_scores(folder / SCORES_NAME, uids)
    except InputError as error:
        raise DamagedError(error, f"Delete the folder {folder} and select again.") from None
    digest = manifest.pop("digest", None)
    selection = Selection(
        uids=uids,
        multiplicities=multiplicities,
        manifest=manifest,
        weights=weights,
        scores=scores,
    )
    if selection.digest != digest:
        parts = "" if manifest.get("weights") is None else f", with the weights of {WEIGHTS_NAME},"
        raise DamagedError(
            f"{folder / SUBSET_NAME}{parts} is not the subset that {MANIFEST_NAME} describes: its "
            f"SHA-256 is {selection.digest}, not {digest}.",
            "Delete the folder and select again.",
        )
    return selection


def read_weights(path: Path, uids: np.ndarray) -> np.ndarray | None:
    """Read the weights of distinct uids, uint64 [n, 2]: float32 [n]; None if there is no such file.

    Raises:
        InputError: the file is damaged, or is about other uids.
    """
    if not os.path.lexists(path):
        return None
    table = read_npy(path, kind="file of weights")
    if table.dtype != _WEIGHTS_DTYPE or table.shape != (len(uids),):
        raise InputError(
            f"{path} is not a readable file of weights: it must have {len(uids)} rows of "
            f"{_WEIGHTS_DTYPE}. It has {list(table.shape)} of {table.dtype}."
        )
    same = np.array_equal(from_structured(table), uids)
    weights: np.ndarray = table[WEIGHTS_COLUMN].astype(np.float32)
    if not same:
        raise InputError(f"{path} is about other samples than {path.with_name(SUBSET_NAME)}.")
    return weights


def _read_scores(path: Path, uids: np.ndarray) -> np.ndarray | None:
    """Read the scores of distinct uids: float32 [n]; None if there is no such file.

    Raises:
        InputError: the file is damaged, or is of another number of samples.
    """
    if not os.path.lexists(path):
        return None
    scores = read_npy(path)
    if scores.dtype != np.float32 or scores.shape != (len(uids),):
        raise InputError(f"{path} must hold {len(uids)} scores of float32, one for each uid.")
    return scores


def row_weights(selection: Selection, pool: Pool) -> np.ndarray | None:
    """Return what the samples of a pool count in the loss by a selection: float32 [len(pool)].

    1 for what is not selected; None if the selection does not weigh.
    """
    if selection.weights is None:
        return None
    rows = pool.table.find(selection.uids)
    weights = np.ones(len(pool), dtype=np.float32)
    weights[rows[rows >= 0]] = selection.weights[rows >= 0]
    return weights


def expand_rows(selection: Selection, pool: Pool) -> tuple[np.ndarray, Coverage]:
    """Find the pool's rows of a selection, int64, repetitions repeated, and how many it covers.

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


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class SelectedSamples:
    """A selection of samples in some place: a pool, or arrays."""

    selection: Selection
    # int64, where its samples are there, ascending, repetitions repeated: not in the order of `ids`
    # and `scores`, which is that of the uids
    rows: np.ndarray

    def __len__(self) -> int:
        """Count all samples, with repetitions."""
        return len(self.selection)

    @property
    def ids(self) -> np.ndarray:
        """The distinct uids, str [n], see `Selection`."""
        return self.selection.ids

    @property
    def multiplicities(self) -> np.ndarray:
        """How often each of them is kept, int64 [n]."""
        return self.selection.multiplicities

    @property
    def scores(self) -> np.ndarray | None:
        """Their scores, by which they were chosen, float32 [n]; None where there are none.

        NegCLIPLoss with the precision "screened" knows them as precisely as it needed to.
        """
        return self.selection.scores

    @property
    def weights(self) -> np.ndarray | None:
        """What each of them counts in the loss, float32 [n]; None: all alike."""
        return self.selection.weights

    @property
    def manifest(self) -> dict[str, Any]:
        """What was kept, by what, from what, and at which cost."""
        return self.selection.manifest

    @property
    def frame(self) -> pd.DataFrame:
        """One row per distinct sample, see `Selection`."""
        return self.selection.frame

    def to_datacomp(self, path: str | os.PathLike[str]) -> Path:
        """Write DataComp's subset file, see `Selection`."""
        return self.selection.to_datacomp(path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._summary()})"

    def _summary(self) -> str:
        distinct = len(self.selection.uids)
        counted = f"{len(self):,} samples"
        if distinct != len(self):
            counted += f", {distinct:,} distinct"
        name = self.manifest.get("selector")
        return counted if name is None else f"{name}: {counted}"
