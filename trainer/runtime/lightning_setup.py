"""Lightning's Trainer from the settings, and what it must not say."""

from __future__ import annotations

import logging
import os
import warnings
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from siftclip.datamodules.streaming.loader import LoaderOptions
from siftclip.errors import InputError
from siftclip.reading import in_one_line
from siftclip.trainer.options.faults import options_of, under
from siftclip.trainer.runtime.cores import worker_count
from siftclip.trainer.runtime.extensions import build_plugins
from siftclip.trainer.runtime.hardware import check_hardware
from siftclip.trainer.runtime.launch import Devices, cluster_plugins, device_count, resolve_devices
from siftclip.trainer.settings.data import DataSettings
from siftclip.trainer.settings.lightning import Precision, TrainerSettings

if TYPE_CHECKING:
    from lightning import Fabric, Trainer
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.strategies import Strategy as LightningStrategy

# Advice that does not hold here: the stream is shuffled by its own order, and sized by the budget.
_QUIET = (
    ".*does not have many workers.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*The number of training batches .* is smaller than the logging interval.*",
    ".*treespec.*LeafSpec.*",
    # The average of the weights and a teacher are in evaluation mode.
    ".*module.* in eval mode at the start of training.*",
    # Of a user's callback; a checkpoint is to have the weights after its step.
    ".*Using ModelCheckpoint with manual optimization.*",
    # The loader starts at the trainer's step; Lightning cannot know that.
    ".*resuming from a checkpoint that ended before the epoch ended.*",
)

_REDUCE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resolve_precision(precision: Precision) -> Precision:
    """Return Lightning's name of the precision, or tf32; `auto` is bf16 where a GPU has it."""
    if precision != "auto":
        return precision
    # emulated, as on a V100, it would be slower than fp32
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)
    return "bf16-mixed" if has_bf16 else "32-true"


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Return the 16-bit type that Lightning's autocast computes in; None: there is none."""
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)


def make_trainer(
    settings: TrainerSettings,
    *,
    folder: Path,
    callbacks: list[Callback],
    loggers: list[Logger],
    **options: Any,
) -> Trainer:
    """Build a Trainer on the configured devices; DDP when there are several.

    With the plugins of the settings, and their other arguments for Lightning's Trainer.

    Raises:
        InputError: Lightning refuses the settings, or this machine has no GPU for them.
    """
    from lightning import Trainer
    from lightning.pytorch.callbacks import ProgressBar

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for message in _QUIET:
        warnings.filterwarnings("ignore", message)
    precision = resolve_precision(settings.precision)
    check_hardware(settings)
    # Under autocast only the loss has float32 products left, and these are to be exact.
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    devices, num_nodes = resolve_devices(settings.devices, settings.num_nodes, os.environ)
    try:
        return Trainer(
            accelerator=settings.accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=_strategy(settings, devices, num_nodes),
            default_root_dir=folder,
            sync_batchnorm=settings.sync_batchnorm,
            **_plugin_options(settings),
            callbacks=callbacks,
            logger=loggers,
            use_distributed_sampler=False,
            enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
            **{**_defaults(settings), **(settings.options or {})},
            **options,
        )
    except Exception as error:
        raise _refusal(error) from error


def make_fabric(settings: TrainerSettings) -> Fabric:
    """Build Lightning Fabric on the configured devices, for work without training.

    Raises:
        InputError: Lightning refuses the settings.
    """
    from lightning import Fabric
    from lightning.fabric.strategies import DDPStrategy

    check_hardware(settings)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    devices, num_nodes = resolve_devices(settings.devices, settings.num_nodes, os.environ)
    waits = settings.timeout_minutes is not None and _are_several(devices, num_nodes)
    try:
        return Fabric(
            accelerator=settings.accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=DDPStrategy(**_waiting(settings)) if waits else "auto",
            plugins=[*cluster_plugins(os.environ)],
            precision=_lightning_precision(resolve_precision(settings.precision)),
        )
    except Exception as error:
        raise _refusal(error) from error


