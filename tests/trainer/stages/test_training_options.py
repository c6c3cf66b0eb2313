"""Options of training, each through the train stage on a tiny pool."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import DictConfig
from tiny_runs import WHOLE_TEXT
from torch.distributed.fsdp import MixedPrecisionPolicy

from siftclip.datamodules.index.uids import format_uid
from siftclip.datamodules.models.load import load_clip_model
from siftclip.datamodules.pool.pool import open_pool
from siftclip.datamodules.storage.local import LocalStorage
from siftclip.errors import InputError
from siftclip.files import read_jsonl
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.loop import module as module_of_training
from siftclip.trainer.loop.checkpointing import StepCheckpoint
from siftclip.trainer.models.sharding import shard_model
from siftclip.trainer.optim import gradients
from siftclip.trainer.optim.gradients import compute_gradients
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.stages.train import train_stage

Compose = Callable[..., DictConfig]


def records(run: RunDir) -> list[dict[str, Any]]:
    return [r for r in read_jsonl(run.path / "metrics.jsonl") if "train/loss" in r]


def losses(run: RunDir) -> list[float]:
    return [record["train/loss"] for record in records(run)]


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return load_clip_model(str(run.path)).model.state_dict()


def final_checkpoint(run: RunDir) -> dict[str, Any]:
    path = run.latest_checkpoint()
    assert path is not None
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


@pytest.fixture
def plain_run(base: list[str], compose: Compose, demo_data: DemoData) -> RunDir:
    """A run without further options, the same for all tests."""
    options = [*base, f"run_dir={demo_data.root / 'plain_run'}"]
    return train_stage(compose("train", options))


@pytest.fixture
def base(base: list[str]) -> list[str]:
    """With the whole width of the text tower; those of a narrow one overflow in fp16 at first."""
    return [*base, WHOLE_TEXT]


@pytest.fixture
def pool_uids(demo_data: DemoData) -> np.ndarray:
    """The uids of the pool's rows, 32 hexadecimal digits each."""
    pool = open_pool(
        LocalStorage(str(demo_data.pool)),
        cache_dir=demo_data.root / "cache",
        max_bad_fraction=0,
        progress=False,
    )
    return np.asarray([format_uid(uid) for uid in pool.uids])


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [
        ("bf16-mixed", 0.05),
        ("16-mixed", 0.01),
        ("tf32", 1e-6),
        ("bf16-true", 0.1),
        ("64-true", 1e-4),
    ],
)
def test_precisions_train_alike(
    precision: str, tolerance: float, base: list[str], compose: Compose, plain_run: RunDir
) -> None:
    expected = losses(plain_run)
    run = train_stage(compose("train", [*base, f"trainer.precision={precision}"]))
    assert losses(run) == pytest.approx(expected, rel=tolerance)
    assert records(run)[-1]["train/skipped_steps"] == 0


def test_scaling_of_fp16_reaches_the_gradients(
    base: list[str], compose: Compose, plain_run: RunDir
) -> None:
    """On a CPU Lightning itself would train in bf16 instead."""
    run = train_stage(compose("train", [*base, "trainer.precision=16-mixed"]))
    assert final_checkpoint(run)["MixedPrecision"]["scale"] == 65536.0
    norms = [[r["train/grad_norm"] for r in records(each)] for each in (run, plain_run)]
    assert norms[0] == pytest.approx(norms[1], rel=0.05)  # of the unscaled gradients


