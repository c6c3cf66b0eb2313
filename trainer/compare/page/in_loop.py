"""How often a run has chosen each sample while it trained, as far as it has kept that."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.selection.selection import MANIFEST_NAME, Selection, read_selection
from siftclip.errors import InputError
from siftclip.files import has_content, read_npy
from siftclip.trainer.online.record import RECORD_NAME
from siftclip.trainer.runtime.run_dir import RunDir

_CHUNK = 1 << 20  # rows that are counted at once

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenInLoop:
    """What a run has chosen while it trained."""

    times: np.ndarray  # int64 [n], how often each sample of the pool
    of: str  # what was counted, to follow a comma


def chosen_in_loop(run: RunDir, selection: Selection, pool: Pool) -> ChosenInLoop | None:
    """Count what a run has chosen while it trained; None where it has kept nothing of it.

    Args:
        run: with the rows of each step (`online.diagnostics.record_chosen`), or with selections
            that it has made while training.
        selection: that it began with.
        pool: that both are of.
    """
    of_this_pool = (selection.manifest.get("pool") or {}).get("fingerprint") == pool.fingerprint
    record = run.path / RECORD_NAME
    folders = sorted(run.path.glob(f"selections/v*/{MANIFEST_NAME}"))
    try:
        if of_this_pool and has_content(record):  # its rows are numbers of this very pool
            steps = read_npy(record, mapped=True)
            return ChosenInLoop(times=count_rows(steps, len(pool)), of=f"in {len(steps):,} steps")
        if not folders:
            return None
        times = np.zeros(len(pool), dtype=np.int64)
        for path in folders:
            rows = pool.table.find(read_selection(path.parent).uids)
            times[rows[rows >= 0]] += 1
    except InputError as error:
        log.warning("the report does not show what %s has chosen: %s", run.path, error)
        return None
    return ChosenInLoop(times=times, of=f"in {len(folders):,} selections while training")


def count_rows(steps: np.ndarray, samples: int) -> np.ndarray:
    """Count how often each row of a pool was trained on: int64 [samples].

    Args:
        steps: int64 [steps, batch], rows; -1 for none. It may be a map of a file.
        samples: of the pool.

    Raises:
        InputError: it is another kind of array, or holds what is no row of the pool.
    """
    if steps.dtype != np.int64 or steps.ndim != 2:
        raise InputError(
            f"{RECORD_NAME} must be int64 [steps, samples]. Got {steps.dtype} {steps.shape}."
        )
    times = np.zeros(samples, dtype=np.int64)
    rows = steps.reshape(-1)
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK]
        if len(part) and not -1 <= part.min() <= part.max() < samples:
            raise InputError(
                f"{RECORD_NAME} must hold rows of a pool of {samples} samples, or -1. It has rows "
                f"from {part.min()} to {part.max()}."
            )
        times += np.bincount(part[part >= 0], minlength=samples)
    return times
