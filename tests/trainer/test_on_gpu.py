"""A run on a GPU learns as on the CPU, and continues after a kill."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from siftclip.datamodules.models.load import load_clip_model
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.stages.train import train_stage

LONG = ["scale.samples_seen=1600", "trainer.checkpoint_every_n_steps=7"]

pytestmark = pytest.mark.gpu


@pytest.fixture
def options(base: list[str], device: torch.device) -> list[str]:
    """Of a tiny run on the device, in exact float32."""
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    return [*base, f"trainer.accelerator={accelerator}", "trainer.precision=32-true"]


def losses(run: RunDir) -> list[float]:
    return [float(value) for value in run.metrics["train/loss"].dropna()]


def weights(run: RunDir) -> Tensor:
    state = load_clip_model(str(run.path)).model.state_dict()
    return torch.cat([value.flatten().double() for value in state.values()])


@pytest.mark.parametrize("micro_batch", ["null", "4"])
def test_a_run_learns_as_on_the_cpu(
    micro_batch: str, options: list[str], compose: Callable[..., Any], tmp_path: Path
) -> None:
    options = [*options, f"trainer.micro_batch_size={micro_batch}"]
    found = train_stage(compose("train", options))
    on_cpu = ["trainer.accelerator=cpu", f"output_dir={tmp_path / 'cpu'}"]
    expected = train_stage(compose("train", [*options, *on_cpu]))
    assert losses(found) == pytest.approx(losses(expected), rel=5e-3)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_run_in_16_bits_learns(
    precision: str, options: list[str], compose: Callable[..., Any], tmp_path: Path
) -> None:
    exact = train_stage(compose("train", options))
    changed = [f"trainer.precision={precision}", f"output_dir={tmp_path / 'rough'}"]
    rough = train_stage(compose("train", [*options, *changed]))
    assert losses(rough) == pytest.approx(losses(exact), rel=0.1)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_killed_run_continues(
    deterministic: bool,
    options: list[str],
    compose: Callable[..., Any],
    device: torch.device,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """To the bit on the CPU and where asked for; else some sums of a GPU have no fixed order."""
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    options = [*options, f"trainer.deterministic={str(deterministic).lower()}"]
    whole = train_stage(compose("train", [*options, *LONG, f"output_dir={tmp_path / 'whole'}"]))
    command = [sys.executable, "-m", "siftclip.trainer.cli", "train", *options, *LONG]
    # Not from the server of other tests, which imports more than a GPU machine has.
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any((tmp_path / "outputs").glob("train/*/checkpoints/*.ckpt")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "there was no checkpoint"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    continued = train_stage(compose("train", [*options, *LONG]))
    assert len(losses(continued)) == len(losses(whole)) == 100
    exact = deterministic or device.type == "cpu"
    assert losses(continued) == (losses(whole) if exact else pytest.approx(losses(whole), rel=1e-3))
    difference = (weights(continued) - weights(whole)).norm() / weights(whole).norm()
    assert difference == 0 if exact else difference < 1e-3
