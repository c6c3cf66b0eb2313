"""Training a tiny run: what it leaves behind, what it computes, and that it is not done twice."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
import yaml
from omegaconf import DictConfig

from siftclip.datamodules.models.load import WEIGHTS_NAME, load_clip_model
from siftclip.datamodules.pool.reader import SampleReader
from siftclip.datamodules.selection.selection import read_selection
from siftclip.datamodules.streaming.batches import SampleDataset
from siftclip.datamodules.streaming.order import SampleOrder
from siftclip.errors import InputError
from siftclip.files import read_json, read_jsonl
from siftclip.locks import HeldError, locked
from siftclip.trainer.builders.selection import select_stage
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.optim.optimizer import parameter_groups
from siftclip.trainer.optim.schedules import lr_factor
from siftclip.trainer.runtime.run_dir import RunDir, require_own_folder
from siftclip.trainer.settings.budget import Budget
from siftclip.trainer.settings.fields.section import to_plain
from siftclip.trainer.stages.train import train_stage

Compose = Callable[..., DictConfig]
OPEN_CLIP_KEYS = {
    "train/loss",
    "train/contrastive_loss",
    "train/lr",
    "train/scale",
    "train/data_time",
    "train/batch_time",
    "train/samples_per_second",
    "train/samples_per_second_per_gpu",
}


def test_run_directory_is_complete(base: list[str], compose: Compose) -> None:
    run = train_stage(compose("train", base))
    names = {path.name for path in run.path.iterdir()}
    assert {"config.yaml", "versions.json", "selection.npy", "metrics.csv", "model"} <= names
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    assert config["scale"] == {"samples_seen": 96, "global_batch_size": 16}
    assert read_json(run.path / "versions.json")["torch"] == torch.__version__.split("+")[0]
    summary = run.summary
    assert summary is not None
    assert summary["steps"] == 6
    assert summary["trained_samples"] == 96
    assert summary["selection"] == read_selection(run.path).digest
    assert summary["train_seconds"] > 0
    records = [r for r in read_jsonl(run.path / "metrics.jsonl") if "train/loss" in r]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert set(records[0]) >= OPEN_CLIP_KEYS
    with (run.path / "metrics.csv").open() as file:
        assert set(next(csv.reader(file))) >= OPEN_CLIP_KEYS
    open_clip.create_model_and_transforms(f"local-dir:{run.model}")


def test_steps_equal_a_plain_open_clip_loop(base: list[str], compose: Compose) -> None:
    """Same initial weights, same batches: losses, rates and weights of a loop written by hand."""
    # The gradient of a key's bias is nothing but rounding, which Adam would blow up to the rate.
    config = compose("train", [*base, "optim.eps=1e-4"])
    run = train_stage(config)
    selected = select_stage(config)
    torch.manual_seed(config.common.seed)
    clip = load_clip_model("twin", architecture=to_plain(config.model.architecture))
    dataset = SampleDataset(
        reader=SampleReader(pool=selected.pool, max_image_pixels=10**6),
        transform=clip.train_transform,
        tokenizer=clip.tokenizer,
        seed=config.common.seed,
        substitutes=selected.rows,
        finished=True,
    )
    order = SampleOrder(rows=selected.rows, seed=config.common.seed, global_batch=16)
    optim = config.optim
    optimizer = torch.optim.AdamW(
        parameter_groups(clip.model, optim), betas=(0.9, 0.98), eps=1e-4, fused=False
    )
    loss_of = open_clip.ClipLoss()
    losses, rates = [], []
    for step in range(6):
        positions, rows = order.batch(step)
        batch = dataset.__getitems__(list(zip(positions.tolist(), rows.tolist(), strict=True)))
        rate = optim.lr * lr_factor(optim, step, 6)
        for group in optimizer.param_groups:
            group["lr"] = rate
        image = F.normalize(clip.model.encode_image(batch.images), dim=-1)
        text = F.normalize(clip.model.encode_text(batch.tokens), dim=-1)
        loss = loss_of(image, text, clip.model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            clip.model.logit_scale.clamp_(0, 4.605170185988092)
        losses.append(loss.item())
        rates.append(rate)
    records = [r for r in read_jsonl(run.path / "metrics.jsonl") if "train/loss" in r]
    assert [r["train/loss"] for r in records] == pytest.approx(losses, rel=1e-5)
    assert [r["train/lr"] for r in records] == pytest.approx(rates, rel=1e-9)
    trained = load_clip_model(str(run.path)).model.state_dict()
    for name, expected in clip.model.state_dict().items():
        torch.testing.assert_close(trained[name], expected, rtol=1e-4, atol=5e-6, msg=name)


def test_loss_falls(base: list[str], compose: Compose) -> None:
    run = train_stage(compose("train", [*base, "scale.samples_seen=640", "optim.lr=0.002"]))
    records = [r for r in read_jsonl(run.path / "metrics.jsonl") if "train/loss" in r]
    assert records[-1]["train/loss"] < records[0]["train/loss"] - 0.1


@pytest.mark.timeout(60)  # it does not wait for the other
def test_a_run_that_another_process_trains_is_refused(
    base: list[str], compose: Compose, tmp_path: Path
) -> None:
    run = RunDir(path=tmp_path / "run")
    with locked(run.lock, owner="another"), pytest.raises(HeldError, match=r"^The run .*/run is"):
        train_stage(compose("train", [*base, f"run_dir={run.path}"]))


def test_finished_run_is_reused(base: list[str], compose: Compose) -> None:
    first = train_stage(compose("train", base))
    written = (first.path / "summary.json").stat().st_mtime_ns
    again = train_stage(compose("train", [*base, "data.num_workers=1"]))
    assert again.path == first.path
    assert (again.path / "summary.json").stat().st_mtime_ns == written
    other = train_stage(compose("train", [*base, "seed=1"]))
    assert other.path != first.path


@pytest.mark.parametrize("damaged", ["model/open_clip_model.safetensors", "summary.json"])
def test_a_finished_run_whose_end_is_damaged_is_finished_again(
    damaged: str, base: list[str], compose: Compose, caplog: pytest.LogCaptureFixture
) -> None:
    run = train_stage(compose("train", base))
    content = (run.model / WEIGHTS_NAME).read_bytes()
    log = run.records()
    (run.path / damaged).write_bytes((run.path / damaged).read_bytes()[:50])
    assert not run.is_finished
    again = train_stage(compose("train", base))
    assert again.is_finished
    assert "It is made again; what was there is now" in caplog.text
    assert (run.model / WEIGHTS_NAME).read_bytes() == content
    assert [record["step"] for record in run.records()] == [record["step"] for record in log]


def test_weights_that_were_taken_away_leave_a_run_finished(
    base: list[str], compose: Compose
) -> None:
    run = train_stage(compose("train", base))
    written = (run.path / "summary.json").stat().st_mtime_ns
    (run.model / WEIGHTS_NAME).unlink()
    assert train_stage(compose("train", base)).is_finished
    assert (run.path / "summary.json").stat().st_mtime_ns == written
    assert not (run.model / WEIGHTS_NAME).exists()


def test_a_run_dir_is_a_folder_of_the_run_alone(
    base: list[str], compose: Compose, demo_data: DemoData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(demo_data.root / "features")
    for place, held in {
        "/": "all there is",
        "..": "the folder in which this was typed",
        str(Path.home()): "the home folder",
        str(demo_data.pool): "the pool",
        str(demo_data.pool / "shards" / ".."): "the pool",
    }.items():
        settings = compose("train", [*base, f"run_dir={place}"])
        with pytest.raises(InputError, match=f"of the run alone.* which holds {held}"):
            train_stage(settings)
    require_own_folder(".", str(demo_data.pool))
    require_own_folder(str(demo_data.pool / "runs"), str(demo_data.pool))
    require_own_folder("runs", "s3://bucket/pool")


def test_same_seed_same_weights(base: list[str], compose: Compose, tmp_path: Path) -> None:
    runs = [
        train_stage(compose("train", [*base, f"output_dir={tmp_path / name}"])) for name in "ab"
    ]
    first, second = (load_clip_model(str(run.path)).model.state_dict() for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_run_dir_of_another_run_is_refused(
    base: list[str], compose: Compose, tmp_path: Path
) -> None:
    folder = f"run_dir={tmp_path / 'mine'}"
    train_stage(compose("train", [*base, folder]))
    with pytest.raises(InputError, match="holds a run with another selection"):
        train_stage(compose("train", [*base, folder, "seed=5"]))


def test_evaluation_after_training(base: list[str], compose: Compose, demo_data: DemoData) -> None:
    options = [f"eval.root={demo_data.tasks}", "+eval.groups.both=[digit,colour]"]
    run = train_stage(compose("train", [*base, *options]))
    results = {record["key"]: record for record in read_jsonl(run.results)}
    assert set(results) == {"digit", "colour", "count", "retrieval"}
    logged = {k: v for r in read_jsonl(run.path / "metrics.jsonl") for k, v in r.items()}
    digit = results["digit"]["metrics"]["acc1"]
    assert logged["eval/digit/acc1"] == digit
    mean = (digit + results["colour"]["metrics"]["acc1"]) / 2
    assert logged["eval/average/both"] == pytest.approx(mean)


def test_budget_is_rounded_up_to_full_batches() -> None:
    assert Budget(samples_seen=100_000, global_batch_size=256).total_steps == 391
    assert Budget(samples_seen=100_000, global_batch_size=256).trained_samples == 100_096
    assert Budget(samples_seen=12_800_000, global_batch_size=4096).total_steps == 3125


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("scale.samples_seen=0", r"scale\.samples_seen must be an integer of at least 1. Got 0"),
        ("scale.global_batch_size=1", r"scale\.global_batch_size must be .* at least 2. Got 1"),
        ("online.cadence=often", r"online\.cadence must be one of .*every_step"),
        ("trainer.precision=bf32", r"trainer\.precision must be one of .*Got 'bf32'"),
        ("data.num_workers=many", r"data\.num_workers must be an integer of at least 0, or auto"),
        (
            "data.start_method=thread",
            r"data\.start_method must be one of .*, or null\. Got 'thread'",
        ),
        ("seed=-1", r"seed must be an integer of at least 0. Got -1"),
        (
            "model.pretrained=/nonexistent.pt",
            r"model\.pretrained must be .* an existing file. Got '/nonexistent.pt'",
        ),
        (
            "trainer.accelerator=abacus",
            r"trainer\.accelerator must be one of auto, .* 'abacus'",
        ),
        ("trainer.checkpoint_every_n_steps=0", r"checkpoint_every_n_steps must be .* at least 1"),
        ("eval.root=/nonexistent", r"eval\.root must be"),
    ],
)
def test_bad_options_name_option_rule_and_value(
    override: str, message: str, base: list[str], compose: Compose, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        train_stage(compose("train", [*base, override]))
    assert not list((tmp_path / "outputs").glob("train/*/checkpoints/*"))


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_precisions_train(precision: str, base: list[str], compose: Compose) -> None:
    run = train_stage(compose("train", [*base, f"trainer.precision={precision}"]))
    assert run.summary is not None
    state = load_clip_model(str(run.path)).model.state_dict()
    assert all(torch.isfinite(value).all() for value in state.values())
