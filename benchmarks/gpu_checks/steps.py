"""Items `step` and `step compiled`: our training step against open_clip's, with the same batch."""

from __future__ import annotations

import gc
import statistics
import time

import torch
from training_step import bare, ours

from gpu_checks.harness import Facts, Setup, require
from gpu_checks.measuring import (
    clip_model,
    cut,
    gemm_tflops,
    noise_batch,
    stated_tflops,
    step_options,
)
from siftclip.datamodules.models.load import ClipModel
from siftclip.trainer.online.flops import training_flops
from siftclip.trainer.online.step_memory import StepMemory, usable_bytes

SKIPPED = 3  # steps before the clock starts
CHECKPOINTED = 16  # samples of the tiny check for which activations are computed again
SLOWEST = 0.9  # of open_clip's samples a second, below which something is wrong


def step(setup: Setup, facts: Facts) -> None:
    """Without torch.compile, at three sizes of the batch."""
    plan = {256: (20, 3), 1024: (10, 3), 4096: (4, 1)}  # steps and rounds
    for samples, (steps, rounds) in setup.size(plan, {8: (2, 1), CHECKPOINTED: (1, 1)}).items():
        _measure(setup, facts, samples, steps=steps, rounds=rounds, compiled=False)


def step_compiled(setup: Setup, facts: Facts) -> None:
    """With torch.compile, the most telling size first; those without time are left out."""
    cost = 0.0
    for samples in setup.size((1024, 4096, 256), (8,)):
        if setup.seconds_left < 1.2 * cost:
            facts[f"{samples}"] = "not measured: no time"
            continue
        start = time.monotonic()
        _measure(setup, facts, samples, steps=setup.size(8, 2), rounds=1, compiled=True)
        cost = time.monotonic() - start


def _measure(
    setup: Setup, facts: Facts, samples: int, *, steps: int, rounds: int, compiled: bool
) -> None:
    """Let both sides take turns with one batch, and say what a sample costs."""
    clip = clip_model(setup)
    batch = noise_batch(setup, clip, samples)
    counted = _counted_bytes(setup, clip, samples)
    checkpointing = counted > usable_bytes(setup.device)
    checkpointing = checkpointing if setup.on_gpu else samples == CHECKPOINTED
    if checkpointing:
        clip.model.set_grad_checkpointing(True)  # type: ignore[operator]
        counted = _counted_bytes(setup, clip, samples)
    options = step_options(setup, compiled=compiled)
    sides = {
        "open_clip": lambda: bare(
            clip.model, batch, steps, SKIPPED, options, fused=True, clip=None
        ),
        "ours": lambda: ours(clip.model, [batch], steps, SKIPPED, options, clip=None),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    found: dict[str, object] = {"checkpointing": checkpointing} if checkpointing else {}
    found["counted GB"] = round(counted / 1e9, 2)
    for turn in range(rounds):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            seconds[name].append(sides[name]())
            gc.collect()
            peak = setup.peak_gb()
            if peak is not None:
                found[f"{name} peak GB"] = peak
    rates = {name: samples / statistics.median(values) for name, values in seconds.items()}
    for name, rate in rates.items():
        found[f"{name} samples/s"] = round(rate)
    ratio = rates["ours"] / rates["open_clip"]
    found["ours / open_clip"] = round(ratio, 3)
    found |= _utilisation(setup, clip, rates["ours"])
    if checkpointing:  # the other way to a batch of this size
        pieces = cut(batch, samples // 4)
        plain = clip_model(setup)
        taken = ours(plain.model, pieces, steps, SKIPPED, options, clip=None)
        found["ours by micro-batches samples/s"] = round(samples / taken)
        peak = setup.peak_gb()
        if peak is not None:
            found["ours by micro-batches peak GB"] = peak
    facts[f"{samples}"] = found
    if setup.on_gpu:
        require(ratio >= SLOWEST, f"{samples}: {ratio:.2f} of open_clip's samples a second")


def _counted_bytes(setup: Setup, clip: ClipModel, samples: int) -> int:
    """What trainer.micro_batch_size=auto would think that the step takes."""
    precision = "bf16-mixed" if setup.on_gpu else "32-true"
    memory = StepMemory(clip, device=setup.device, precision=precision, rank_batch=samples)
    return memory.at(samples)


def _utilisation(setup: Setup, clip: ClipModel, rate: float) -> dict[str, float]:
    """FLOPs of forward and backward, as parts of what the device reaches and is stated to."""
    reached = gemm_tflops(setup, torch.bfloat16 if setup.on_gpu else torch.float32)
    was = clip.model.training
    clip.model.set_grad_checkpointing(False)  # type: ignore[operator]  # repeated work is no use
    flops = training_flops(clip.model) * rate / 1e12
    clip.model.train(was)
    parts = {"TFLOP/s": round(flops, 3), "of GEMM": round(flops / reached, 3)}
    stated = stated_tflops(setup)
    return parts if stated is None else {**parts, "MFU": round(flops / stated, 3)}
