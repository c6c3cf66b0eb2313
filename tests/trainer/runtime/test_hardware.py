"""Devices that are not here are told in a line, before a pool is opened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from siftclip.errors import InputError
from siftclip.trainer.builders.selection import select_stage
from siftclip.trainer.runtime.hardware import check_hardware
from siftclip.trainer.runtime.lightning_setup import make_fabric
from siftclip.trainer.settings.lightning import TrainerSettings
from siftclip.trainer.stages.train import train_stage

Compose = Callable[..., Any]
WAY_OUT = r"\. Use trainer\.accelerator=auto, which takes the CPU where there is none\.$"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`gpus(n)`: torch finds so many GPUs, and none of Apple."""

    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    pretend(0)
    return pretend


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accelerator": "gpu"}, r"^trainer\.accelerator=gpu needs a GPU, and torch.*" + WAY_OUT),
        ({"accelerator": "cuda"}, r"^trainer\.accelerator=cuda needs an NVIDIA GPU.*" + WAY_OUT),
        ({"accelerator": "mps"}, r"^trainer\.accelerator=mps needs a GPU of Apple.*" + WAY_OUT),
        ({"accelerator": "tpu"}, r"^trainer\.accelerator=tpu needs a TPU and the package torch"),
        ({"accelerator": "gpus"}, r"^trainer\.accelerator must be one of auto, .* Got 'gpus'\.$"),
        ({"accelerator": ""}, r"^trainer\.accelerator must be one of auto, .* Got ''\.$"),
        ({"devices": (0, 1)}, r"^trainer\.devices must be auto or a number of processes where the"),
        ({"devices": "0,1"}, r"^trainer\.devices must be auto or a number of processes where the"),
        ({"devices": -1}, r"^trainer\.devices must be auto or a number of processes where the CPU"),
        ({"devices": 0}, r"^trainer\.devices must be auto, a number of devices on each node"),
        ({"devices": "some"}, r"^trainer\.devices must be auto, a number of devices on each node"),
        ({"sync_batchnorm": True}, r"^trainer\.sync_batchnorm=true needs GPUs"),
    ],
)  # fmt: skip
def test_without_a_gpu(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_hardware(TrainerSettings(**options))
    with pytest.raises(InputError, match=message):
        make_fabric(TrainerSettings(**options))


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    "options", [{}, {"accelerator": "cpu"}, {"devices": 9}, {"devices": "2"}, {"strategy": "fsdp"}]
)
def test_what_a_cpu_has(options: dict[str, Any]) -> None:
    check_hardware(TrainerSettings(**options))


def test_with_gpus(gpus: Callable[[int], None]) -> None:
    gpus(2)
    for devices in (1, 2, "auto", -1, (0, 1), (1,), "0,1"):
        check_hardware(TrainerSettings(accelerator="gpu", devices=devices))
    for devices in (3, (0, 2), (1, 1), (-1,), "0,2", "3"):
        with pytest.raises(InputError, match=r"^trainer\.devices must be GPUs .* there are 2"):
            check_hardware(TrainerSettings(devices=devices))
    check_hardware(TrainerSettings(accelerator="cpu", devices=3))


def test_apples_gpu_is_one_device(
    gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    check_hardware(TrainerSettings(accelerator="mps"))
    for options in ({"devices": 2}, {"strategy": "ddp"}):
        with pytest.raises(InputError, match=r"trainer\.accelerator=mps is one device"):
            check_hardware(TrainerSettings(accelerator="gpu", **options))


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("trainer.accelerator=gpu", r"^trainer\.accelerator=gpu needs a GPU"),
        ("trainer.devices=[0]", r"^trainer\.devices must be auto or a number of processes"),
        ("trainer.devices=9", r"^scale\.global_batch_size must be a multiple of the 9 devices"),
    ],
)
def test_it_is_found_before_the_pool_is_opened(
    option: str, message: str, base: list[str], compose: Compose
) -> None:
    words = [*base, option, "pool.root=/nonexistent"]
    accelerator = [] if "accelerator" in option else ["trainer.accelerator=auto"]
    with pytest.raises(InputError, match=message):
        train_stage(compose("train", [*words, *accelerator]))
    if "devices=9" not in option:
        with pytest.raises(InputError, match=message):
            select_stage(compose("select", [*words, *accelerator]))
