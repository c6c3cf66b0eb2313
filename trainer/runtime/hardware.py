"""Whether this machine has what the settings ask for, found before a pool is opened.

Lightning says it late, and in its own words.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from siftclip.errors import InputError
from siftclip.trainer.runtime.launch import Devices, device_count, resolve_devices
from siftclip.trainer.settings.lightning import TrainerSettings

_WAY_OUT = "Use trainer.accelerator=auto, which takes the CPU where there is none"


def check_hardware(settings: TrainerSettings) -> None:
    """Check that this machine has the devices.

    Raises:
        InputError: it has not; or the name of an accelerator, or the devices, mean nothing.
    """
    _check_accelerator(settings.accelerator)
    devices, nodes = resolve_devices(settings.devices, settings.num_nodes, os.environ)
    count = device_count(devices)
    kind = _kind(settings.accelerator)
    if kind == "cuda":
        _check_gpus(devices, count, torch.cuda.device_count())
    elif kind == "cpu" and (isinstance(devices, list) or not _is_count(devices)):
        raise InputError(
            "trainer.devices must be auto or a number of processes where the CPU computes; a list "
            f"names GPUs. Got {devices!r}."
        )
    elif kind == "mps" and ((count or 1) * nodes > 1 or settings.strategy != "auto"):
        raise InputError(
            "trainer.accelerator=mps is one device: leave trainer.devices and trainer.strategy at "
            "auto."
        )
    if settings.sync_batchnorm and kind == "cpu":
        raise InputError("trainer.sync_batchnorm=true needs GPUs; torch has it for no CPU.")


def training_device(settings: TrainerSettings) -> torch.device:
    """Return the kind of device that the settings train on."""
    kind = _kind(settings.accelerator)
    return torch.device(kind, 0) if kind == "cuda" else torch.device(kind)


def _check_accelerator(name: str) -> None:
    """Check that an accelerator is known, and there."""
    if name in ("auto", "cpu"):
        return
    if name in _MISSING:
        missing = _MISSING[name]()
        if missing is not None:
            raise InputError(f"trainer.accelerator={name} needs {missing}. {_WAY_OUT}.")
        return
    from lightning.pytorch.accelerators import AcceleratorRegistry  # seconds

    known = sorted({"auto", "gpu", *AcceleratorRegistry.available_accelerators()})
    if name not in known:
        raise InputError(f"trainer.accelerator must be one of {', '.join(known)}. Got {name!r}.")


def _no_cuda() -> str | None:
    if torch.cuda.is_available():
        return None
    why = (
        f"torch {torch.__version__} was built without CUDA"
        if torch.version.cuda is None
        else "torch finds none here: nvidia-smi says whether the driver does"
    )
    return f"an NVIDIA GPU, and {why}"


def _no_mps() -> str | None:
    return None if torch.backends.mps.is_available() else "a GPU of Apple, and torch finds none"


def _no_gpu() -> str | None:
    if _no_cuda() is None or _no_mps() is None:
        return None
    return str(_no_cuda()).replace("an NVIDIA GPU", "a GPU")


def _no_tpu() -> str | None:
    there = importlib.util.find_spec("torch_xla") is not None
    return None if there else "a TPU and the package torch_xla, which is not installed"


_MISSING = {"gpu": _no_gpu, "cuda": _no_cuda, "mps": _no_mps, "tpu": _no_tpu}


def _kind(accelerator: str) -> str:
    """Return what computes: cuda, mps, cpu, or the name of another accelerator."""
    if accelerator not in ("auto", "gpu"):
        return accelerator
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if _no_mps() is None else "cpu"


def _is_count(devices: Devices) -> bool:
    return str(devices).strip() == "auto" or str(devices).strip().isdecimal()


def _check_gpus(devices: Devices, count: int | None, there: int) -> None:
    """Check that the GPUs of this machine are as many as are asked for."""
    named = devices if isinstance(devices, list) else _listed(devices)
    wrong = [number for number in named if number >= there or number < 0]
    too_many = not named and count is not None and count > there
    if wrong or too_many or len(set(named)) < len(named):
        raise InputError(
            f"trainer.devices must be GPUs that are here: there are {there}"
            f"{', numbered from 0' if named else ''}. Got {devices!r}."
        )


def _listed(devices: int | str) -> list[int]:
    """Return the numbers of GPUs that are written as text, such as "0,1"."""
    text = str(devices)
    numbers = [part.strip() for part in text.split(",") if part.strip()] if "," in text else []
    return [int(number) for number in numbers if number.isdecimal()]
