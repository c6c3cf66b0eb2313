"""How many loader processes, and threads of torch, the ranks of a machine get."""

from __future__ import annotations

import pytest
import torch

from siftclip import cores
from siftclip.trainer.runtime.cores import share_cores, worker_count
from siftclip.trainer.runtime.lightning_setup import (
    expected_world_size,
    loader_options,
    local_ranks,
)
from siftclip.trainer.settings.data import DataSettings
from siftclip.trainer.settings.lightning import TrainerSettings

FOUR = TrainerSettings(accelerator="cpu", devices=4)
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_WORLD_SIZE": "3",
    "WORLD_SIZE": "6",
}


@pytest.fixture(autouse=True)
def _sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(cores, "memory_bytes", lambda: 256 << 30)
    for name in (*TORCHRUN, "SLURM_NTASKS", "SLURM_STEP_ID", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def test_ranks_that_lightning_starts_share_the_cores() -> None:
    alone = TrainerSettings(accelerator="cpu")
    assert loader_options(DataSettings(), alone).num_workers == 15
    assert loader_options(DataSettings(), FOUR).num_workers == 3
    assert loader_options(DataSettings(num_workers=9), FOUR).num_workers == 9


def test_torchrun_says_how_many_ranks_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    settings = TrainerSettings(accelerator="cpu")
    assert (local_ranks(settings), expected_world_size(settings)) == (2, 6)
    assert loader_options(DataSettings(), settings).num_workers == 7
    assert worker_count("auto", ranks=6) == 7  # of all machines, which it knows better


def test_torch_has_the_cores_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    share_cores(15)
    share_cores(2)
    share_cores(2, ranks=4)
    share_cores(9, ranks=4)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    share_cores(2)
    assert threads == [1, 14, 2, 1]
