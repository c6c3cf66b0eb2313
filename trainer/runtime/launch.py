"""What started this process, whether the configuration agrees with it, and how it is told to stop.

All of it are functions of the environment's variables, so that a wrong launch is named before
Lightning meets it: there it is a hang, or each process trains alone.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from siftclip.errors import InputError
from siftclip.trainer.settings.lightning import TrainerSettings

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments import ClusterEnvironment

log = logging.getLogger(__name__)

Devices = int | str | list[int]

# Jobs of these names are shells; Lightning ignores Slurm in them, as its SLURMEnvironment says.
_SHELLS = ("bash", "interactive")
_MOST_DEVICES = 1024  # on a node
_MOST_NODES = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """The processes that a launcher has started, one a device."""

    launcher: str  # torchrun or srun
    devices: int  # on each node
    num_nodes: int

    @property
    def world_size(self) -> int:
        return self.devices * self.num_nodes


STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # what people, launchers, terminals send


class TrainingStopped(Exception):
    """Training ended early because of a signal; its last step is in a checkpoint.

    `exit_status` is what a shell reports for a process that the signal ended.
    """

    def __init__(self, by: signal.Signals, *, place: str) -> None:
        """Say what was stopped.

        Args:
            by: what asked for it.
            place: where training was, such as "at step 3 of 10".
        """
        super().__init__(f"stopped by {by.name} {place}; the same command continues.")
        self.signal = by
        self.place = place
        self.exit_status = 128 + by


def find_launch(environment: Mapping[str, str]) -> Launch | None:
    """Find what torchrun or srun has started; None where the command was started by itself.

    Raises:
        InputError: the launcher started processes that would not find each other.
    """
    if "TORCHELASTIC_RUN_ID" in environment:  # first, as in Lightning: it may run inside Slurm
        return _torchrun_launch(environment)
    if "SLURM_NTASKS" in environment:
        return _srun_launch(environment)
    return None


def _torchrun_launch(environment: Mapping[str, str]) -> Launch:
    launch = Launch(
        launcher="torchrun",
        devices=_number(environment, "LOCAL_WORLD_SIZE"),
        num_nodes=_number(environment, "GROUP_WORLD_SIZE", default=1),
    )
    world_size = _number(environment, "WORLD_SIZE", default=launch.world_size)
    if world_size != launch.world_size:
        raise InputError(
            f"torchrun started {world_size} processes on {launch.num_nodes} nodes, of which "
            f"{launch.devices} on this one. Start it with the same --nproc_per_node on every node."
        )
    return launch


def _srun_launch(environment: Mapping[str, str]) -> Launch | None:
    tasks = _number(environment, "SLURM_NTASKS")
    by_srun = "SLURM_STEP_ID" in environment  # sbatch and salloc give the job's other variables
    if environment.get("SLURM_JOB_NAME") in _SHELLS:
        if tasks > 1 and by_srun:
            raise InputError(
                f"srun started {tasks} tasks in a job named {environment['SLURM_JOB_NAME']!r}, in "
                "which Lightning ignores Slurm: each task would train alone. Give the job another "
                "name (salloc --job-name=train), or unset SLURM_NTASKS to train in one process."
            )
        return None
    if tasks > 1 and not by_srun:
        raise InputError(
            f"The job asked Slurm for {tasks} tasks, but this process was not started by srun, so "
            "it would wait for the others for ever. Write `srun siftclip train ...` in the script."
        )
    if tasks > 1 and "SLURM_NTASKS_PER_NODE" not in environment:
        raise InputError(
            f"srun started {tasks} tasks without saying how many a node. Use --nodes and "
            "--ntasks-per-node in place of --ntasks."
        )
    launch = Launch(
        launcher="srun",
        devices=_number(environment, "SLURM_NTASKS_PER_NODE", default=tasks),
        num_nodes=_number(environment, "SLURM_NNODES", default=1),
    )
    if launch.world_size != tasks:
        raise InputError(
            f"srun started {tasks} tasks, but --nodes={launch.num_nodes} and "
            f"--ntasks-per-node={launch.devices} make {launch.world_size}. Leave --ntasks out."
        )
    return launch


def resolve_devices(
    devices: int | str | Sequence[int], num_nodes: int | str, environment: Mapping[str, str]
) -> tuple[Devices, int]:
    """Return devices per node and nodes, as Lightning's Trainer takes them.

    `auto` is what the launcher started; without one, the devices that Lightning finds on one node.

    Raises:
        InputError: an explicit value is not what the launcher started, or is no number.
    """
    wanted: Devices = devices if isinstance(devices, (int, str)) else [int(d) for d in devices]
    count = device_count(wanted)
    nodes = _node_count(num_nodes)
    launch = find_launch(environment)
    if launch is None:
        _check_own_launcher(nodes or 1, environment)
        return wanted, nodes or 1
    ways_out = {
        "torchrun": ("--nproc_per_node", "--nnodes"),
        "srun": ("--ntasks-per-node", "--nodes"),
    }[launch.launcher]
    pairs = ((count, launch.devices, "devices"), (nodes, launch.num_nodes, "num_nodes"))
    for (value, started, name), way_out in zip(pairs, ways_out, strict=True):
        if value is not None and value != started:
            what = "processes on each node" if name == "devices" else "nodes"
            raise InputError(
                f"trainer.{name}={value} does not match {launch.launcher}, which started {started} "
                f"{what}. Leave trainer.{name}=auto, or start {launch.launcher} with "
                f"{way_out}={value}."
            )
    _warn_of_idle_gpus(launch, environment)
    # A list says which GPUs, which the launcher does not know.
    return (wanted if isinstance(wanted, list) else launch.devices), launch.num_nodes


def check_world_size(trainer_world_size: int, environment: Mapping[str, str]) -> None:
    """Check that the trainer counts the processes that were started.

    Raises:
        InputError: it does not, so that groups of them would train on their own.
    """
    launch = find_launch(environment)
    if launch is not None and launch.world_size != trainer_world_size:
        raise InputError(
            f"{launch.launcher} started {launch.world_size} processes, but the trainer counts "
            f"{trainer_world_size}. Leave trainer.devices, trainer.num_nodes and trainer.strategy "
            "at auto."
        )


def require_launcher(
    command: str, settings: TrainerSettings, environment: Mapping[str, str]
) -> None:
    """Check that a command that trains several times does not need Lightning's own launcher.

    That one starts the whole command anew for each rank, and again for each training.

    Args:
        command: its name.
        settings: the devices.
        environment: its variables.

    Raises:
        InputError: several devices, and neither torchrun nor srun has started one process for each.
    """
    devices, _ = resolve_devices(settings.devices, settings.num_nodes, environment)
    if find_launch(environment) is not None:
        return
    count = device_count(devices)
    if count is None:
        import torch

        count = torch.cuda.device_count() if settings.accelerator != "cpu" else 1
    if count > 1:
        raise InputError(
            f"{command} on {count} devices must be started by torchrun: torchrun --nproc_per_node "
            f"{count} -m siftclip.trainer.cli {command} ... Or use trainer.devices=1."
        )


def cluster_plugins(environment: Mapping[str, str]) -> list[ClusterEnvironment]:
    """Return Lightning's plugins for this launch.

    Under Slurm, one without its answer to SIGUSR1: that saves in the middle of a step, and every
    later restart goes back to that file, even where newer checkpoints are. StopOnSignal and
    `sbatch --requeue` take its place.
    """
    launch = find_launch(environment)
    if launch is None or launch.launcher != "srun":
        return []
    from lightning.fabric.plugins.environments import SLURMEnvironment

    return [SLURMEnvironment(auto_requeue=False)]


def stop_signals(environment: Mapping[str, str]) -> tuple[signal.Signals, ...]:
    """Return signals that ask training to stop.

    SIGINT, SIGTERM, SIGHUP where it is not ignored, as under nohup: a terminal was closed, and
    submitit's if it started us. submitit has Slurm send that one before the time is over, and its
    handler requeues the job.
    """
    asked = STOPS if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else STOPS[:2]
    if "SUBMITIT_EXECUTOR" not in environment:
        return asked
    return (*asked, signal.Signals["SIG" + environment.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")])


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environment.get(name, default)
    try:
        return int(str(value))
    except ValueError:
        raise InputError(
            f"The environment variable {name} of the launcher must be an integer. Got {value!r}."
        ) from None


def device_count(devices: Devices) -> int | None:
    """Count the devices that are named; None for `auto` and -1, which leave it to others."""
    if isinstance(devices, list):
        return len(devices)
    text = str(devices).strip()
    if text in ("auto", "-1"):
        return None
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    if isinstance(devices, bool) or not text.isdecimal() or int(text) < 1:
        raise InputError(
            "trainer.devices must be auto, a number of devices on each node, or a list of them. "
            f"Got {devices!r}."
        )
    if int(text) > _MOST_DEVICES:  # Lightning would start a process for each
        raise InputError(f"trainer.devices must be at most {_MOST_DEVICES:,}. Got {devices!r}.")
    return int(text)


def _node_count(num_nodes: Any) -> int | None:
    if num_nodes == "auto":
        return None
    if isinstance(num_nodes, bool) or not isinstance(num_nodes, int) or num_nodes < 1:
        raise InputError(
            f"trainer.num_nodes must be auto or an integer of at least 1. Got {num_nodes!r}."
        )
    if num_nodes > _MOST_NODES:
        raise InputError(f"trainer.num_nodes must be at most {_MOST_NODES:,}. Got {num_nodes!r}.")
    return num_nodes


def _check_own_launcher(num_nodes: int, environment: Mapping[str, str]) -> None:
    """Check that Lightning's own launcher, which starts one node's ranks, is told of the others."""
    missing = [name for name in ("MASTER_ADDR", "NODE_RANK") if name not in environment]
    if num_nodes > 1 and missing:
        raise InputError(
            f"trainer.num_nodes={num_nodes}, but neither torchrun nor srun has started this "
            f"process and {' and '.join(missing)} is not set, so the nodes would not find each "
            "other. Start with torchrun --nnodes or srun --nodes."
        )


def _warn_of_idle_gpus(launch: Launch, environment: Mapping[str, str]) -> None:
    gpus = environment.get("SLURM_GPUS_ON_NODE", "")
    if launch.launcher != "srun" or not gpus.isdecimal() or int(gpus) <= launch.devices:
        return
    if environment.get("SLURM_PROCID", "0") == "0":
        log.warning(
            "Slurm gave %s GPUs a node, but srun started %d processes there, which use one each. "
            "Use --ntasks-per-node=%s",
            gpus,
            launch.devices,
            gpus,
        )