@pytest.fixture
def bad_gradients(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    """Make the gradients of some steps (1, 2, ...) infinite."""

    def make(steps: set[int]) -> None:
        calls = iter(range(1, 10**6))

        def broken(model: torch.nn.Module, *args: Any, **named: Any) -> Any:
            terms = compute_gradients(model, *args, **named)
            if next(calls) in steps:
                gradient = next(p.grad for p in model.parameters() if p.grad is not None)
                gradient.view(-1)[0] = math.inf
            return terms

        monkeypatch.setattr(module_of_training, "compute_gradients", broken)

    return make


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_steps_without_finite_gradients_are_skipped_and_counted(
    precision: str,
    base: list[str],
    compose: Compose,
    bad_gradients: Callable[[set[int]], None],
) -> None:
    bad_gradients({2, 3})
    options = [*base, f"trainer.precision={precision}", "optim.grad_clip_norm=1"]
    run = train_stage(compose("train", options))
    assert [r["train/skipped_steps"] for r in records(run)] == [0, 1, 2, 2, 2, 2]
    assert [r["step"] for r in records(run)] == [1, 2, 3, 4, 5, 6]
    assert all(bool(value.isfinite().all()) for value in weights(run).values())
    assert final_checkpoint(run)["skipped_steps"] == 2
    state = final_checkpoint(run)["optimizer_states"][0]["state"]
    assert {int(moments["step"]) for moments in state.values()} == {4}


@pytest.mark.parametrize(
    "options",
    [["model=rn_tiny"], ["loss=drrho", "loss.teacher.features.name=noise", "loss.gamma=0.5"]],
)
def test_a_skipped_step_leaves_no_trace_in_the_buffers(
    options: list[str],
    base: list[str],
    compose: Compose,
    demo_data: DemoData,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Statistics of batch norms and averages of samples survive features that are not finite."""
    calls = iter(range(1, 10**6))

    def broken(
        model: torch.nn.Module, objective: Any, batches: Any, context: Any, **named: Any
    ) -> Any:
        if next(calls) == 2:
            batches = [replace(batch, images=batch.images * math.inf) for batch in batches]
        return compute_gradients(model, objective, batches, context, **named)

    monkeypatch.setattr(module_of_training, "compute_gradients", broken)
    if "loss=drrho" in options:
        options = [*options, f"loss.teacher.features.root={demo_data.root / 'features'}"]
    run = train_stage(compose("train", [*base, *options]))
    found = {r["step"]: r["train/skipped_steps"] for r in records(run)}
    assert found == {1: 0, 3: 1, 4: 1, 5: 1, 6: 1}  # step 2 has no loss to be logged
    for name, value in final_checkpoint(run)["state_dict"].items():
        unseen = value == -math.inf  # samples that have not been drawn yet
        fine = value.isfinite() | unseen if name.startswith("loss.") else value.isfinite()
        assert bool(fine.all()), name


def test_too_many_skipped_steps_stop_the_run(
    base: list[str], compose: Compose, bad_gradients: Callable[[set[int]], None]
) -> None:
    bad_gradients({2, 4, 5})
    config = compose("train", [*base, "trainer.max_skipped_fraction=0.001"])
    message = r"^trainer\.max_skipped_fraction is exceeded: 3 of 5 steps had gradients that are not"
    with pytest.raises(InputError, match=message + r" finite.*0\.001"):
        train_stage(config)


def test_the_average_of_the_weights_is_what_is_written(
    base: list[str], compose: Compose, plain_run: RunDir
) -> None:
    run = train_stage(compose("train", [*base, "optim.ema_decay=0.5"]))
    state = final_checkpoint(run)["state_dict"]
    written = weights(run)
    for name, value in written.items():
        torch.testing.assert_close(value, state[f"ema.averaged.{name}"], rtol=0, atol=0)
    moved = [name for name in written if not torch.equal(written[name], state[f"model.{name}"])]
    assert "visual.proj" in moved
    raw = load_clip_model(
        str(run.path), pretrained=str(run.latest_checkpoint()), weights="raw"
    ).model.state_dict()
    torch.testing.assert_close(raw["visual.proj"], state["model.visual.proj"], rtol=0, atol=0)
    for name, value in weights(plain_run).items():  # averaging does not change the training
        torch.testing.assert_close(value, raw[name], rtol=0, atol=0)


RESUMED = {
    "averaged": ["optim.ema_decay=0.9"],
    "fp16": ["trainer.precision=16-mixed"],
    "patch dropout": ["model.options.force_patch_dropout=0.5", "trainer.micro_batch_size=4"],
    "batch norm": ["model=rn_tiny"],
    "cooldown": ["optim.schedule=cooldown", "optim.cooldown_steps=3"],
    "drrho": ["loss=drrho", "loss.teacher.features.name=noise", "loss.gamma=0.5"],
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_continued_run_equals_an_uninterrupted_one(
    case: str,
    base: list[str],
    compose: Compose,
    demo_data: DemoData,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    options = [*base, *RESUMED[case], "trainer.checkpoint_every_n_steps=3"]
    if "drrho" in case:
        options.append(f"loss.teacher.features.root={demo_data.root / 'features'}")
    whole = train_stage(compose("train", [*options, f"run_dir={tmp_path / 'whole'}"]))
    config = compose("train", [*options, f"run_dir={tmp_path / 'parts'}"])
    log_window = module_of_training.ClipTraining._log_window

    def fail(self: Any, step: int) -> None:
        log_window(self, step)
        if step == 5:
            raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(module_of_training.ClipTraining, "_log_window", fail)
        with pytest.raises(OSError, match="the disk is gone"):
            train_stage(config)
    parts = train_stage(config)
    steps = [record["step"] for record in records(parts)]
    assert steps == [1, 2, 3, 4, 5, 6]  # the two that were repeated as well
    assert losses(parts)[-3:] == losses(whole)[-3:]
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=0)


def test_a_run_killed_after_its_last_checkpoint_has_logged_its_last_step(
    base: list[str], compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = StepCheckpoint.on_train_batch_end

    def save_and_fail(self: StepCheckpoint, trainer: Any, *args: Any, **kwargs: Any) -> None:
        save(self, trainer, *args, **kwargs)
        if trainer.global_step == 6:
            raise OSError("the machine is gone")

    config = compose("train", [*base, "trainer.log_every_n_steps=6"])
    with monkeypatch.context() as patch:
        patch.setattr(StepCheckpoint, "on_train_batch_end", save_and_fail)
        with pytest.raises(OSError, match="the machine is gone"):
            train_stage(config)
    run = train_stage(config)
    assert [record["step"] for record in records(run)] == [6]
    assert run.summary is not None
    assert run.summary["train_seconds"] > 0


def test_locked_image_tower_keeps_its_weights(
    base: list[str], compose: Compose, plain_run: RunDir
) -> None:
    options = ["model.lock.image=true", f"model.pretrained={plain_run.latest_checkpoint()}"]
    before, after = weights(plain_run), weights(train_stage(compose("train", [*base, *options])))
    for name, value in before.items():
        assert torch.equal(value, after[name]) == name.startswith("visual."), name


def test_compiled_towers_train_the_same_under_the_same_names(
    base: list[str], compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    from siftclip.trainer.builders import assembly

    compile_towers = assembly.compile_towers
    monkeypatch.setattr(
        assembly,
        "compile_towers",
        # traced and differentiated as inductor would have it, without its minute of C++
        lambda model, **options: compile_towers(model, backend="aot_eager", **options),
    )
    options = [*base, "trainer.micro_batch_size=8"]
    expected = train_stage(compose("train", options))
    run = train_stage(
        compose("train", [*options, "trainer.compile=true", "seed=0", "run_dir=null"])
    )
    assert losses(run) == pytest.approx(losses(expected), rel=1e-4)
    assert final_checkpoint(run)["state_dict"].keys() == {
        f"model.{name}" for name in weights(expected)
    }


def test_dropout_does_not_go_with_compiled_micro_batches(base: list[str], compose: Compose) -> None:
    options = ["trainer.compile=true", "trainer.micro_batch_size=4"]
    dropout = "model.options.force_patch_dropout=0.5"
    with pytest.raises(InputError, match=r"trainer\.compile=true does not go with .*dropout"):
        train_stage(compose("train", [*base, *options, dropout]))


def test_gradient_checkpointing_changes_nothing(
    base: list[str], compose: Compose, plain_run: RunDir
) -> None:
    run = train_stage(compose("train", [*base, "trainer.grad_checkpointing=true"]))
    assert run.path != plain_run.path
    assert losses(run) == pytest.approx(losses(plain_run), rel=1e-6)


@pytest.mark.parametrize("selecting", [False, True])
def test_channels_last_is_a_layout_of_the_same_training(
    base: list[str],
    compose: Compose,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    selecting: bool,
) -> None:
    seen: list[bool] = []
    images_of = gradients._images

    def look(*arguments: Any) -> torch.Tensor:
        images = images_of(*arguments)
        seen.append(images.is_contiguous(memory_format=torch.channels_last))
        return images

    monkeypatch.setattr(gradients, "_images", look)
    online = ["online=every_step", "online.selector.fraction=0.25"] if selecting else []
    found = []
    for channels_last in (False, True):
        option = f"trainer.channels_last={channels_last}"
        folder = f"run_dir={tmp_path / str(channels_last)}"
        run = train_stage(compose("train", [*base, "model=rn_tiny", *online, option, folder]))
        found.append(losses(run))
        assert set(seen) == {channels_last}
        seen.clear()
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_weights_of_the_samples(
    base: list[str],
    compose: Compose,
    pool_uids: np.ndarray,
    plain_run: RunDir,
    tmp_path: Path,
) -> None:
    """Equal weights change nothing; a sample without weight is as if it were not there."""
    table = pd.DataFrame(
        {"uid": pool_uids, "weight": 2.0, "mine": np.linspace(0, 1, len(pool_uids))}
    )
    table.to_parquet(tmp_path / "weights.parquet")
    option = f"loss.weights.path={tmp_path / 'weights.parquet'}"
    expected = losses(plain_run)
    found = losses(train_stage(compose("train", [*base, option])))
    assert found == pytest.approx(expected, rel=1e-5)
    other = losses(train_stage(compose("train", [*base, option, "loss.weights.column=mine"])))
    assert other != pytest.approx(expected, rel=1e-3)
    table.iloc[:-1].to_parquet(tmp_path / "weights.parquet")
    with pytest.raises(InputError, match=r"every selected sample a finite weight.* have none"):
        train_stage(compose("train", [*base, option, "selector=random", "selector.fraction=1.0"]))


def test_a_teacher_model_and_its_cached_features_teach_the_same(
    base: list[str], compose: Compose, plain_run: RunDir, tmp_path: Path
) -> None:
    from siftclip.trainer.stages.embed import embed_stage

    cached = tmp_path / "cached"
    embed_stage(
        compose(
            "embed",
            [
                *base,
                "features.name=taught",
                f"features.root={cached}",
                f"features.model.name={plain_run.path}",
            ],
        )
    )
    distil = [*base, "loss=distill", "model.augmentation={scale:[1.0,1.0]}"]
    scale = float(load_clip_model(str(plain_run.path)).model.logit_scale.detach().exp())  # type: ignore[operator]
    by_model = train_stage(compose("train", [*distil, f"loss.teacher.model.name={plain_run.path}"]))
    by_features = train_stage(
        compose(
            "train",
            [
                *distil,
                "loss.teacher.features.name=taught",
                f"loss.teacher.features.root={cached}",
                f"loss.teacher.features.logit_scale={scale}",
            ],
        )
    )
    for name in ("train/distill_loss", "train/contrastive_loss", "train/loss"):
        found = [[record[name] for record in records(run)] for run in (by_model, by_features)]
        assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert not any("teacher" in name for name in final_checkpoint(by_model)["state_dict"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["loss=siglip", "model.options.init_logit_bias=null"], "needs a model with a logit bias"),
        (["loss=coca"], "has no text decoder: use loss=clip"),
        (["loss=distill"], "needs one teacher: loss.teacher.model.name"),
        (["loss=drrho"], "needs the cached features of a reference model"),
        (["loss.name=hinge"], "loss.name must be one of"),
        (["trainer.micro_batch_size=5"], "must divide the 16 samples"),
        (["trainer.micro_batch_size=0"], "trainer.micro_batch_size must be"),
        (["trainer.precision=fp8"], "trainer.precision must be one of"),
        (["trainer.strategy=deepspeed"], "trainer.strategy must be one of"),
        (["trainer.strategy=fsdp", "trainer.precision=16-mixed"], "does not go with .*fsdp"),
        (["trainer.sharded_checkpoints=true"], r"Set trainer\.strategy=fsdp, or leave it at false"),
        (
            [
                "trainer.strategy=fsdp",
                "trainer.sharded_checkpoints=true",
                "trainer.background_checkpoints=true",
            ],
            "exclude each other",
        ),
        (["trainer.fsdp_reduce_dtype=bf16"], r"Set trainer\.strategy=fsdp, or leave it at fp32"),
        (["trainer.sync_batchnorm=true"], "trainer.sync_batchnorm=true needs GPUs"),
        (["trainer.max_skipped_fraction=2"], r"must be in the range \[0, 1\]"),
        (
            ["trainer.keep_every_n_steps=3", "trainer.checkpoint_every_n_steps=2"],
            r"keep_every_n_steps must be a multiple of trainer\.checkpoint_every_n_steps=2.*Got 3",
        ),
        (["model=rn_tiny", "trainer.grad_checkpointing=true"], "no gradient checkpointing"),
        (
            ["optim.ema_decay=0.9", "trainer.precision=bf16-true"],
            "optim.ema_decay=0.9 needs weights",
        ),
    ],
)
def test_wrong_options_say_what_to_do(
    options: list[str], message: str, base: list[str], compose: Compose
) -> None:
    with pytest.raises(InputError, match=message):
        train_stage(compose("train", [*base, *options]))


def test_batch_norms_are_not_sharded() -> None:
    mesh: Any = None  # it is not asked for anything
    with pytest.raises(InputError, match=r"a model with batch norms needs trainer\.strategy=ddp"):
        shard_model(torch.nn.Sequential(torch.nn.BatchNorm2d(3)), mesh, MixedPrecisionPolicy())


def test_the_teacher_must_see_what_the_model_sees(
    base: list[str], compose: Compose, model_folder: Path
) -> None:
    options = ["loss=distill", f"loss.teacher.model.name={model_folder}"]
    train_stage(compose("train", [*base, *options]))
    other = ["model.options.force_image_size=64"]
    with pytest.raises(InputError, match=r"must take the images of the model.*size"):
        train_stage(compose("train", [*base, *options, *other]))
    other = ["model.options.force_context_length=12"]
    with pytest.raises(InputError, match="tokenizer and context length of the model"):
        train_stage(compose("train", [*base, *options, *other]))


def test_chance_level_is_said_once(
    base: list[str], compose: Compose, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        run = train_stage(compose("train", base))
    assert caplog.text.count("chance level") == 1
    assert "ln(16) = 2.773" in caplog.text
    assert losses(run)[0] == pytest.approx(math.log(16), abs=1)


def test_logged_names_are_open_clips(base: list[str], compose: Compose) -> None:
    run = train_stage(compose("train", [*base, "loss=siglip"]))
    open_clip_names = {
        f"train/{name}"
        for name in (
            *("data_time", "batch_time", "samples_per_second", "samples_per_second_per_gpu"),
            *("scale", "logit_scale", "logit_bias", "lr", "contrastive_loss", "loss"),
        )
    }
    ours = {"train/grad_norm", "train/skipped_steps", "train/peak_memory_gb", "train/samples_seen"}
    assert records(run)[0].keys() >= open_clip_names | ours
    assert records(run)[0]["train/logit_bias"] == pytest.approx(-10, abs=0.1)
