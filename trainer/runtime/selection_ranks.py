"""Which processes share the work of selecting, and on which device each of them works."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from siftclip.ranks import OneRank, ProcessGroup, Ranks
from siftclip.trainer.runtime.launch import device_count, find_launch, resolve_devices
from siftclip.trainer.settings.lightning import TrainerSettings

if TYPE_CHECKING:
    from lightning import Fabric


def selection_ranks(settings: TrainerSettings, *, may_launch: bool) -> tuple[Ranks, torch.device]:
    """Return the ranks that select together, and the device of this one.

    They are what torchrun or srun has started. Without a launcher there is one, unless
    `may_launch`: then Fabric starts one for each of several `trainer.devices`. A command that
    trains must leave that to its Trainer, which starts the whole command anew on the others, where
    they find what the first has written.
    """
    devices, nodes = resolve_devices(settings.devices, settings.num_nodes, os.environ)
    wanted = (device_count(devices) or max(1, _gpus(settings))) * nodes
    if find_launch(os.environ) is None and (wanted == 1 or not may_launch):
        return this_process_alone(settings)
    from siftclip.trainer.runtime.lightning_setup import (
        make_fabric,  # seconds, which one process saves
    )

    fabric = make_fabric(settings)
    fabric.launch()
    return ranks_of(fabric), fabric.device


def this_process_alone(settings: TrainerSettings) -> tuple[Ranks, torch.device]:
    """Return one rank and its device: for what one process reads, whatever others there are."""
    return OneRank(), torch.device("cuda" if _gpus(settings) else "cpu")


def _gpus(settings: TrainerSettings) -> int:
    return torch.cuda.device_count() if settings.accelerator != "cpu" else 0


def ranks_of(fabric: Fabric) -> Ranks:
    """Return the processes that Fabric has started or joined."""
    return OneRank() if fabric.world_size == 1 else ProcessGroup(fabric.device)
