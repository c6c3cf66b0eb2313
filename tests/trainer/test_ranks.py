"""Several ranks train what one trains: started by the real launchers, or forked by torchrun's."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from siftclip.datamodules.models.load import load_clip_model
from siftclip.files import read_jsonl
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.stages.train import train_stage

Cli = Callable[..., subprocess.CompletedProcess[str]]


def compare_runs(one: RunDir, several: RunDir, *, coarse: bool = False) -> None:
    """Equal losses at every step, and equal weights, to the accuracy of fp32 sums.

    `coarse`: of bf16, in which Adam's steps of single weights differ, as tiny gradients do.
    """
    histories = [
        {
            r["step"]: r["train/loss"]
            for r in read_jsonl(run.path / "metrics.jsonl")
            if "train/loss" in r
        }
        for run in (one, several)
    ]
    assert sorted(histories[0]) == [1, 2, 3, 4, 5, 6]
    assert histories[1] == pytest.approx(histories[0], rel=1e-2 if coarse else 1e-4)
    expected = load_clip_model(str(one.path)).model.state_dict()
    found = load_clip_model(str(several.path)).model.state_dict()
    if coarse:
        ours, theirs = (
            torch.cat([*map(torch.flatten, each.values())]) for each in (found, expected)
        )
        assert (ours - theirs).norm() < 0.01 * theirs.norm()
        return
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-2, atol=2e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "lightning"])
def test_two_ranks_train_what_one_trains(
    launcher: str,
    base: list[str],
    compose: Callable[..., DictConfig],
    cli: Cli,
    new_cli: Cli,
    tmp_path: Path,
) -> None:
    # eps well above rounding: Adam's first steps would blow differences of 1e-9 up to the rate
    options = [*base, "optim.eps=1e-3"]
    one = train_stage(compose("train", [*options, f"output_dir={tmp_path / 'one'}"]))
    if launcher == "torchrun":
        result = new_cli("train", *options, ranks=2)
    else:
        result = cli("train", *options, "trainer.devices=2")  # which starts the other rank anew
    assert result.returncode == 0, result.stderr[-3000:]
    (run,) = (RunDir(path=path) for path in (tmp_path / "outputs" / "train").iterdir())
    assert result.stdout.count("run        ") == 1
    compare_runs(one, run)


# name: (launched on so many ranks, overrides); each is compared with one process, which has none of
# the overrides that follow the bar.
RUNS: dict[str, tuple[int, str]] = {
    "micro-batches": (2, "| trainer.micro_batch_size=4"),
    "fsdp": (2, "| trainer.strategy=fsdp"),
    "fsdp with micro-batches": (2, "| trainer.strategy=fsdp trainer.micro_batch_size=2"),
    "clipped, averaged": (
        2,
        "optim.grad_clip_norm=0.05 optim.ema_decay=0.9 | trainer.strategy=fsdp",
    ),
    "fsdp, bf16": (2, "trainer.precision=bf16-mixed optim.ema_decay=0.9 | trainer.strategy=fsdp"),
    "siglip": (2, "loss=siglip | trainer.micro_batch_size=4"),
    "four ranks": (4, "|"),
    "four ranks, micro-batches, checkpointing": (
        4,
        "| trainer.micro_batch_size=2 trainer.grad_checkpointing=true",
    ),
    "four ranks, fsdp, bf16, micro-batches": (
        4,
        "trainer.precision=bf16-mixed | trainer.strategy=fsdp trainer.micro_batch_size=2 "
        "trainer.fsdp_reduce_dtype=bf16",
    ),
    "four ranks, siglip": (4, "loss=siglip |"),
    "four ranks, drrho": (4, "loss=drrho loss.teacher.features.name=noise LOSS_ROOT |"),
    "four ranks, distil": (
        4,
        "loss=distill loss.teacher.features.name=noise LOSS_ROOT | trainer.strategy=fsdp",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_strategies_and_losses_do_not_depend_on_the_ranks(
    ranks: int,
    base: list[str],
    compose: Callable[..., DictConfig],
    compose_tree: Callable[..., DictConfig],
    demo_data: DemoData,
    train_on_ranks: Callable[[list[Any], int], None],
    tmp_path: Path,
) -> None:
    root = f"loss.teacher.features.root={demo_data.root / 'features'}"
    launched, expected = [], {}
    for name, (wanted, text) in RUNS.items():
        if wanted != ranks:
            continue
        shared, own = (part.replace("LOSS_ROOT", root).split() for part in text.split("|"))
        options = [*base, "optim.eps=1e-3", *shared]
        folder = tmp_path / name
        config = compose_tree("train", [*options, *own, f"run_dir='{folder}'"])
        launched.append(OmegaConf.to_container(config))
        expected[name] = train_stage(compose("train", [*options, f"run_dir='{folder} alone'"]))
    train_on_ranks(launched, ranks)
    for name, run in expected.items():
        compare_runs(run, RunDir(path=tmp_path / name), coarse="bf16" in RUNS[name][1])


# Ends after step 5, goes on in a copy; the checkpoint of step 3 is the last one then.
INTERRUPTED = """
import json, shutil, sys
from lightning.fabric.utilities.rank_zero import rank_zero_only
from siftclip.trainer.loop.module import ClipTraining
from siftclip.trainer.settings.commands import TrainCommand
from siftclip.trainer.settings.read_command import compose
from siftclip.trainer.settings.store import composing
from siftclip.trainer.stages.train import train_stage