def _refusal(error: Exception) -> Exception:
    """Return what to raise for an exception of Lightning's constructors."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    refusals = (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError)
    if isinstance(error, InputError) or not isinstance(error, refusals):
        return error
    return InputError(f"trainer.*: Lightning refuses these settings: {in_one_line(error)}")


def _lightning_precision(precision: str) -> Any:
    return "32-true" if precision == "tf32" else precision


def _on_cpu(accelerator: str) -> bool:
    return accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())


def _defaults(settings: TrainerSettings) -> dict[str, Any]:
    """Return arguments that the settings may change."""
    return {
        # of cudnn's convolutions, as open_clip trains; what it picks may differ from run to run
        "benchmark": not settings.deterministic,
        # None leaves what the process has set
        "deterministic": settings.deterministic or None,
        "enable_model_summary": False,
    }


def _plugin_options(settings: TrainerSettings) -> dict[str, Any]:
    from lightning.pytorch.plugins.precision import MixedPrecision, Precision

    precision = resolve_precision(settings.precision)
    plugins: list[Any] = [*cluster_plugins(os.environ), *build_plugins(settings)]
    if any(isinstance(plugin, Precision) for plugin in plugins):
        if settings.precision != "auto":
            raise InputError(
                f"trainer.precision={settings.precision} and a precision among trainer.plugins "
                "exclude each other. Leave one of them out."
            )
        return {"plugins": plugins}
    if precision == "16-mixed" and _on_cpu(settings.accelerator):
        # Lightning would train in bf16 instead; torch has a scaler for CPUs.
        return {"plugins": [*plugins, MixedPrecision("16-mixed", device="cpu")]}
    return {"plugins": plugins, "precision": _lightning_precision(precision)}


def _ranks(devices: Devices, num_nodes: int) -> int:
    per_node = device_count(devices) or max(1, torch.cuda.device_count())
    return per_node * num_nodes


def expected_world_size(settings: TrainerSettings) -> int:
    """Return the number of ranks that `make_trainer` will count."""
    _, num_nodes = resolve_devices(settings.devices, settings.num_nodes, os.environ)
    return local_ranks(settings) * num_nodes


def local_ranks(settings: TrainerSettings) -> int:
    """Return how many of these ranks are on this machine."""
    devices, _ = resolve_devices(settings.devices, settings.num_nodes, os.environ)
    count = device_count(devices)
    if count is None:
        count = 1 if _on_cpu(settings.accelerator) else max(1, torch.cuda.device_count())
    return count


def _strategy(
    settings: TrainerSettings, devices: Devices, num_nodes: int
) -> str | LightningStrategy:
    from lightning.pytorch.strategies import DDPStrategy

    from siftclip.trainer.runtime.fsdp_strategy import FsdpStrategy

    name = settings.strategy
    if name == "fsdp":
        return FsdpStrategy(
            ranks=_ranks(devices, num_nodes),
            reduce_dtype=_REDUCE_DTYPES[settings.fsdp_reduce_dtype],
            sharded_checkpoints=settings.sharded_checkpoints,
            **_waiting(settings),
        )
    # Not with a static graph, as DataComp has it: that is for checkpointing which enters backward
    # again, and open_clip's does not.
    if name == "ddp" or _are_several(devices, num_nodes):
        return DDPStrategy(gradient_as_bucket_view=True, **_waiting(settings))
    return name


def _are_several(devices: Devices, num_nodes: int) -> bool:
    return num_nodes > 1 or (device_count(devices) or 1) > 1


def _waiting(settings: TrainerSettings) -> dict[str, Any]:
    """Return how long exchanges wait, for Lightning's strategies; nothing where torch says it."""
    minutes = settings.timeout_minutes
    return {} if minutes is None else {"timeout": timedelta(minutes=minutes)}


def loader_options(data: DataSettings, trainer: TrainerSettings) -> LoaderOptions:
    """Return how the settings want batches to be loaded, on each rank."""
    names = ("num_workers", "start_method", "prefetch_batches", "timeout_seconds")
    with options_of(under("data", *names)):
        return LoaderOptions(
            num_workers=worker_count(data.num_workers, local_ranks(trainer)),
            start_method=data.start_method,
            prefetch_batches=data.prefetch_batches,
            timeout_seconds=data.timeout_seconds,
        )
