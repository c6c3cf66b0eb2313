"""The file of what every step was trained on, also where a power cut has damaged it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from siftclip.trainer.online.record import ChosenRows


def test_rows_stay_when_a_run_continues(tmp_path: Path) -> None:
    path = tmp_path / "chosen.npy"
    ChosenRows(path, steps=3, samples=2).write(0, np.array([4, 5]))
    ChosenRows(path, steps=3, samples=2).write(1, np.array([6, 7]))
    assert np.load(path).tolist() == [[4, 5], [6, 7], [-1, -1]]


@pytest.mark.parametrize("kept_bytes", [0, 60, 140])
@pytest.mark.parametrize("tail", [b"", bytes(40)])
def test_a_damaged_file_is_begun_anew_and_said(
    tmp_path: Path, kept_bytes: int, tail: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "chosen.npy"
    ChosenRows(path, steps=30, samples=2).write(0, np.array([4, 5]))
    path.write_bytes(path.read_bytes()[:kept_bytes] + tail)
    ChosenRows(path, steps=30, samples=2).write(1, np.array([6, 7]))
    assert np.load(path)[:2].tolist() == [[-1, -1], [6, 7]]
    assert "chosen.npy is damaged and begun anew" in caplog.text
