"""Memory and time of the gradients of one batch: at once, checkpointed, in micro-batches.

Each way runs in a process of its own; its peak is the highest resident set (on a GPU: allocated
memory) minus what model and batch took before.

python benchmarks/large_batch.py --model ViT-B-32 --batch 64 --micro-batch 8
python benchmarks/large_batch.py --model ViT-B-32 --batch 4096 --micro-batch 256 --device cuda
"""

import argparse
import json
import subprocess
import sys
import time

import torch
from common import describe_machine
from loss_memory import forget_peak, resident_bytes

from siftclip.datamodules.models.load import load_clip_model
from siftclip.datamodules.streaming.batches import Batch
from siftclip.trainer.losses import SoftmaxLoss
from siftclip.trainer.models.towers import enable_grad_checkpointing
from siftclip.trainer.optim.gradients import Objective, StepContext, compute_gradients

WAYS = ("at once", "checkpointed", "micro-batches", "both")


def measure(way: str, options: argparse.Namespace) -> dict[str, float]:
    """Peak in bytes, seconds, and the gradient of the logit scale."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    clip = load_clip_model(options.model)
    model = clip.model.train().to(device)
    model.output_dict = True  # type: ignore[assignment]
    if way in ("checkpointed", "both"):
        enable_grad_checkpointing(model)
    size = clip.config["preprocess_cfg"]["size"]
    side = size[0] if isinstance(size, (list, tuple)) else size
    part = options.micro_batch if way in ("micro-batches", "both") else options.batch
    images = torch.randn(options.batch, 3, side, side)
    tokens = clip.tokenizer([f"sample number {number}" for number in range(options.batch)])
    batches = [
        Batch(
            images=images[start : start + part],
            tokens=tokens[start : start + part],
            rows=torch.arange(part),
            valid=torch.ones(part, dtype=torch.bool),
        ).to(device)
        for start in range(0, options.batch, part)
    ]
    objective, context = Objective(loss=SoftmaxLoss()), StepContext()
    compute_gradients(model, objective, batches, context)  # the gradients themselves are there now
    model.zero_grad(set_to_none=False)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()
    before = torch.cuda.memory_allocated() if on_gpu else resident_bytes("VmRSS")
    start_time = time.perf_counter()
    compute_gradients(model, objective, batches, context)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start_time
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident_bytes("VmHWM")
    return {"bytes": peak - before, "seconds": seconds, "scale": float(model.logit_scale.grad)}  # type: ignore[arg-type]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.way is not None:
        print(json.dumps(measure(options.way, options)))
        return
    print(describe_machine(), f"; {options.model}, batch {options.batch}\n")
    print(
        "| | MiB above model and gradients | seconds | logit scale's gradient |\n|---|---|---|---|"
    )
    for way in WAYS:
        command = [sys.executable, *sys.argv, "--way", way]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(result.stdout.splitlines()[-1])
        print(
            f"| {way} | {found['bytes'] / 2**20:,.0f} | {found['seconds']:.2f} "
            f"| {found['scale']:.6f} |"
        )


if __name__ == "__main__":
    main()
