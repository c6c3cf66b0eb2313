"""Checkpoints that are written while training continues."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from simulated_cuda import WAIT, on_gpu, simulated_cuda

from siftclip.errors import InputError
from siftclip.trainer.loop.background_checkpoints import BackgroundCheckpointIO, snapshot
from siftclip.trainer.loop.checkpointing import StepCheckpoint
from siftclip.trainer.runtime.run_dir import RunDir

Tiny = Callable[..., Any]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def slow_save(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before this event."""
    may_write, save = threading.Event(), torch.save

    def held(value: Any, file: Any) -> None:
        assert may_write.wait(60)
        save(value, file)

    monkeypatch.setattr(torch, "save", held)
    return may_write


def test_a_snapshot_does_not_change_with_training() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    state = OrderedDict(weight=weight)
    live: dict[str, Any] = {
        "state_dict": state,
        "optimizer_states": [{"state": {0: {"step": torch.tensor(2.0)}}, "groups": [{"lr": 0.1}]}],
        "numbers": np.arange(3),
        "pair": (1, "two"),
    }
    copied = snapshot(live)
    with torch.no_grad():
        weight.add_(1)
    live["optimizer_states"][0]["state"][0]["step"] += 1
    live["optimizer_states"][0]["groups"][0]["lr"] = 0.2
    live["numbers"][0] = 9
    assert copied["state_dict"]["weight"].tolist() == [1, 1, 1]
    assert type(copied["state_dict"]) is OrderedDict
    assert copied["optimizer_states"][0]["state"][0]["step"] == 2
    assert copied["optimizer_states"][0]["groups"] == [{"lr": 0.1}]
    assert copied["numbers"].tolist() == [0, 1, 2]
    assert copied["pair"] == (1, "two")


def test_a_snapshot_of_a_gpu_waits_once() -> None:
    with simulated_cuda() as events:
        copied = snapshot({"a": on_gpu(torch.ones(3)), "b": [on_gpu(torch.zeros(2))], "c": 1})
        waits = events.of(WAIT)
    assert not copied["a"].is_cuda
    assert copied["b"][0].tolist() == [0, 0]
    assert sum(waits.values()) == 1, waits


def test_training_continues_while_a_checkpoint_is_written(
    tiny_training: Tiny, tmp_path: Path, slow_save: threading.Event
) -> None:
    seen: list[tuple[int, set[str]]] = []

    def look(step: int) -> None:
        if step in (5, 6):
            seen.append((step, names(tmp_path)))
        if step == 7:
            slow_save.set()  # the one of step 8 waits for that of step 4

    saver = StepCheckpoint(tmp_path, every_n_steps=4, background=True)
    training = tiny_training(total_steps=10, after_batch=look)
    training.fit(saver)
    assert [step for step, _ in seen] == [5, 6]
    assert all("step-4.ckpt" not in found for _, found in seen)
    assert names(tmp_path) == {"step-10.ckpt"}  # the last one is there when training ends
    assert torch.load(tmp_path / "step-10.ckpt", weights_only=True)["global_step"] == 10


def test_they_hold_what_the_others_hold(tiny_training: Tiny, tmp_path: Path) -> None:
    kept = {"every_n_steps": 3, "keep_last": 2}
    for name, background in (("plain", False), ("background", True)):
        tiny_training(total_steps=8).fit(
            StepCheckpoint(tmp_path / name, **kept, background=background)
        )
    assert names(tmp_path / "plain") == names(tmp_path / "background")
    for path in (tmp_path / "plain").iterdir():
        own, other = (
            torch.load(tmp_path / name / path.name, weights_only=True)
            for name in ("plain", "background")
        )
        assert own["global_step"] == other["global_step"]
        torch.testing.assert_close(own["state_dict"], other["state_dict"], rtol=0, atol=0)
        torch.testing.assert_close(
            own["optimizer_states"], other["optimizer_states"], rtol=0, atol=0
        )


def test_what_cannot_be_written_ends_training(
    tiny_training: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def full(value: Any, file: Any) -> None:
        if value["global_step"] == 4:
            raise OSError(28, "No space left on device")
        save(value, file)

    monkeypatch.setattr(torch, "save", full)
    saver = StepCheckpoint(tmp_path, every_n_steps=2, background=True)
    with pytest.raises(InputError, match=r"step-4\.ckpt cannot be written: .*No space left"):
        tiny_training(total_steps=20).fit(saver)
    assert RunDir(path=tmp_path / "..").latest_checkpoint() is None
    assert names(tmp_path) == {"step-2.ckpt"}


def test_an_error_of_training_leaves_the_checkpoint_before(
    tiny_training: Tiny, tmp_path: Path
) -> None:
    def fail(step: int) -> None:
        if step == 5:
            raise RuntimeError("stop here")

    saver = StepCheckpoint(tmp_path, every_n_steps=4, background=True)
    with pytest.raises(RuntimeError, match="stop here"):
        tiny_training(total_steps=9, after_batch=fail).fit(saver)
    assert names(tmp_path) == {"step-4.ckpt"}


def test_one_is_written_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there is never more than one copy in memory."""
    writing: list[str] = []
    save = torch.save

    def watched(value: Any, file: Any) -> None:
        writing.append(f"begin {value['step']}")
        save(value, file)
        writing.append(f"end {value['step']}")

    monkeypatch.setattr(torch, "save", watched)
    done: list[int] = []
    io = BackgroundCheckpointIO(lambda: done.append(len(names(tmp_path))))
    for step in (1, 2, 3):
        io.save_checkpoint({"step": step}, tmp_path / f"step-{step}.ckpt")
    io.wait()
    assert writing == [f"{what} {step}" for step in (1, 2, 3) for what in ("begin", "end")]
    assert done == [1, 2, 3]
