"""Which checkpoints are written, which stay, and that only whole ones bear the name of one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback

from siftclip.errors import InputError
from siftclip.trainer.loop import checkpointing
from siftclip.trainer.loop.atomic_checkpoints import AtomicCheckpointIO
from siftclip.trainer.loop.checkpointing import StepCheckpoint, StopOnSignal, kept_steps
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.writing import temporary_beside

Tiny = Callable[..., Any]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class Written(Callback):
    """The steps at which a checkpoint was written."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        self.steps.append(checkpoint["global_step"])


@pytest.mark.parametrize("batches_a_step", [1, 3])
def test_each_nth_and_the_last_step_once(
    batches_a_step: int, tiny_training: Tiny, tmp_path: Path
) -> None:
    written = Written()
    saver = StepCheckpoint(tmp_path, every_n_steps=4, keep_last=2, keep_every_n_steps=8)
    tiny_training(total_steps=18, batches_a_step=batches_a_step).fit(saver, written)
    assert written.steps == [4, 8, 12, 16, 18]
    assert names(tmp_path) == {"step-8.ckpt", "step-16.ckpt", "step-18.ckpt"}
    assert RunDir(path=tmp_path / "..").latest_checkpoint() is None
    assert torch.load(tmp_path / "step-18.ckpt", weights_only=True)["global_step"] == 18


def test_the_last_step_is_written_once_where_it_is_an_nth(
    tiny_training: Tiny, tmp_path: Path
) -> None:
    written = Written()
    tiny_training(total_steps=8).fit(StepCheckpoint(tmp_path, every_n_steps=4), written)
    assert written.steps == [4, 8]
    assert names(tmp_path) == {"step-8.ckpt"}


