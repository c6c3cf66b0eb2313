"""The file of chosen rows goes on where it was, and another file in its place is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from siftclip.errors import InputError
from siftclip.trainer.online.record import ChosenRows


def test_it_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "chosen.npy"
    for step in range(2):
        ChosenRows(path, steps=3, samples=2).write(step, np.array([step, 7]))
    assert np.load(path).tolist() == [[0, 7], [1, 7], [-1, -1]]


@pytest.mark.parametrize("other", [np.zeros((3, 5), np.int64), np.zeros((3, 2)), np.zeros(0)])
def test_another_file_is_named(tmp_path: Path, other: np.ndarray) -> None:
    path = tmp_path / "chosen.npy"
    np.save(path, other)
    with pytest.raises(InputError, match=r"chosen\.npy must hold int64 \[3, 2\].*Delete it"):
        ChosenRows(path, steps=3, samples=2).write(0, np.array([1, 2]))
    path.write_bytes(b"x")
    with pytest.raises(InputError, match=r"chosen\.npy is not a readable npy file"):
        ChosenRows(path, steps=3, samples=2).write(0, np.array([1, 2]))
