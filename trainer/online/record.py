"""Which samples every step was trained on, as a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

RECORD_NAME = "chosen.npy"


class ChosenRows:
    """Writes the pool's rows of each step's batch: int64 [steps, samples], -1 where none is known.

    A step that is repeated after a restart is written over. `numpy.load` reads the file at any
    time; rows are numbers of the pool's index.
    """

    def __init__(self, path: Path, *, steps: int, samples: int) -> None:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            blank = np.lib.format.open_memmap(path, "w+", np.int64, (steps, samples))
            blank[:] = -1
            blank.flush()
        self._rows = np.lib.format.open_memmap(path, "r+")

    def write(self, step: int, rows: np.ndarray) -> None:
        """Note the rows of a step, int64 [samples]."""
        self._rows[step] = rows
