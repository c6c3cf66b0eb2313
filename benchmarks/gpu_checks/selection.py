"""Item `selection`: how a step that selects spends its time, in plain steps of the same batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from training_step import Repeated

from gpu_checks.harness import Facts, Setup, require
from gpu_checks.measuring import clip_model, cut, model_folder, noise_batch
from gpu_checks.pools import accelerator, photo_pool
from siftclip.datamodules.streaming.batches import Batch, StepBatch
from siftclip.files import write_npz
from siftclip.trainer.builders.assembly import training_module
from siftclip.trainer.builders.objective import open_loss_data
from siftclip.trainer.builders.online_setup import build_online
from siftclip.trainer.builders.selection import PoolSelection, select_stage
from siftclip.trainer.runtime.lightning_setup import make_trainer
from siftclip.trainer.settings.budget import budget_from
from siftclip.trainer.settings.commands import TrainCommand
from siftclip.trainer.settings.read_command import compose
from siftclip.trainer.settings.store import composing
from siftclip.trainer.stages.train import run_parts

TIMES = 5  # the super-batch, in sub-batches
EVERY_STEP = ["online=every_step", "online.selector.fraction=0.2"]


def selection(setup: Setup, facts: Facts) -> None:
    """Train on batches in memory, so that nothing waits for a loader."""
    words, plain = _options(setup), 0.0
    selected = _select(words)
    _write_features(selected, setup.work / "features")
    super_batch = cut(_batch(setup, len(selected.rows)), _sub_batch(setup))
    for name, more in _kinds(setup).items():
        batches = super_batch if more else super_batch[:1]
        found = _measured(setup, [*words, *more], StepBatch(batches))
        seconds = found.pop("step seconds")
        plain = plain or seconds
        facts[name] = {
            "ms": round(1e3 * seconds, 1),
            "plain steps": round(seconds / plain, 2),
            **{part: round(share / seconds, 3) for part, share in found.items()},
        }
        facts.note_peak(setup, f"{name}, peak GB")


def _kinds(setup: Setup) -> dict[str, list[str]]:
    """Options of what is compared, plain steps first. A live reference is as large as the model."""
    live = [*EVERY_STEP, f"online.reference.model.name={model_folder(setup)}"]
    half = setup.size(112, 16)
    cheap = [f"online.scoring.image_size={half}", "online.scoring.precision=bf16"]
    return {
        "plain": [],
        "jest": live,
        "learnability": [*live, "selector@online.selector=learnability"],
        "jest, cached reference": EVERY_STEP,
        f"jest, cached reference, {half} pixels": [*EVERY_STEP, *cheap],
    }


def _options(setup: Setup) -> list[str]:
    """Of all runs, with cached features of noise."""
    pool = photo_pool(setup)
    return [
        f"pool.root={pool}",
        f"model={setup.size('vit_b_32', 'vit_tiny')}",
        f"scale.global_batch_size={_sub_batch(setup)}",
        f"scale.samples_seen={2 * _window(setup) * _sub_batch(setup)}",
        f"trainer.log_every_n_steps={_window(setup)}",
        f"trainer.micro_batch_size={_sub_batch(setup)}",
        accelerator(setup),
        "trainer.devices=1",
        "selector=random",
        "selector.fraction=1",
        "optim.warmup_steps=1",
        "progress=false",
        f"features.root={setup.work / 'features'}",
        "features.name=noise",
        f"output_dir={setup.work / 'selection'}",
    ]


def _sub_batch(setup: Setup) -> int:
    return setup.size(1024, 16)


def _window(setup: Setup) -> int:
    """Steps that are timed, and as many before them."""
    return setup.size(6, 2)


def _select(words: list[str]) -> PoolSelection:
    """The samples of the pool."""
    with composing():
        return select_stage(compose(TrainCommand, "train", words))


def _write_features(selected: PoolSelection, folder: Path) -> None:
    generator = np.random.default_rng(0)
    values = generator.standard_normal((2, len(selected.pool), 64)).astype(np.float32)
    values /= np.linalg.norm(values, axis=2, keepdims=True)
    image, text = values.astype(np.float16)
    write_npz(folder / "part.npz", uids=selected.pool.uids, noise_img=image, noise_txt=text)


def _measured(setup: Setup, words: list[str], batch: StepBatch) -> dict[str, float]:
    """Seconds of a step and of its parts, by the run's own clocks, of the second half of it."""
    with composing():
        settings = compose(TrainCommand, "train", words)
        selected = select_stage(settings)
    bound = settings.pool.max_bad_fraction
    loss_data = open_loss_data(settings.loss, selected, max_bad_fraction=bound)
    parts = run_parts(settings, selected, loss_data, setup.work / "selection")
    budget = budget_from(settings.scale)
    module = training_module(parts, budget, build_online(parts, budget.total_steps))
    trainer = make_trainer(
        parts.trainer,
        folder=setup.work / "selection",
        callbacks=[],
        loggers=[],
        max_steps=budget.total_steps,
        max_epochs=-1,
        enable_checkpointing=False,
    )
    trainer.fit(module, train_dataloaders=Repeated(batch, budget.total_steps))
    latest = module.latest
    require(np.isfinite(latest["train/contrastive_loss"]), "the loss is not finite")
    seconds = latest["train/batch_time"]
    scoring, choosing = (latest[f"train/{part}_time"] for part in ("scoring", "selection"))
    return {
        "step seconds": seconds,
        "scoring": scoring,
        "selecting": choosing,
        "training": seconds - scoring - choosing,
    }


def _batch(setup: Setup, pool_samples: int) -> Batch:
    """Noise for samples of the pool, some of which may come twice, with cached features."""
    samples = TIMES * _sub_batch(setup)
    batch = noise_batch(setup, clip_model(setup), samples)
    generator = torch.Generator().manual_seed(1)
    cached = {
        f"noise_{kind}": F.normalize(torch.randn(samples, 64, generator=generator), dim=1).half()
        for kind in ("img", "txt")
    }
    return replace(batch, rows=torch.arange(samples) % pool_samples, references=cached)
