"""Runs whose ranks write their own parts of checkpoints: killed, continued on other ranks, read."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from siftclip.datamodules.models.load import load_clip_model
from siftclip.datamodules.models.sharded_checkpoint import REST_NAME, ShardedCheckpoint, part_name
from siftclip.datamodules.models.weights import read_weights
from siftclip.files import read_jsonl
from siftclip.trainer.loop.atomic_checkpoints import AtomicCheckpointIO
from siftclip.trainer.loop.resuming import checkpoint_fault
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.stages.export import open_source
from siftclip.trainer.stages.train import train_stage

Launch = Callable[..., subprocess.CompletedProcess[str]]

# Three runs on two ranks: a whole one; one whose second rank finds no room for its part of step 4;
# and one that is killed when that checkpoint is on the disk, but for its name.
RUNS = """
import errno, json, os, signal, sys
import torch
from siftclip.errors import InputError
from siftclip.trainer.runtime import fsdp_strategy
from siftclip.trainer.settings.commands import TrainCommand
from siftclip.trainer.settings.read_command import compose
from siftclip.trainer.settings.store import composing
from siftclip.trainer.stages.train import train_stage

def train(name, *more):
    with composing():
        settings = compose(TrainCommand, "train", [*options, *more, f"run_dir={name}"])
    return train_stage(settings)

def full(content, file):
    if content.get("step") == 4 and content.get("rank") == 1:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    save(content, file)

def kill(temporary, path):
    if path.name == "step-4.ckpt":
        os.kill(os.getpid(), signal.SIGKILL)
    place(temporary, path)

options, save, place = json.loads(sys.argv[1]), torch.save, fsdp_strategy.place_folder
train("whole")
torch.save = full
try:
    train("full")
except InputError as error:
    print("told:", error)
