"""Reports of comparisons, checkpoints that are watched, and trainers of one's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from open_clip import CLIP
from torch.utils.data import DataLoader
from tracked_runs import tensorboard_events, wait_for_another_second
from wandb_offline import read_part, read_parts, wait_until_written

from siftclip.files import read_jsonl, write_text
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.loop.gradient_log import gradient_histograms
from siftclip.trainer.loop.module import ClipTraining
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.settings.logger import LoggerSettings
from siftclip.trainer.stages.eval_watch import watch_stage
from siftclip.trainer.stages.tracking import evaluation_lineage, log_report
from siftclip.trainer.stages.train import train_stage


# ---- reports of comparisons ---------------------------------------------------------------------
@pytest.fixture
def runs(tmp_path: Path) -> list[RunDir]:
    """What a report needs of two runs, and a third that has not logged to wandb."""
    runs = [RunDir(path=tmp_path / "train" / f"run{number}") for number in range(3)]
    for number, run in enumerate(runs):
        write_text(run.path / "eval_results.jsonl", f'{{"key": "digit", "n": {number}}}\n')
        if number < 2:
            write_text(run.path / "wandb_id", f"id-{number}\n")
    return runs


def write_report(folder: Path, text: str) -> None:
    for name in ("report.html", "report.md", "results.csv"):
        write_text(folder / name, f"<p>{text}</p>")


RESULTS = [
    {"arm": "half", "seed": 0, "task": "digit", "value": 0.5},
    {"arm": "half", "seed": 1, "task": "digit", "value": None},
]


def test_a_report_is_a_run_in_the_group_of_its_runs(tmp_path: Path, runs: list[RunDir]) -> None:
    folder, settings = (
        tmp_path / "compare" / "c1",
        LoggerSettings(mode="offline", artifacts=("report",)),
    )
    write_report(folder, "first")
    log_report(settings, folder, comparison="c1", runs=runs, results=RESULTS)
    (part,) = read_parts(folder)
    run = part.run
    assert (run.run_group, run.job_type, run.display_name) == ("c1", "report", "c1-report")
    table = part.table("report/results")
    assert table["columns"] == ["arm", "seed", "task", "value"]
    assert table["data"][1] == ["half", 1, "digit", None]
    (page,) = (row["report/page/path"] for row in part.rows if "report/page/path" in row)
    assert "<p>first</p>" in (part.path.parent / "files" / page).read_text()
    report = part.artifact("report")
    assert [entry.path for entry in report.manifest.contents] == [
        *("lineage.json", "report.html", "report.md", "results.csv"),
    ]
    inputs = [a for a in part.artifacts if a.use_after_commit]
    assert [a.name for a in inputs] == ["evaluation-id-0", "evaluation-id-1"]
    assert json.loads(report.metadata)["sources"] == [a.name for a in inputs]
    assert json.loads(report.metadata)["runs"] == ["run0", "run1", "run2"]


def test_a_report_that_is_written_again_is_a_new_version(
    tmp_path: Path, runs: list[RunDir]
) -> None:
    folder = tmp_path / "compare" / "c1"
    settings = LoggerSettings(
        mode="offline", group="all", name="mine", tags=("a",), artifacts=("report",)
    )
    for text in ("first", "first", "second"):
        write_report(folder, text)
        log_report(settings, folder, comparison="c1", runs=runs, results=RESULTS)
        wait_for_another_second()
    parts = read_parts(folder)
    assert {(p.run.run_group, p.run.display_name) for p in parts} == {("all", "mine-report")}
    assert len({part.run.run_id for part in parts}) == 1
    kinds = [[a.type for a in part.artifacts if a.type != "run_table"] for part in parts]
    assert kinds == [["evaluation", "evaluation", "report"], [], ["report"]]
    steps = [row["_step"] for part in parts for row in part.rows]
    assert steps == list(range(6))


@pytest.mark.parametrize(
    "settings",
    [
        LoggerSettings(wandb=False, artifacts=("report",)),
        LoggerSettings(mode="offline"),
        LoggerSettings(mode="offline", artifacts=("selection", "evaluation", "tables")),
    ],
)
def test_a_report_that_nobody_wants_in_wandb_is_files_alone(
    tmp_path: Path, runs: list[RunDir], settings: LoggerSettings
) -> None:
    """Its page holds images and captions of the pool."""
    log_report(settings, tmp_path / "c1", comparison="c1", runs=runs, results=RESULTS)
    assert not (tmp_path / "c1").exists()


def test_an_evaluation_has_one_name_whoever_logs_it(runs: list[RunDir]) -> None:
    """wandb joins what its run has made to what the report is made from, by name and content."""
    lineage = evaluation_lineage(runs[0], "id-0")
    assert (lineage.name, lineage.kind) == ("evaluation-id-0", "evaluation")
    assert lineage.record == {"run": "id-0"}


# ---- checkpoints that are watched ---------------------------------------------------------------
def test_watched_checkpoints_are_a_curve_everywhere(
    base: list[str], compose: Callable[..., Any], demo_data: DemoData, tmp_path: Path
) -> None:
    options = ["trainer.checkpoint_every_n_steps=3", "trainer.keep_every_n_steps=3"]
    run = train_stage(compose("train", [*base, *options]))
    words = [
        *(f"watch.run={run.path}", f"eval.root={demo_data.tasks}", "eval.tasks=[digit]"),
        *("logger=wandb", "logger.mode=offline", "logger.group=g", "watch.once=true"),
        *("trainer.accelerator=cpu", "progress=false", "data.num_workers=0"),
        f"output_dir={tmp_path}",
    ]
    assert [step for step, _ in watch_stage(compose("eval_watch", words))] == [3, 6]
    folder = run.path / "eval_watch"
    (part,) = read_parts(folder)
    assert (part.run.job_type, part.run.run_group) == ("eval", "g")
    assert part.run.display_name == f"{run.path.name}-eval"
    assert part.steps_with("eval/digit/acc1") == [3, 6]
    log = read_jsonl(folder / "metrics.jsonl")
    assert part.summary["eval/digit/acc1"] == log[-1]["eval/digit/acc1"]


# ---- gradients, and a trainer of one's own ------------------------------------------------------
def test_histograms_count_every_value() -> None:
    weight = torch.nn.Parameter(torch.zeros(3, 100))
    weight.grad = torch.linspace(-1, 3, 300).reshape(3, 100)
    locked, zero = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(5))
    zero.grad = torch.zeros(5)
    named = [("_orig_mod.weight", weight), ("locked", locked), ("zero", zero)]
    histograms = gradient_histograms(named)
    assert [*histograms] == ["gradients/weight", "gradients/zero"]
    histogram = histograms["gradients/weight"]
    assert (histogram.low, histogram.high) == (-1, 3)
    assert sum(histogram.counts) == 300
    assert max(histogram.counts) - min(histogram.counts) <= 1
    assert (histogram.edges[0], histogram.edges[-1], len(histogram.edges)) == (-1, 3, 65)
    assert sum(histograms["gradients/zero"].counts) == 5


TINY = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
    "text_cfg": {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1},
}


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*")
@pytest.mark.filterwarnings("ignore:.*treespec.*LeafSpec.*")
def test_gradients_in_a_trainer_of_ones_own(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="siftclip[tensorboard] is not installed")
    module = ClipTraining(CLIP(**TINY), log_gradients_every_n_steps=2, log_every_n_steps=1)
    images, tokens = torch.randn(12, 3, 32, 32), torch.randint(1, 99, (12, 8))
    wandb = WandbLogger(save_dir=tmp_path, offline=True, id="mine")
    board = TensorBoardLogger(tmp_path, name="", version="")
    trainer = Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=[wandb, board],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(list(zip(images, tokens, strict=True)), batch_size=4))
    wandb.experiment.finish()
    (path,) = tmp_path.glob("wandb/offline-run-*/run-mine.wandb")
    wait_until_written(path)
    key = "gradients/logit_scale"
    assert read_part(path).steps_with(f"{key}/_type") == [2]
    events = tensorboard_events(tmp_path)
    assert [event.step for event in events.Histograms(key)] == [2]
