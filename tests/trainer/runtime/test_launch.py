"""Launches by torchrun and Slurm, as their variables tell of them, against the configuration."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.plugins.environments import SLURMEnvironment

from siftclip.errors import InputError
from siftclip.trainer.runtime.launch import (
    Launch,
    check_world_size,
    cluster_plugins,
    find_launch,
    resolve_devices,
    stop_signals,
)

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_WORLD_SIZE": "2",
    "WORLD_SIZE": "8",
}
SRUN = {
    "SLURM_JOB_NAME": "train",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "16",
    "SLURM_NTASKS_PER_NODE": "8",
    "SLURM_NNODES": "2",
    "SLURM_PROCID": "0",
}


def test_what_was_launched() -> None:
    assert find_launch({}) is None
    assert find_launch(TORCHRUN) == Launch(launcher="torchrun", devices=4, num_nodes=2)
    assert find_launch(SRUN) == Launch(launcher="srun", devices=8, num_nodes=2)
    both = find_launch({**SRUN, **TORCHRUN})
    assert both is not None
    assert both.launcher == "torchrun"
    # one task needs no further variables, inside a script as well as under srun
    assert find_launch({"SLURM_NTASKS": "1"}) == Launch(launcher="srun", devices=1, num_nodes=1)


@pytest.mark.parametrize(
    ("devices", "num_nodes", "environment", "expected"),
    [
        ("auto", "auto", {}, ("auto", 1)),
        (2, 1, {}, (2, 1)),
        ([0, 3], "auto", {}, ([0, 3], 1)),
        ("auto", "auto", TORCHRUN, (4, 2)),
        (-1, "auto", TORCHRUN, (4, 2)),
        ("4", 2, TORCHRUN, (4, 2)),
        ([4, 5, 6, 7], "auto", TORCHRUN, ([4, 5, 6, 7], 2)),
        ("auto", "auto", SRUN, (8, 2)),
        (8, 2, SRUN, (8, 2)),
        (2, 3, {"MASTER_ADDR": "node0", "NODE_RANK": "1"}, (2, 3)),
    ],
)
def test_devices_and_nodes(
    devices: Any, num_nodes: Any, environment: dict[str, str], expected: tuple[Any, int]
) -> None:
    assert resolve_devices(devices, num_nodes, environment) == expected


@pytest.mark.parametrize(
    ("devices", "num_nodes", "environment", "message"),
    [
        (2, "auto", TORCHRUN, r"trainer\.devices=2 does not match torchrun.* 4 proc.*node=2"),
        ([0, 1], "auto", TORCHRUN, r"trainer\.devices=2 does not match torchrun"),
        ("auto", 1, TORCHRUN, r"trainer\.num_nodes=1 .*started 2 nodes.*--nnodes=1"),
        (4, "auto", SRUN, r"trainer\.devices=4 .*srun, which started 8.*--ntasks-per-node=4"),
        ("auto", 4, SRUN, r"trainer\.num_nodes=4 .*srun, which started 2 nodes.*--nodes=4"),
        ("auto", 2, {}, r"trainer\.num_nodes=2, but neither.*MASTER_ADDR and NODE_RANK"),
        ("auto", 2, {"MASTER_ADDR": "a"}, r"and NODE_RANK is not set"),
        ("many", "auto", {}, r"trainer\.devices must be auto.*Got 'many'"),
        (0, "auto", {}, r"trainer\.devices must be auto.*Got 0"),
        ("auto", "all", {}, r"trainer\.num_nodes must be auto or an integer.*Got 'all'"),
        ("auto", True, {}, r"trainer\.num_nodes must be auto or an integer.*Got True"),
    ],
)
def test_mismatches_are_named(
    devices: Any, num_nodes: Any, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        resolve_devices(devices, num_nodes, environment)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_STEP_ID": None}, "16 tasks, but this process was not started by srun"),
        ({"SLURM_NTASKS_PER_NODE": None}, "16 tasks without saying.*--ntasks-per-node"),
        ({"SLURM_NTASKS": "12"}, "12 tasks, but --nodes=2 and --ntasks-per-node=8 make 16"),
        ({"SLURM_JOB_NAME": "interactive"}, "16 tasks in a job named 'interactive'.*train alone"),
        ({"SLURM_NTASKS": "x"}, "SLURM_NTASKS of the launcher must be an integer. Got 'x'"),
    ],
)
def test_srun_mistakes_are_named(changes: dict[str, str | None], message: str) -> None:
    environment = {k: v for k, v in {**SRUN, **changes}.items() if v is not None}
    with pytest.raises(InputError, match=message):
        find_launch(environment)


def test_torchrun_with_unequal_nodes() -> None:
    with pytest.raises(InputError, match=r"6 processes on 2 nodes, of which 4 .*same --nproc"):
        find_launch({**TORCHRUN, "WORLD_SIZE": "6"})
    with pytest.raises(InputError, match=r"LOCAL_WORLD_SIZE of the launcher .*Got None"):
        find_launch({"TORCHELASTIC_RUN_ID": "none"})


def test_a_shell_inside_slurm_is_no_launch() -> None:
    shell = {**SRUN, "SLURM_JOB_NAME": "bash", "SLURM_NTASKS": "1"}
    assert find_launch(shell) is None
    assert resolve_devices("auto", "auto", shell) == ("auto", 1)


# What the checks are for: Lightning reads these variables without asking whether they agree.
@pytest.mark.parametrize("job_name", ["train", "bash", "interactive"])
def test_slurm_is_seen_where_lightning_sees_it(
    job_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {**SRUN, "SLURM_JOB_NAME": job_name, "SLURM_NTASKS": "1"}
    environment |= {"SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (find_launch(environment) is not None) == SLURMEnvironment.detect()


def test_world_size() -> None:
    check_world_size(8, TORCHRUN)
    check_world_size(16, SRUN)
    check_world_size(3, {})
    with pytest.raises(InputError, match="srun started 16 processes, but the trainer counts 1"):
        check_world_size(1, SRUN)


def test_lightning_does_not_requeue_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    (plugin,) = cluster_plugins(SRUN)
    assert isinstance(plugin, SLURMEnvironment)
    assert not plugin.auto_requeue
    assert cluster_plugins(TORCHRUN) == cluster_plugins({}) == []


def test_lightning_trains_on_what_srun_started(tmp_path: Path, tiny_training: Any) -> None:
    """Two processes with the variables that srun gives them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def task(rank: int) -> None:
        ours = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": 0}
        ours |= {"SLURM_NTASKS": 2, "SLURM_NTASKS_PER_NODE": 2, "SLURM_NNODES": 1}
        ours |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in {**SRUN, **ours}.items()})
        devices, num_nodes = resolve_devices("auto", "auto", os.environ)
        plugins = cluster_plugins(os.environ)
        trainer = tiny_training(total_steps=2).fit(
            devices=devices, num_nodes=num_nodes, strategy="ddp", plugins=plugins
        )
        check_world_size(trainer.world_size, os.environ)
        (tmp_path / str(trainer.global_rank)).write_text(str(trainer.world_size))

    context = multiprocessing.get_context("fork")
    tasks = [context.Process(target=task, args=(rank,)) for rank in range(2)]
    for process in tasks:
        process.start()
    for process in tasks:
        process.join(60)
    assert [process.exitcode for process in tasks] == [0, 0]
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "2", "1": "2"}


def test_idle_gpus_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    resolve_devices("auto", "auto", {**SRUN, "SLURM_GPUS_ON_NODE": "8"})
    resolve_devices("auto", "auto", {**SRUN, "SLURM_GPUS_ON_NODE": "16", "SLURM_PROCID": "3"})
    assert not caplog.records
    resolve_devices("auto", "auto", {**SRUN, "SLURM_GPUS_ON_NODE": "16"})
    (record,) = caplog.records
    assert "16 GPUs a node, but srun started 8" in record.getMessage()


@pytest.mark.usefixtures("hangups")
def test_signals() -> None:
    assert stop_signals({}) == (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    assert stop_signals({}) == (signal.SIGINT, signal.SIGTERM)
    signal.signal(signal.SIGHUP, before)
    assert stop_signals({"SUBMITIT_EXECUTOR": "slurm"})[-1] == signal.SIGUSR2
    other = {"SUBMITIT_EXECUTOR": "slurm", "SUBMITIT_PREEMPT_SIGNAL": "USR1"}
    assert stop_signals(other)[-1] == signal.SIGUSR1
