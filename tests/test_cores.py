"""How many loader processes a rank gets, from cores, ranks and memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from siftclip import cores
from siftclip.cores import cores_of_rank, ranks_here, suggested_workers

LAUNCHERS = ("LOCAL_WORLD_SIZE", "SLURM_STEP_ID", "SLURM_NTASKS_PER_NODE")
GIB = 1 << 30

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """`machine(cores, allowed=, memory=, VARIABLE=value)`: what this process finds."""

    def make(count: int, *, allowed: int | None = None, memory: int = 4096, **told: str) -> None:
        seen = range(count if allowed is None else allowed)
        monkeypatch.setattr(cores.os, "cpu_count", lambda: count)
        monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(seen), raising=False)
        monkeypatch.setattr(cores, "memory_bytes", lambda: memory * GIB)
        for name in LAUNCHERS:
            monkeypatch.delenv(name, raising=False)
        for name, value in told.items():
            monkeypatch.setenv(name, value)

    return make


@pytest.mark.parametrize(("count", "workers"), [(1, 1), (2, 1), (4, 3), (16, 15), (256, 64)])
def test_a_core_is_left_to_training(machine: Machine, count: int, workers: int) -> None:
    machine(count)
    assert suggested_workers() == workers


def test_cores_that_are_not_allowed_do_not_count(machine: Machine) -> None:
    machine(64, allowed=16)
    assert suggested_workers() == 15


def test_ranks_share_the_cores(machine: Machine) -> None:
    machine(64)
    assert (cores_of_rank(8), suggested_workers(8)) == (8, 7)
    machine(64, allowed=32, LOCAL_WORLD_SIZE="8")  # torchrun tells, and binds nobody
    assert (ranks_here(), cores_of_rank(), suggested_workers()) == (8, 4, 3)
    assert suggested_workers(2) == 3
    machine(4, LOCAL_WORLD_SIZE="8")
    assert (cores_of_rank(), suggested_workers()) == (1, 1)


def test_srun_gives_each_rank_its_cores_or_all_of_them_the_machine(machine: Machine) -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_NTASKS_PER_NODE": "8"}
    machine(64, allowed=8, **step)
    assert (cores_of_rank(), suggested_workers()) == (8, 7)
    machine(64, **step)  # not bound
    assert (cores_of_rank(), suggested_workers()) == (8, 7)
    machine(64, SLURM_NTASKS_PER_NODE="8")  # of a job, by a process that srun has not started
    assert suggested_workers() == 63


def test_processes_fit_into_half_of_the_memory(machine: Machine) -> None:
    machine(64, memory=16)
    assert suggested_workers() == 8
    assert suggested_workers(4) == 2
    machine(64, memory=1)
    assert suggested_workers() == 1
    machine(64, memory=64, SLURM_STEP_ID="0", SLURM_NTASKS_PER_NODE="8")
    assert suggested_workers() == 4
