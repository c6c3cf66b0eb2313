"""The stages of `siftclip data bench`: loading, training that waits, and reading and copying."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from siftclip.datamodules.streaming.datamodule import OrderSampler, StreamDataModule
from siftclip.datamodules.streaming.loader import LoaderOptions, make_loader
from siftclip.datamodules.streaming.order import SampleOrder
from siftclip.progress import show_progress
from siftclip.tables import ruled_table
from siftclip.trainer.bench.feeding import describe_feeding
from siftclip.trainer.bench.measure import (
    ROUNDS,
    CopyCost,
    LoaderRate,
    ReadCost,
    StageTimes,
    available_memory_bytes,
    compare_reading,
    conclude,
    passes_until_copy_pays,
    time_copying,
    time_finishing,
    time_loader,
    time_stages,
)
from siftclip.trainer.builders.assembly import data_module_from, training_module
from siftclip.trainer.builders.losses import check_loss_options
from siftclip.trainer.builders.objective import open_loss_data
from siftclip.trainer.builders.run_parts import RunParts
from siftclip.trainer.builders.selection import PoolSelection, select_stage
from siftclip.trainer.loop.module import ClipTraining
from siftclip.trainer.loop.progress import TrainingProgress
from siftclip.trainer.online.sample_flops import counted as counted_flops
from siftclip.trainer.online.sample_flops import learner_flops
from siftclip.trainer.runtime.cores import share_cores
from siftclip.trainer.runtime.lightning_setup import loader_options, local_ranks, make_trainer
from siftclip.trainer.runtime.step_clock import StepClock, StepTimes
from siftclip.trainer.settings.budget import Budget, budget_from
from siftclip.trainer.settings.commands import BenchCommand
from siftclip.trainer.stages.selection_summary import counted
from siftclip.trainer.stages.train import run_parts
from siftclip.writing import temporary_folder

WARM_UP_STEPS = 2
LOADER_BATCH_SAMPLES = 256  # at most, so that the loader's turns are many and short
# Below this, steps wait for batches that are ready: fetching one takes a moment too.
LIMITED_BY_LOADER = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOutcome:
    """Everything that was measured."""

    selected: PoolSelection
    model: str
    device: str
    batch_samples: int  # of a training step
    workers: int
    run_passes: float  # of a training run with this configuration
    stages: StageTimes
    loader: LoaderRate
    finishing_seconds: float  # of a sample, on the device
    training: StepTimes
    flops: int | None  # of training on a sample; None: they cannot be counted
    reading: list[ReadCost]
    copying: CopyCost

    @property
    def copy_pays_after(self) -> dict[float, float]:
        """Passes by keep fraction; infinity for never."""
        stages = self.stages
        one_process = stages.total_seconds / stages.samples
        parallel = one_process * self.loader.samples_per_second if self.workers else 0.0
        return {
            cost.keep_fraction: passes_until_copy_pays(
                cost,
                copy_seconds=self.copying.sample_seconds,
                other_seconds=stages.seconds_after_reading,
                model_seconds=self.training.model_seconds,
                parallel=parallel,
            )
            for cost in self.reading
        }


def bench_stage(settings: BenchCommand) -> BenchOutcome:
    """Select, then measure loading, training and copying. Only a temporary folder is written."""
    samples, steps = settings.bench.samples, settings.bench.steps
    root, progress = settings.common.output_root, settings.common.progress
    budget = budget_from(settings.scale)
    options = loader_options(settings.data, settings.trainer)
    check_loss_options(settings.loss)
    selected = select_stage(settings)
    share_cores(options.num_workers, local_ranks(settings.trainer))
    batch = budget.global_batch_size
    measured = Budget(samples_seen=(WARM_UP_STEPS + steps) * batch, global_batch_size=batch)
    bound = settings.pool.max_bad_fraction
    loss_data = open_loss_data(settings.loss, selected, max_bad_fraction=bound)
    parts = run_parts(settings, selected, loss_data, root)
    flops = _sample_flops(parts)
    data = data_module_from(parts, measured)
    stages, loader = _time_loading(data, options, samples, progress=progress)
    with temporary_folder(".bench-", root) as folder:
        training, device = _time_training(parts, training_module(parts, measured), data, folder)
        with show_progress(total=None, label="reading", unit="sample", bar=progress) as bar:
            reading = compare_reading(
                data.dataset.reader,
                samples=samples,
                batch_samples=budget.global_batch_size,
                seed=settings.common.seed,
                window_shards=settings.data.shuffle_window_shards,
                advance=bar.update,
            )
        copying = time_copying(selected.pool, folder / "copy.tar")
    return BenchOutcome(
        selected=selected,
        model=settings.model.name,
        device=device.type,
        batch_samples=budget.global_batch_size,
        workers=options.num_workers,
        run_passes=budget.trained_samples / len(selected.rows),
        stages=stages,
        loader=loader,
        finishing_seconds=time_finishing(loader.batch, device),
        training=training,
        flops=flops,
        reading=reading,
        copying=copying,
    )


def _sample_flops(parts: RunParts) -> int | None:
    micro_batches = parts.micro_batch_size is not None
    found = counted_flops(lambda: learner_flops(parts.clip, micro_batches=micro_batches))
    return None if found is None else found.training + found.repeated


def _time_loading(
    data: StreamDataModule, options: LoaderOptions, samples: int, *, progress: bool
) -> tuple[StageTimes, LoaderRate]:
    """Load in one process stage by stage, then through the loader, which continues behind it."""
    batch = min(data.global_batch_size, LOADER_BATCH_SAMPLES, samples)
    order = SampleOrder(
        rows=data.order.rows,
        seed=data.order.seed,
        global_batch=batch,
        shard_of_row=data.order.shard_of_row,
        window_shards=data.order.window_shards,
    )
    batches = -(-samples // batch)
    turn = max(1, options.num_workers)
    in_turns = turn * (1 + -(-batches // turn))  # one more, while the processes start

    def sampler(start: int, count: int) -> OrderSampler:
        return OrderSampler(
            order=order,
            global_batch=batch,
            start_step=start,
            total_steps=start + count,
            rank=0,
            world_size=1,
        )

    with show_progress(total=batches * batch, label="stages", unit="sample", bar=progress) as bar:
        stages = time_stages(
            data.dataset,
            sampler(0, batches),
            max_bad_fraction=data.counts.max_bad_fraction,
            advance=bar.update,
        )
    loader = make_loader(data.dataset, sampler(batches, in_turns), options, pin_memory=False)
    with show_progress(total=in_turns * batch, label="loader", unit="sample", bar=progress) as bar:
        rate = time_loader(loader, skipped_batches=turn, advance=bar.update)
    return stages, rate


def _time_training(
    parts: RunParts, module: ClipTraining, data: StreamDataModule, folder: Path
) -> tuple[StepTimes, torch.device]:
    """Time the steps of a training run on one device, and name the device."""
    clock = StepClock(skipped_steps=WARM_UP_STEPS, steps=data.total_steps - WARM_UP_STEPS)
    trainer = make_trainer(
        replace(parts.trainer, devices=1, num_nodes=1, strategy="auto"),
        folder=folder,
        callbacks=[clock, TrainingProgress(bar=parts.common.progress)],
        loggers=[],
        max_steps=data.total_steps,
        max_epochs=-1,
        enable_checkpointing=False,
    )
    trainer.fit(module, datamodule=data)
    return clock.times(), trainer.strategy.root_device


def describe_bench(outcome: BenchOutcome) -> str:
    """Describe everything that was measured, for the terminal."""
    pool, selection = outcome.selected.pool, outcome.selected.selection
    stages, training = outcome.stages, outcome.training
    pool_bytes = sum(shard.size_bytes for shard in pool.shards)
    memory = available_memory_bytes()
    free = "unknown memory" if memory is None else f"{memory / 1e9:.1f} GB of memory"
    workers = f"{outcome.workers} worker{'' if outcome.workers == 1 else 's'}"
    is_loader = training.wait_fraction > LIMITED_BY_LOADER
    copying = outcome.copying
    seconds = {**stages.seconds, "other": stages.total_seconds - sum(stages.seconds.values())}
    return "\n".join(
        [
            f"pool       {pool.root}: {len(pool)} samples, {pool_bytes / 1e9:.2f} GB; "
            f"{free} available",
            f"selection  {selection.manifest['selector']}: "
            f"{counted(len(selection), len(selection.uids))}; {outcome.run_passes:.1f} passes in "
            "this run",
            "",
            "What was read before may come from memory: the numbers are of this state of the "
            "page cache.",
            "",
            ruled_table(
                [
                    ["one process", "us/sample", "share"],
                    *(
                        [
                            stage,
                            f"{1e6 * taken / stages.samples:.1f}",
                            f"{100 * taken / stages.total_seconds:.1f} %",
                        ]
                        for stage, taken in seconds.items()
                    ),
                ]
            ),
            "",
            f"process    {stages.samples_per_second:.0f} samples/s alone; reading "
            f"{stages.read_bytes / stages.seconds['read'] / 1e6:.0f} MB/s",
            f"loader     {outcome.loader.samples_per_second:.0f} samples/s with {workers}",
            *(
                []
                if outcome.flops is None
                else [
                    "feeding    "
                    + describe_feeding(outcome.loader.samples_per_second, outcome.flops)
                ]
            ),
            f"images     {_images(outcome)}",
            f"training   {training.samples_per_second:.0f} samples/s: {outcome.model} on "
            f"{outcome.device}, one device, batch {outcome.batch_samples}",
            f"waiting    {100 * training.wait_fraction:.1f} % of the training time: the "
            f"{'loader' if is_loader else 'model'} is the limit (the model alone: "
            f"{1 / training.model_seconds:.0f} samples/s)",
            f"copying    {1e6 * copying.sample_seconds:.1f} us/sample, "
            f"{copying.size_bytes / copying.seconds / 1e6:.0f} MB/s read and written",
            "",
            ruled_table(
                [
                    ["kept", "streaming us/sample", "sequential us/sample", "a copy pays after"],
                    *(
                        [
                            f"{100 * cost.keep_fraction:g} %",
                            _rounds(cost.streaming_seconds, cost.streaming_rounds),
                            _rounds(cost.sequential_seconds, cost.sequential_rounds),
                            _passes(outcome.copy_pays_after[cost.keep_fraction]),
                        ]
                        for cost in outcome.reading
                    ),
                ]
            ),
            "",
            f"Median (lowest to highest) of {ROUNDS} rounds. Sequential is the best that a reader "
            "of new tars can reach;\nsiftclip train reads a copy in training order, too.",
            conclude(outcome.copy_pays_after, run_passes=outcome.run_passes),
        ]
    )


def _images(outcome: BenchOutcome) -> str:
    """Say what the loader hands over, and what is left to the device."""
    batch = outcome.loader.batch
    size = f"{batch.images.nbytes / len(batch.rows) / 1e3:.1f} kB per sample"
    if batch.normalization is None:
        return f"{size}, floats: the transform does not end as open_clip's do"
    microseconds = 1e6 * outcome.finishing_seconds
    if batch.crops is not None:
        return (
            f"{size}, crops, which {outcome.device} resizes and finishes in {microseconds:.1f} us"
        )
    return f"{size}, pixels, which {outcome.device} finishes in {microseconds:.1f} us"


def _rounds(median: float, rounds: Sequence[float]) -> str:
    return f"{1e6 * median:.1f} ({1e6 * min(rounds):.1f} to {1e6 * max(rounds):.1f})"


def _passes(number: float) -> str:
    return "never" if math.isinf(number) else f"{number:.1f} passes"
