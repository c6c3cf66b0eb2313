"""Which samples every step was trained on, as a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from siftclip.errors import InputError
from siftclip.files import atomic_path, has_form, read_npy

RECORD_NAME = "chosen.npy"


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
        if not self.path.is_file():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(self.path) as temporary:
                blank = np.lib.format.open_memmap(temporary, "w+", np.int64, self.shape)
                blank[:] = -1
                blank.flush()
        there = read_npy(self.path, mapped=True)
        if not has_form(there, np.int64, self.shape):
            raise InputError(
                f"{self.path} must hold int64 {list(self.shape)}, a row for each step of the run. "
                f"It holds {there.dtype} {list(there.shape)}. Delete it: it is begun anew."
            )
        return np.lib.format.open_memmap(self.path, "r+")
