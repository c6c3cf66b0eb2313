"""Lightning's Trainer from the configuration, and what it must not say."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import Fabric, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig

from siftclip.datamodules.streaming import LoaderOptions
from siftclip.selectors.errors import InputError, require_int
from siftclip.trainer.cores import worker_count

PRECISIONS = ("auto", "32-true", "16-mixed", "bf16-mixed", "bf16-true", "16-true", "64-true")

# What Lightning raises for settings; its MisconfigurationException is a ValueError.
_REFUSALS = (ValueError, TypeError, RuntimeError)
# Advice that does not hold here: the stream is shuffled by its own order, and sized by the budget.
_QUIET = (
    ".*does not have many workers.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*The number of training batches .* is smaller than the logging interval.*",
    ".*treespec.*LeafSpec.*",
    # The loader starts at the trainer's step; Lightning cannot know that.
    ".*resuming from a checkpoint that ended before the epoch ended.*",
)


def resolve_precision(precision: str) -> str:
    """Lightning's name of the precision; `auto` is bf16 where a GPU has it, else fp32.

    Raises:
        InputError: the name is not one of `PRECISIONS`.
    """
    if str(precision) not in PRECISIONS:
        raise InputError(f"trainer.precision must be one of {list(PRECISIONS)}. Got {precision!r}.")
    if precision != "auto":
        return str(precision)
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return "bf16-mixed" if has_bf16 else "32-true"


def resolve_devices(devices: int | str) -> int | str:
    """Devices a node. Under torchrun `auto` means the processes that it started on this node."""
    launched = os.environ.get("LOCAL_WORLD_SIZE") if "TORCHELASTIC_RUN_ID" in os.environ else None
    if launched is None:
        return devices
    if devices != "auto" and int(devices) != int(launched):
        raise InputError(
            f"trainer.devices={devices} does not match torchrun, which started {launched} "
            "processes on this node. Leave trainer.devices=auto."
        )
    return int(launched)


def make_trainer(
    config: DictConfig,
    *,
    folder: Path,
    callbacks: list[Callback],
    loggers: list[Logger],
    **options: Any,
) -> Trainer:
    """A Trainer on the configured devices; DDP when there are several.

    Raises:
        InputError: an option of the configuration is not one that Lightning knows.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for message in _QUIET:
        warnings.filterwarnings("ignore", message)
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True  # as open_clip trains
    settings = config.trainer
    devices = resolve_devices(settings.devices)
    try:
        return Trainer(
            accelerator=settings.accelerator,
            devices=devices,
            num_nodes=settings.num_nodes,
            strategy=_strategy(str(settings.strategy), devices, settings.num_nodes),
            precision=resolve_precision(settings.precision),  # type: ignore[arg-type]  # checked
            default_root_dir=folder,
            callbacks=callbacks,
            logger=loggers,
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_progress_bar=config.progress,
            **options,
        )
    except _REFUSALS as error:
        raise InputError(f"trainer.*: Lightning refuses these settings: {error}") from error


def make_fabric(config: DictConfig) -> Fabric:
    """Lightning Fabric on the configured devices, for work without training.

    Raises:
        InputError: an option of the configuration is not one that Lightning knows.
    """
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    settings = config.trainer
    try:
        return Fabric(
            accelerator=settings.accelerator,
            devices=resolve_devices(settings.devices),
            num_nodes=settings.num_nodes,
            precision=resolve_precision(settings.precision),  # type: ignore[arg-type]  # checked
        )
    except _REFUSALS as error:
        raise InputError(f"trainer.*: Lightning refuses these settings: {error}") from error


def _strategy(name: str, devices: int | str, num_nodes: int) -> str | DDPStrategy:
    # `auto` becomes plain DDP in Lightning; ours is DDP with a static graph, as DataComp trains.
    several = num_nodes > 1 or (isinstance(devices, int) and devices > 1)
    if name == "ddp" or (name == "auto" and several):
        return DDPStrategy(static_graph=True, gradient_as_bucket_view=True)
    return name


def checkpoint_callback(folder: Path, every_n_steps: int) -> ModelCheckpoint:
    """Keeps the latest checkpoint, written every N steps and renamed into place."""
    return ModelCheckpoint(
        dirpath=folder,
        filename="step-{step}",
        auto_insert_metric_name=False,
        every_n_train_steps=require_int(
            "trainer.checkpoint_every_n_steps", every_n_steps, minimum=1
        ),
        save_top_k=1,
        enable_version_counter=False,
    )


def loader_options(config: DictConfig) -> LoaderOptions:
    """How the configuration wants batches to be loaded."""
    data = config.data
    return LoaderOptions(
        num_workers=worker_count(data.num_workers),
        start_method=data.start_method,
        prefetch_batches=data.prefetch_batches,
        timeout_seconds=data.timeout_seconds,
    )
