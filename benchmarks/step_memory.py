"""Say how many samples of a step GPUs of some sizes take at a time, and check what is counted.

    python benchmarks/step_memory.py --models ViT-B-32 ViT-L-14 --batch 4096
    python benchmarks/step_memory.py --models ViT-B-32 RN50 --check 48

The first counts bytes of tensors without values, in bf16 with autocast as a CPU has it: on a GPU
some operators, such as layer norms, keep float32 instead. The second runs a step in float32 on the
CPU and compares what is counted with what the process really takes.
"""

import argparse
import re
from collections.abc import Iterator

import torch
from common import describe_machine

from siftclip.datamodules.models.load import ClipModel, load_clip_model
from siftclip.datamodules.streaming.batches import Batch
from siftclip.errors import InputError
from siftclip.tables import ruled_table
from siftclip.trainer.losses import SoftmaxLoss
from siftclip.trainer.models.towers import enable_grad_checkpointing
from siftclip.trainer.online.flops import blank_samples, input_sizes
from siftclip.trainer.online.step_memory import (
    RESERVED_BYTES,
    USED_SHARE,
    StepMemory,
    largest_part,
)
from siftclip.trainer.optim.gradients import Objective, StepContext, compute_gradients

GIGABYTES = (24, 40, 80, 141)
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["ViT-B-32"])
    parser.add_argument("--batch", type=int, default=4096, help="samples of a device and step")
    parser.add_argument("--check", type=int, help="samples of a step that is really run")
    arguments = parser.parse_args()
    print(describe_machine())
    if arguments.check:
        rows = [checked(name, arguments.check) for name in arguments.models]
        print(ruled_table([["model", "samples", "counted MB", "process MB"], *rows]))
        return
    rows = [row for name in arguments.models for row in fitting(name, arguments.batch)]
    sizes = [f"{size} GB" for size in GIGABYTES]
    print(ruled_table([["model", "checkpointing", "MB a sample", *sizes], *rows]))


def fitting(name: str, batch: int) -> Iterator[list[str]]:
    """Yield rows of what fits, without and with checkpointing of activations."""
    for checkpointing in (False, True):
        clip = load_clip_model(name)
        try:
            if checkpointing:
                enable_grad_checkpointing(clip.model)
        except InputError:  # open_clip has none for this tower
            return
        memory = StepMemory(clip, device=CPU, precision="bf16-mixed", rank_batch=batch)
        each = (memory.at(256) - memory.at(128)) / 128e6
        found = (
            largest_part(batch, memory.at, USED_SHARE * size * 1e9 - RESERVED_BYTES)
            for size in GIGABYTES
        )
        sizes = ["-" if size is None else f"{size:,}" for size in found]
        yield [name, "yes" if checkpointing else "no", f"{each:.1f}", *sizes]


def checked(name: str, samples: int) -> list[str]:
    """Run a step of a few samples, and one of more: what the second adds to the process."""
    clip = load_clip_model(name)
    memory = StepMemory(clip, device=CPU, precision="32-true", rank_batch=samples)
    counted = memory.at(samples) - memory.fixed_bytes
    for parameter in clip.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run_step(clip, 2)
    before = resident_bytes("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the highest so far counts from now on
    run_step(clip, samples)
    taken = resident_bytes("VmHWM") - before
    return [name, str(samples), f"{counted / 1e6:,.0f}", f"{taken / 1e6:,.0f}"]


def run_step(clip: ClipModel, samples: int) -> None:
    model = clip.model
    model.output_dict = True  # type: ignore[assignment]
    images, tokens = blank_samples(model, **input_sizes(clip), samples=samples)
    rows = torch.arange(samples)
    batch = Batch(images=images, tokens=tokens, rows=rows, valid=rows >= 0)
    compute_gradients(model, Objective(loss=SoftmaxLoss()), [batch], StepContext())


def resident_bytes(key: str) -> int:
    with open("/proc/self/status") as file:
        found = re.search(rf"{key}:\s+(\d+)", file.read())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