log_window = ClipTraining._log_window

def fail(self, step):
    log_window(self, step)
    if step == 5:
        raise OSError("the disk is gone")

with composing():
    config = compose(TrainCommand, "train", json.loads(sys.argv[1]))
ClipTraining._log_window = fail
try:
    train_stage(config)
except OSError:
    pass
ClipTraining._log_window = log_window
if rank_zero_only.rank == 0:
    shutil.copytree("sharded", "copy")
train_stage(config)
"""


@pytest.mark.slow
def test_sharded_run_continues_on_two_ranks_and_on_one(
    base: list[str], compose: Callable[..., DictConfig], launch: Cli, tmp_path: Path
) -> None:
    options = ["optim.eps=1e-3", "optim.ema_decay=0.9", "trainer.checkpoint_every_n_steps=3"]
    options = [*base, *options]
    whole = train_stage(compose("train", [*options, f"run_dir={tmp_path / 'whole'}"]))
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    sharded = [*options, f"run_dir={tmp_path / 'sharded'}", "trainer.strategy=fsdp"]
    result = launch("interrupted.py", json.dumps(sharded), ranks=2)
    assert result.returncode == 0, result.stderr[-5000:]
    alone = train_stage(compose("train", [*options, f"run_dir={tmp_path / 'copy'}"]))
    for run in (RunDir(path=tmp_path / "sharded"), alone):
        steps = [r["step"] for r in read_jsonl(run.path / "metrics.jsonl") if "train/loss" in r]
        assert steps == [1, 2, 3, 4, 5, 6]
        compare_runs(whole, run)


@pytest.mark.slow
@pytest.mark.parametrize(
    "lock", [[], ["model.lock.text=true", "model.lock.text_unlocked_layers=1"]]
)
def test_run_without_sharding_continues_sharded(
    lock: list[str], base: list[str], compose: Callable[..., DictConfig], cli: Cli, tmp_path: Path
) -> None:
    """With several groups of parameters, and moments that must reach their own ones."""
    options = [*base, *lock, "optim.eps=1e-3", "optim.ema_decay=0.9"]
    options += ["trainer.checkpoint_every_n_steps=3"]
    whole = train_stage(compose("train", [*options, f"run_dir={tmp_path / 'whole'}"]))
    run = RunDir(path=tmp_path / "run")
    shutil.copytree(whole.path, run.path)
    shutil.rmtree(run.model)
    for path in (run.path / "summary.json", run.checkpoints / "step-6.ckpt"):
        path.unlink()
    words = ["train", *options, f"run_dir={run.path}", "trainer.strategy=fsdp"]
    result = cli(*words, ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "continuing from" in result.stderr
    compare_runs(whole, run)


def test_embedding_on_two_ranks_covers_every_shard(
    base: list[str], cli: Cli, model_folder: Path, tmp_path: Path
) -> None:
    result = cli(
        "embed",
        *base,
        f"features.root={tmp_path / 'embedded'}",
        f"features.model.name={model_folder}",
        ranks=2,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert list((tmp_path / "embedded").glob("*.npz"))


@pytest.mark.slow
def test_comparison_on_two_ranks(
    base: list[str], cli: Cli, demo_data: DemoData, tmp_path: Path
) -> None:
    tasks = [f"eval.root={demo_data.tasks}", "eval.tasks=[digit]", "compare.seeds=[0]"]
    result = cli("compare", *base, *tasks, ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("report     ") == 1
    assert len(list((tmp_path / "outputs" / "train").glob("*/summary.json"))) == 2


def test_batch_must_split_evenly(base: list[str], cli: Cli) -> None:
    result = cli("train", *base, "scale.global_batch_size=15", ranks=2)
    assert result.returncode != 0
    assert "scale.global_batch_size must be a multiple of the 2 devices" in result.stderr
    assert "Got 15" in result.stderr


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_others(
    base: list[str], cli: Cli, child_environment: dict[str, str]
) -> None:
    child_environment["PYTHONPATH"] = str(Path(__file__).parents[1] / "helpers")
    hanging = "trainer.callbacks=[{_target_:failing_callbacks.Hanging,rank:1}]"
    start = time.monotonic()
    result = cli("train", *base, hanging, "trainer.timeout_minutes=0.05", ranks=2)
    assert result.returncode != 0
    assert time.monotonic() - start < 100
    assert "waited for longer than trainer.timeout_minutes" in result.stderr
    assert "internal error" not in result.stderr
