"""Memory and time of a forward and backward of a loss, ours and open_clip's.

Each side runs in a process of its own, in turns, so that its peak is its own: the resident set at
its highest minus that before the step, features and their gradients included. A side that would
take more than --limit-gib is not run; its size by arithmetic is printed instead.

python benchmarks/loss_memory.py --batch 8192
python benchmarks/loss_memory.py --batch 32768 --rounds 1
python benchmarks/loss_memory.py --batch 32768 --device cuda --loss siglip
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import describe_machine
from open_clip.loss import ClipLoss, SigLipLoss

from siftclip.trainer import losses
from siftclip.trainer.losses import LossInputs, SoftmaxLoss

SIDES = ("siftclip", "open_clip")
LOSSES = ("softmax", "siglip")
BIAS = -10.0  # of the sigmoid loss's logits
# Logits of both directions and their log-softmaxes; the backward frees one where it makes one.
DENSE_MATRICES = 4
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def loss_of(side: str, name: str) -> Loss:
    """The loss of a side as a function of image features, text features and logit scale."""
    is_sigmoid = name == "siglip"
    if side == "open_clip":
        if is_sigmoid:
            theirs = SigLipLoss()
            return lambda image, text, scale: theirs(image, text, scale, BIAS)
        return ClipLoss(local_loss=True, gather_with_grad=True)
    objective = losses.SigLipLoss() if is_sigmoid else SoftmaxLoss()

    def siftclip(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        bias = scale.new_tensor(BIAS) if is_sigmoid else None
        inputs = LossInputs(
            image_features=image, text_features=text, logit_scale=scale, logit_bias=bias
        )
        return objective(inputs)["contrastive_loss"]

    return siftclip


def predicted_bytes(side: str, batch: int, dim: int) -> int:
    """What a side holds at its peak: a few times the features, and open_clip its matrices."""
    features = 8 * 4 * batch * dim
    return features + (DENSE_MATRICES * 4 * batch**2 if side == "open_clip" else 0)


def resident_bytes(field: str) -> int:
    """VmRSS, the memory of this process now, or VmHWM, its highest since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def forget_peak() -> None:
    """Let VmHWM start from now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(side: str, options: argparse.Namespace) -> dict[str, object]:
    """Peak memory and seconds of each repeat, after one that is not timed."""
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    loss = loss_of(side, options.loss)

    def leaves(batch: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        image, text = (
            F.normalize(torch.randn(batch, options.dim, generator=generator), dim=1).to(device)
            for _ in range(2)
        )
        return [x.requires_grad_() for x in (image, text, torch.tensor(50.0, device=device))]

    def step(tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            tensor.grad = None
        loss(*tensors).backward()

    step(leaves(64))  # loads what the first call loads
    if device.type == "cpu":
        before = resident_bytes("VmRSS")
        forget_peak()
        limit = resident_bytes("VmSize") + int(options.limit_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    else:
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    tensors = leaves(options.batch)
    seconds = [time_step(lambda: step(tensors), device) for _ in range(1 + options.repeats)]
    if device.type == "cpu":
        peak = resident_bytes("VmHWM")
    else:
        peak = torch.cuda.max_memory_allocated(device)
    return {"bytes": peak - before, "seconds": seconds[1:] if options.repeats else seconds}


def time_step(step: Callable[[], None], device: torch.device) -> float:
    """Seconds, by events where the work is done on another device."""
    if device.type == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def run_side(side: str, options: argparse.Namespace) -> dict[str, object] | None:
    """`measure` in a new process; None where the memory did not suffice."""
    command = [sys.executable, __file__, "--side", side]
    for name in ("batch", "dim", "threads", "repeats", "device", "limit_gib", "loss"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        print(result.stderr.strip().splitlines()[-1], file=sys.stderr)
        return None
    return json.loads(result.stdout)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--loss", choices=LOSSES, default="softmax")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="processes a side")
    parser.add_argument("--repeats", type=int, default=2, help="timed steps of a process")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--limit-gib", type=float, default=12.0, help="a side may take so much")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is not None:
        print(json.dumps(measure(options.side, options)))
        return
    results: dict[str, list[dict]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side in SIDES:
            if predicted_bytes(side, options.batch, options.dim) <= options.limit_gib * 2**30:
                found = run_side(side, options)
                if found is not None:
                    results[side].append(found)
    print(f"{describe_machine()}; {options.device}, {options.threads} threads, ", end="")
    print(f"{options.loss}, batch {options.batch}, dim {options.dim}\n")
    print("| | peak MiB | seconds, median | seconds, best |\n|---|---|---|---|")
    for side, found in results.items():
        if found:
            seconds = [value for one in found for value in one["seconds"]]
            peak = max(one["bytes"] for one in found) / 2**20
            median = statistics.median(seconds)
            print(f"| {side} | {peak:,.0f} | {median:.3f} | {min(seconds):.3f} |")
        else:
            size = predicted_bytes(side, options.batch, options.dim) / 2**20
            print(f"| {side} | {size:,.0f} by arithmetic, not run | | |")


if __name__ == "__main__":
    main()
