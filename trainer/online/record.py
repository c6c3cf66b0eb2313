"""Which samples every step was trained on, as a file."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from siftclip.errors import InputError
from siftclip.files import has_form, read_npy
from siftclip.writing import WriteError, allocate, atomic_path, writing_to

RECORD_NAME = "chosen.npy"

log = logging.getLogger(__name__)


class ChosenRows:
    """Writes the pool's rows of each step's batch: int64 [steps, samples], -1 where none is known.

    A step that is repeated after a restart is written over. `numpy.load` reads the file at any
    time; rows are numbers of the pool's index. The file is made by the first write.
    """

    def __init__(self, path: Path, *, steps: int, samples: int) -> None:
        self.path, self.shape = path, (steps, samples)
        self._rows: np.ndarray | None = None

    def write(self, step: int, rows: np.ndarray) -> None:
        """Write the rows of a step, int64 [samples]. One process alone may call it."""
        if self._rows is None:
            self._rows = self._open()
        self._rows[step] = rows

    def _open(self) -> np.ndarray:
        rows = self._mapped() if self.path.is_file() else None
        if rows is None:
            with atomic_path(self.path) as temporary:
                blank = np.lib.format.open_memmap(temporary, "w+", np.int64, self.shape)
                with temporary.open("r+b") as file:
                    allocate(file.fileno(), temporary.stat().st_size)
                blank[:] = -1
                blank.flush()
            with writing_to(self.path):
                rows = np.lib.format.open_memmap(self.path, "r+")
        return rows

    def _mapped(self) -> np.ndarray | None:
        """Map the file that is there; None, which is said, if it is damaged."""
        try:
            rows = read_npy(self.path, mapped=True)  # writable it would lengthen one that is cut
            if has_form(rows, np.int64, self.shape):
                with writing_to(self.path):
                    return np.lib.format.open_memmap(self.path, "r+")
            fault = f"it has the shape {rows.shape} and the type {rows.dtype}"
        except WriteError:
            raise
        except InputError as error:  # cut off, empty, or no npy file
            fault = str(error)
        log.warning("%s is damaged and begun anew: %s", self.path, fault)
        return None
