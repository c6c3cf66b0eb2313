"""Items `loader` and `embedding`: samples a second from tars, and of the towers alone."""

from __future__ import annotations

import re
import time
from typing import get_args, get_type_hints

import torch

from gpu_checks.harness import Facts, Setup, in_process, require
from gpu_checks.measuring import clip_model, model_folder, noise_batch, seconds_of
from gpu_checks.pools import Command, accelerator, photo_pool, workers
from siftclip.datamodules.models.autocast import autocast
from siftclip.trainer.models.embedding import embed_batch
from siftclip.trainer.settings.data import DataSettings

LINES = (
    "process",
    "loader",
    "images",
    "training",
    "waiting",
    "copying",
)  # of what `data bench` prints


def loader(setup: Setup, facts: Facts) -> None:
    """Run `siftclip data bench` with each way of resizing, on all cores."""
    pool = photo_pool(setup)
    facts["workers"] = workers()
    for resize in get_args(get_type_hints(DataSettings)["resize"]):
        command = Command(
            setup,
            f"bench-{resize}",
            "data",
            "bench",
            f"pool.root={pool}",
            f"model={setup.size('vit_b_32', 'vit_tiny')}",
            f"scale.global_batch_size={setup.size(1024, 16)}",
            f"bench.samples={setup.size(6000, 64)}",
            f"bench.steps={setup.size(8, 2)}",
            "selector=random",
            "selector.fraction=1",
            f"data.num_workers={workers()}",
            f"data.resize={resize}",
            accelerator(setup),
            "progress=false",
            f"output_dir={setup.work / 'bench'}",
        )
        text = command.finish()
        facts[resize] = {
            line: " ".join(found[1].split())
            for line in LINES
            if (found := re.search(rf"^{line} +(.+)$", text, re.MULTILINE))
        }
        require("samples/s" in text, f"data bench has printed no rate: {text[-200:]}")


def embedding(setup: Setup, facts: Facts) -> None:
    """Embed batches on the device, and then a pool with `siftclip embed`."""
    folder = in_process(model_folder, setup)
    pool, samples = photo_pool(setup), setup.size(8000, 120)
    start = time.perf_counter()
    Command(
        setup,
        "embed",
        "embed",
        f"pool.root={pool}",
        "features.name=mine",
        f"features.model.name={folder}",
        f"features.root={setup.work / 'embedded'}",
        f"features.batch_size={setup.size(1024, 16)}",
        f"data.num_workers={workers()}",
        accelerator(setup),
        "trainer.devices=1",
        "progress=false",
    ).finish()
    facts["siftclip embed samples/s, its start included"] = round(
        samples / (time.perf_counter() - start)
    )
    clip = clip_model(setup)
    batch = noise_batch(setup, clip, setup.size(1024, 16)).to(setup.device)
    model = clip.model.to(setup.device).eval()
    for name, dtype in (("fp32", None), ("bf16", torch.bfloat16)):
        with autocast(setup.device, dtype):
            seconds = seconds_of(setup, lambda: embed_batch(model, batch), repeats=5)
        facts[f"towers {name} samples/s"] = round(len(batch.rows) / seconds)
