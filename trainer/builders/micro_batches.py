"""Chooses how many samples a device takes at a time, where the settings leave it open."""

from __future__ import annotations

import functools
import logging

from siftclip.datamodules.models.load import ClipModel
from siftclip.errors import InputError
from siftclip.trainer.builders.online_options import schedule_from
from siftclip.trainer.online.step_memory import StepMemory, largest_part, usable_bytes
from siftclip.trainer.runtime.hardware import training_device
from siftclip.trainer.runtime.lightning_setup import expected_world_size, resolve_precision
from siftclip.trainer.runtime.run_dir import is_rank_zero
from siftclip.trainer.settings.commands import TrainCommand
from siftclip.trainer.settings.online import EveryStepSettings

log = logging.getLogger(__name__)


def micro_batch_size_from(settings: TrainCommand, clip: ClipModel) -> int | None:
    """Return `trainer.micro_batch_size`; for `auto` what fits, None where all of a batch does.

    The answer follows from the settings and the kind of device, so that ranks agree, and a run
    continues with the same.

    Args:
        settings: of the command.
        clip: as it will be trained.

    Raises:
        InputError: not even one sample fits, or the model's memory cannot be known.
    """
    trainer, ranks = settings.trainer, expected_world_size(settings.trainer)
    if trainer.micro_batch_size != "auto":
        return trainer.micro_batch_size
    device, rank_batch = training_device(trainer), settings.scale.global_batch_size // ranks
    usable = usable_bytes(device)
    try:
        memory = StepMemory(
            clip,
            device=device,
            precision=resolve_precision(trainer.precision),
            rank_batch=rank_batch,
            ranks=ranks,
            read_per_trained=_read_per_trained(settings),
            has_average=settings.optim.ema_decay is not None,
            sharded=trainer.strategy == "fsdp",
        )
        bytes_at = functools.cache(memory.at)  # seconds each
        size = largest_part(rank_batch, bytes_at, usable)
        needed = bytes_at(size or 1)
    except InputError as error:
        raise InputError(f"trainer.micro_batch_size=auto: {error} Set a number.") from error
    if size is None:
        raise InputError(
            f"trainer.micro_batch_size=auto: a step takes {needed / 1e9:,.1f} GB even with one "
            f"sample at a time, and {usable / 1e9:,.1f} GB can be used here. Use "
            "trainer.grad_checkpointing=true, a lower scale.global_batch_size, or more devices "
            "with trainer.strategy=fsdp."
        )
    if is_rank_zero():
        log.info(
            "trainer.micro_batch_size=auto: %s of the %s samples of a device at a time, which "
            "takes %.1f of the %.1f GB that can be used",
            "all" if size == rank_batch else f"{size:,}",
            f"{rank_batch:,}",
            needed / 1e9,
            usable / 1e9,
        )
    return None if size == rank_batch else size


def _read_per_trained(settings: TrainCommand) -> float:
    online = settings.online
    if not isinstance(online, EveryStepSettings):
        return 1.0
    return 1 / (1 - schedule_from(online).largest_filter_ratio())
