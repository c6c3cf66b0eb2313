"""Seconds to the first batch: of a new selection, and of a run that continues at 90 % of a pass.

    python benchmarks/first_batch.py POOL

The stages run in this process as `siftclip train` runs them: the selection is made and written, the
order drawn, the loader started. What Python takes to import torch, Lightning and open_clip is
measured beside it.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from common import describe_machine

from siftclip.datamodules.pool.reader import SampleReader
from siftclip.datamodules.streaming.batches import SampleDataset
from siftclip.datamodules.streaming.datamodule import OrderSampler, make_loader
from siftclip.datamodules.streaming.order import SampleOrder
from siftclip.trainer.builders.models import clip_model_from
from siftclip.trainer.builders.selection import select_stage
from siftclip.trainer.runtime.lightning_setup import loader_options
from siftclip.trainer.settings.commands import TrainCommand
from siftclip.trainer.settings.read_command import compose
from siftclip.trainer.settings.store import composing


def first_batch(pool: Path, output: Path, *, seed: int, share_done: float) -> tuple[float, float]:
    """Seconds of the select stage, and from there to the first batch."""
    with composing():
        config = compose(
            TrainCommand,
            "train",
            [
                f"pool.root={pool}",
                f"output_dir={output}",
                "selector=random",
                "selector.fraction=0.3",
                f"seed={seed}",
                "scale.global_batch_size=256",
                "data.num_workers=1",
                "progress=false",
            ],
        )
    clip = clip_model_from(config.model)
    start = time.perf_counter()
    selected = select_stage(config)
    selected_at = time.perf_counter()
    order = SampleOrder(rows=selected.rows, seed=seed, global_batch=256)
    dataset = SampleDataset(
        reader=SampleReader(pool=selected.pool, max_image_pixels=10**8),
        transform=clip.train_transform,
        tokenizer=clip.tokenizer,
        seed=seed,
        substitutes=selected.rows,
    )
    step = int(share_done * len(selected.rows)) // 256
    sampler = OrderSampler(
        order=order, global_batch=256, start_step=step, total_steps=10**6, rank=0, world_size=1
    )
    batches = iter(
        make_loader(dataset, sampler, loader_options(config.data, config.trainer), pin_memory=False)
    )
    next(batches)
    return selected_at - start, time.perf_counter() - selected_at


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pool", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(describe_machine(), "\n")
    with TemporaryDirectory() as folder:
        output = Path(folder)
        first_batch(options.pool, output, seed=10**6, share_done=0)  # the index, the imports
        new, at_start, at_90 = [], [], []
        for seed in range(options.rounds):
            select, load = first_batch(options.pool, output, seed=seed, share_done=0)
            new.append(select + load)
            at_start.append(sum(first_batch(options.pool, output, seed=seed, share_done=0)))
            at_90.append(sum(first_batch(options.pool, output, seed=seed, share_done=0.9)))
    imports = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import siftclip.trainer.stages.train"], check=True)
        imports.append(time.perf_counter() - start)
    print("| from the start of the stages to the first batch | seconds (median) |")
    print("|---|---|")
    print(f"| a new selection | {statistics.median(new):.2f} |")
    print(f"| a selection that is there, from 0 % | {statistics.median(at_start):.2f} |")
    print(f"| the same, from 90 % of a pass | {statistics.median(at_90):.2f} |")
    print(f"| before: Python's imports | {statistics.median(imports):.2f} |")


if __name__ == "__main__":
    main()