torch.save, fsdp_strategy.place_folder = save, kill
train("killed")
"""


@pytest.fixture(scope="module")
def options(base_of: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    more = ["optim.eps=1e-3", "optim.ema_decay=0.9", "trainer.checkpoint_every_n_steps=2"]
    return [*base_of(tmp_path_factory.mktemp("runs")), *more]


SHARDED = ["trainer.strategy=fsdp", "trainer.sharded_checkpoints=true"]


def losses(run: RunDir) -> dict[int, float]:
    records = read_jsonl(run.path / "metrics.jsonl")
    return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return load_clip_model(str(run.path)).model.state_dict()


def close(found: RunDir, expected: RunDir) -> None:
    """Equal to the accuracy of fp32 sums."""
    assert losses(found) == pytest.approx(losses(expected), rel=1e-4)
    theirs = weights(expected)
    for name, value in weights(found).items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-2, atol=2e-4, msg=name)


def copied(run: RunDir, path: Path) -> RunDir:
    return RunDir(path=Path(shutil.copytree(run.path, path)))


@pytest.mark.slow
def test_parts_are_written_whole_and_continued_from_on_any_ranks(
    options: list[str], launch: Launch, cli: Launch, compose: Any, tmp_path: Path
) -> None:
    (tmp_path / "runs.py").write_text(RUNS)
    result = launch("runs.py", json.dumps([*options, *SHARDED]), ranks=2)
    assert result.returncode != 0
    whole, full, killed = (RunDir(path=tmp_path / name) for name in ("whole", "full", "killed"))

    names = {REST_NAME, part_name(0), part_name(1)}
    assert {path.name for path in whole.checkpoints.iterdir()} == {"step-4.ckpt", "step-6.ckpt"}
    for path in whole.checkpoints.iterdir():
        assert {file.name for file in path.iterdir()} == names
    assert {path.name for path in full.checkpoints.iterdir()} == {"step-2.ckpt"}
    assert "/step-4.ckpt cannot be written: its disk is full" in result.stdout
    assert "step-4.ckpt cannot be written: see the message of another rank" in result.stdout
    left = {path.name for path in killed.checkpoints.iterdir()}
    (unfinished,) = left - {"step-2.ckpt"}
    assert unfinished.startswith(".step-4.ckpt.")

    check_readers(whole)
    on_two = copied(killed, tmp_path / "on_two")
    on_four = copied(killed, tmp_path / "on_four")
    alone = copied(killed, tmp_path / "alone")
    damaged = copied(whole, tmp_path / "damaged")
    shutil.rmtree(damaged.model)
    (damaged.path / "summary.json").unlink()
    part = damaged.checkpoints / "step-6.ckpt" / part_name(1)
    part.write_bytes(part.read_bytes()[:100_000])

    for run, ranks in ((on_two, 2), (on_four, 4), (damaged, 2)):
        words = ["train", *options, *SHARDED, f"run_dir={run.path}"]
        continued = cli(*words, ranks=ranks)
        assert continued.returncode == 0, continued.stderr[-3000:]
        assert "continuing from" in continued.stderr
        kept = {path.name for path in run.checkpoints.iterdir()}
        assert kept - {"step-6.ckpt.damaged"} == {"step-4.ckpt", "step-6.ckpt"}
    assert "rank-1.ckpt in it is cut off" in continued.stderr
    train_stage(compose("train", [*options, f"run_dir={alone.path}"]))
    for run in (on_two, damaged):  # to the bit
        assert losses(run) == losses(whole)
        expected, found = weights(whole), weights(run)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    close(on_four, whole)
    close(alone, whole)


def check_readers(run: RunDir) -> None:
    """What else reads checkpoints reads these."""
    last = run.latest_checkpoint()
    assert last is not None
    averaged, raw = (read_weights(last, weights=each) for each in ("ema", "raw"))
    written = weights(run)
    assert all(torch.equal(averaged[name], written[name]) for name in written)
    assert not torch.equal(raw["text_projection"], written["text_projection"])
    named = load_clip_model(str(last)).model.state_dict()  # it says what model it is of
    assert all(torch.equal(named[name], written[name]) for name in written)
    exported = open_source(last, "raw").clip.model.state_dict()
    assert all(torch.equal(exported[name], raw[name]) for name in raw)
    assert open_source(run.path, "raw").origin == open_source(last, "raw").origin
    whole = AtomicCheckpointIO().load_checkpoint(last)
    assert whole["global_step"] == 6
    moments = whole["optimizer_states"][0]["state"]
    assert len(moments) == len(raw) - sum("attn_mask" in name for name in raw)
    assert all(values["exp_avg"].device.type == "cpu" for values in moments.values())

    shapes = {name: value.shape for name, value in raw.items()}
    assert checkpoint_fault(last, shapes) is None
    assert "it is of another model" in str(checkpoint_fault(last, {**shapes, "logit_scale": (3,)}))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "it is a folder without rest.ckpt": lambda folder: (folder / REST_NAME).unlink(),
    "rank-1.ckpt is missing in it": lambda folder: (folder / part_name(1)).unlink(),
    "rank-0.ckpt in it: it is empty": lambda folder: (folder / part_name(0)).write_bytes(b""),
    "rank-0.ckpt in it is cut off": lambda folder: (folder / part_name(0)).write_bytes(b"PK"),
    "is not of this checkpoint": lambda folder: shutil.copy(
        folder / part_name(0), folder / part_name(1)
    ),
}


@pytest.mark.parametrize("fault", DAMAGES)
def test_every_damage_is_found(fault: str, tmp_path: Path) -> None:
    folder = tmp_path / "step-2.ckpt"
    folder.mkdir()
    rest = {"global_step": 2, "state_dict": {"model.a": torch.empty(3, 2, device="meta")}}
    rest |= {"optimizer_states": [], "loops": {}, "skipped_steps": 0.0}
    torch.save({"ranks": 2, "rest": rest}, folder / REST_NAME)
    for rank, rows in enumerate((torch.ones(2, 2), torch.ones(1, 2))):
        part = {"rank": rank, "ranks": 2, "step": 2, "rows": {"state_dict/model.a": rows}}
        torch.save(part, folder / part_name(rank))
    shapes = {"a": torch.Size([3, 2])}
    assert checkpoint_fault(folder, shapes) is None
    assert len(ShardedCheckpoint(folder).files) == 3
    DAMAGES[fault](folder)
    assert fault in str(checkpoint_fault(folder, shapes))