@pytest.mark.parametrize("batches_a_step", [1, 3])
@pytest.mark.parametrize(
    ("every_n_steps", "expected"),
    [
        (1000, [3, 6, 9, 10]),
        (4, [3, 4, 7, 8, 10]),  # the time is since the last one, whatever wrote it
    ],
)
def test_by_minutes_since_the_last(
    every_n_steps: int,
    expected: list[int],
    batches_a_step: int,
    tiny_training: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The clock goes 20 seconds a step."""
    seconds = [0.0]

    def tick(step: int) -> None:
        seconds[0] += 20 / batches_a_step

    monkeypatch.setattr(checkpointing, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    written = Written()
    training = tiny_training(total_steps=10, batches_a_step=batches_a_step, after_batch=tick)
    training.fit(StepCheckpoint(tmp_path, every_n_steps=every_n_steps, every_minutes=0.99), written)
    assert written.steps == expected


@pytest.mark.parametrize("batches_a_step", [1, 3])
def test_a_continued_run_ends_with_the_weights_of_an_unbroken_one(
    batches_a_step: int, tiny_training: Tiny, tmp_path: Path
) -> None:
    whole = tiny_training(total_steps=20, batches_a_step=batches_a_step)
    whole.fit(StepCheckpoint(tmp_path / "whole", every_n_steps=20))
    folder = tmp_path / "checkpoints"

    def fail(step: int) -> None:
        if step == 9:
            raise RuntimeError("stop here")

    broken = tiny_training(total_steps=20, batches_a_step=batches_a_step, after_batch=fail)
    with pytest.raises(RuntimeError, match="stop here"):
        broken.fit(StepCheckpoint(folder, every_n_steps=7))
    latest = RunDir(path=tmp_path).latest_checkpoint()
    assert latest == folder / "step-7.ckpt"
    written = Written()
    rest = tiny_training(total_steps=20, batches_a_step=batches_a_step)
    trainer = rest.fit(StepCheckpoint(folder, every_n_steps=7), written, resume=latest)
    assert written.steps == [14, 20]  # not 7 again
    assert trainer.global_step == 20
    assert torch.equal(rest.weight, whole.weight)


def test_checkpoints_need_no_unpickling(tiny_training: Tiny, tmp_path: Path) -> None:
    """With the state of all callbacks that has any, and the optimizer's."""
    saver = StepCheckpoint(tmp_path, every_n_steps=2, keep_every_n_steps=4)
    tiny_training(total_steps=3).fit(saver, StopOnSignal())
    checkpoint = torch.load(tmp_path / "step-3.ckpt", weights_only=True)
    assert checkpoint["optimizer_states"][0]["state"][0]["step"] == 3


def test_a_file_being_written_is_no_checkpoint(
    tiny_training: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is looked at while torch writes, and at the moment of the rename."""
    run = RunDir(path=tmp_path)
    seen: list[tuple[str, set[str], Path | None]] = []
    save, replace, fsync = torch.save, os.replace, os.fsync

    def look(what: str) -> None:
        seen.append((what, names(run.checkpoints), run.latest_checkpoint()))

    def watched_save(value: Any, file: Any) -> None:
        save(value, file)
        look("save")

    def watched_fsync(descriptor: int) -> None:
        look("fsync")
        fsync(descriptor)

    def watched_replace(source: Path, target: Path) -> None:
        look("replace")
        replace(source, target)

    monkeypatch.setattr(torch, "save", watched_save)
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    tiny_training(total_steps=4).fit(StepCheckpoint(run.checkpoints, every_n_steps=2))
    temporary = temporary_beside(tmp_path / "step-4.ckpt").name
    second = seen[3:]
    assert [what for what, _, _ in second] == ["save", "fsync", "replace"]
    for _, found, latest in second:
        assert found == {"step-2.ckpt", temporary}
        assert latest == run.checkpoints / "step-2.ckpt"
    assert names(run.checkpoints) == {"step-4.ckpt"}


def test_what_a_killed_write_left_is_deleted(tiny_training: Tiny, tmp_path: Path) -> None:
    (tmp_path / ".step-40.ckpt.123.tmp").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("of the user")
    (tmp_path / "step-best.ckpt").write_text("of the user")
    tiny_training(total_steps=2).fit(StepCheckpoint(tmp_path, every_n_steps=2))
    assert names(tmp_path) == {"step-2.ckpt", "notes.txt", "step-best.ckpt"}


def test_a_full_disk_is_named_and_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io = AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, tmp_path / "step-1.ckpt")

    def full(value: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match=r"step-2\.ckpt cannot be written: .*No space left"):
        io.save_checkpoint({"step": 2}, tmp_path / "step-2.ckpt")
    assert names(tmp_path) == {"step-1.ckpt"}


@given(
    steps=st.sets(st.integers(1, 200)),
    keep_last=st.integers(1, 5),
    keep_every=st.none() | st.integers(1, 50),
)
def test_kept_steps(steps: set[int], keep_last: int, keep_every: int | None) -> None:
    kept = kept_steps(steps, keep_last=keep_last, keep_every_n_steps=keep_every)
    for step in steps:
        newer = sum(other > step for other in steps)
        stays = newer < keep_last or (keep_every is not None and step % keep_every == 0)
        assert (step in kept) == stays
    assert kept <= steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, r"StepCheckpoint: every_n_steps must be an integer.*Got 0"),
        ({"every_n_steps": 1, "every_minutes": 0.0}, r"every_minutes must be positive\. Got 0\.0"),
        ({"every_n_steps": 1, "agree_every_n_steps": 0}, r"agree_every_n_steps must be an integer"),
        ({"every_n_steps": 1, "keep_last": 0}, r"keep_last must be an integer"),
        (
            {"every_n_steps": 100, "keep_every_n_steps": 250},
            r"keep_every_n_steps must be a multiple of every_n_steps=100.*Got 250",
        ),
    ],
)
def test_numbers_are_checked(options: dict[str, float], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        StepCheckpoint(tmp_path, **options)  # type: ignore[arg-type]
