"""What several kinds are made of: labels from someone else's bytes, and columns of lists."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from siftclip.datamodules.pool.pool import MAX_CAPTION_BYTES
from siftclip.datamodules.pool.reader import MAX_WORD_LETTERS, has_long_word
from siftclip.errors import InputError
from siftclip.eval.tasks.kinds.values import TaskSamples

if TYPE_CHECKING:
    import pyarrow as pa


def load_array(data: bytes) -> np.ndarray | None:
    """Read an npy array; None where the data are none, or need unpickling."""
    try:
        # np.load is safe without pickles, and a damaged array raises anything, MemoryError too
        return np.asarray(np.load(io.BytesIO(data), allow_pickle=False))
    except Exception:
        return None


def read_captions(data: bytes) -> tuple[str, ...]:
    """Read the captions of a .txt member, one a line.

    Raises:
        InputError: it is no UTF-8 text, or empty, or has a blank line, or one that would take a
            tokenizer seconds.
    """
    try:
        captions = tuple(data.decode("utf-8").splitlines())
    except UnicodeDecodeError as error:
        raise InputError(f"the captions must be UTF-8 text: {error}.") from None
    if not captions:
        raise InputError("there must be at least one caption. The .txt member is empty.")
    for number, caption in enumerate(captions, start=1):
        if not caption.strip():
            raise InputError(f"a caption must not be blank. Line {number} of .txt is.")
        if len(caption.encode()) > MAX_CAPTION_BYTES or has_long_word(caption):
            raise InputError(
                f"a caption may have {MAX_CAPTION_BYTES} bytes, and {MAX_WORD_LETTERS} letters in "
                f"a row. Line {number} of .txt has more."
            )
    return captions


def caption_lists(samples: TaskSamples) -> list[list[str]]:
    """Return the captions of each sample as a column."""
    return [list(captions) for captions in samples.captions]


def score_lists(rows: np.ndarray) -> pa.FixedSizeListArray:
    """Return the rows of an array [n, k] as a column of lists."""
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
