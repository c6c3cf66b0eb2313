"""Items `resume` and `distributed`: runs that are stopped, and what several devices exchange."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from gpu_checks.harness import Facts, Setup, require
from gpu_checks.pools import Command, accelerator, demo_pool
from siftclip.datamodules.models.load import load_clip_model
from siftclip.files import read_jsonl
from siftclip.ranks import ProcessGroup
from siftclip.trainer.losses import collectives

STOPPED = 143  # the exit status after SIGTERM, with a checkpoint
CLOSE = 1e-3  # of two runs whose sums have no fixed order
LIKE = 0.05  # of losses in bf16, computed in other ways


def resume(setup: Setup, facts: Facts) -> None:
    """Stop a run by SIGTERM, let the same command continue it, and compare with one unbroken."""
    steps = setup.size(100, 30)
    words = [
        *_options(setup),
        f"scale.samples_seen={16 * steps}",
        "trainer.checkpoint_every_n_steps=10",
    ]
    words.append("trainer.precision=32-true")
    for name in ("whole", "again"):
        Command(setup, name, *words, f"output_dir={setup.work / name}").finish()
    words.append(f"output_dir={setup.work / 'cut'}")
    command = Command(setup, "stopped", *words)
    while command.process.is_alive() and not _found(setup, "cut", "*/checkpoints/*.ckpt"):
        time.sleep(0.02)
    command.process.terminate()
    command.process.join()
    facts["status after SIGTERM"] = command.process.exitcode
    require(
        command.process.exitcode in (STOPPED, -signal.SIGTERM),
        f"ended with {command.process.exitcode}: {command.text[-300:]}",
    )
    Command(setup, "continued", *words).finish()
    whole, again, cut = (_weights(setup, name) for name in ("whole", "again", "cut"))
    unbroken, difference = (float((other - whole).norm() / whole.norm()) for other in (again, cut))
    facts["unbroken runs differ by"] = unbroken
    facts["weights equal to the bit"] = torch.equal(cut, whole)
    facts["weights differ by"] = difference
    facts["steps"] = found = len(_losses(setup, "cut"))
    require(found == steps, f"{found} steps of {steps} are logged")
    limit = max(CLOSE, 5 * unbroken) if setup.on_gpu else 0.0
    require(difference <= limit, f"weights differ by {difference:.1e}, and may by {limit:.1e}")


def distributed(setup: Setup, facts: Facts) -> None:
    """Run each collective in a group of one, and train with FSDP2 in bf16."""
    words = [*_options(setup), "scale.samples_seen=160", "trainer.precision=bf16-mixed"]
    for strategy in ("auto", "fsdp"):
        folder = f"output_dir={setup.work / strategy}"
        Command(setup, strategy, *words, f"trainer.strategy={strategy}", folder).finish()
    plain, sharded = _losses(setup, "auto"), _losses(setup, "fsdp")
    difference = max(abs(a - b) / abs(a) for a, b in zip(plain, sharded, strict=True))
    facts["FSDP2 losses differ by"] = difference
    require(difference < LIKE, f"FSDP2 learns otherwise: {sharded}, and {plain}")
    facts["backend"] = "nccl" if setup.on_gpu else "gloo"
    if setup.on_gpu:
        torch.cuda.set_device(0)
    store = dist.HashStore()
    group = {"device_id": torch.device("cuda", 0)} if setup.on_gpu else {}
    dist.init_process_group(
        "nccl" if setup.on_gpu else "gloo", store=store, rank=0, world_size=1, **group
    )
    try:
        facts["collectives"] = _collectives(setup)
    finally:
        dist.destroy_process_group()


def _collectives(setup: Setup) -> int:
    """How many exchanges were right."""
    ranks, count = ProcessGroup(setup.device), 0
    for dtype in (torch.int32, torch.int64, torch.float32, torch.float64):
        ones = torch.ones(3, dtype=dtype)
        require(torch.equal(ranks.sum(ones).cpu(), ones), f"the sum of {dtype}")
        count += 1
    values = torch.randn(8, 4, device=setup.device, requires_grad=True)
    gathered = collectives.gather_features(values, rank=0, world_size=1)
    gathered.square().sum().backward()  # type: ignore[no-untyped-call]
    require(torch.equal(gathered, values), "gathered features")
    require(values.grad is not None and torch.equal(values.grad, 2 * values), "their gradients")
    everything = [torch.empty_like(values)]
    dist.all_gather(everything, values.detach())
    require(torch.equal(everything[0], values), "all_gather")
    part = torch.empty(8, 4, device=setup.device)
    dist.reduce_scatter_tensor(part, values.detach().contiguous())
    require(torch.equal(part, values), "reduce_scatter")
    texts = [{"rank": 0}]
    dist.broadcast_object_list(texts)
    ranks.barrier()
    return count + 5


def _options(setup: Setup) -> list[str]:
    """Of a small run that logs each step."""
    data = demo_pool(setup)
    return [
        "train",
        "model=vit_tiny",
        "scale.global_batch_size=16",
        "optim.warmup_steps=2",
        "logger=csv",
        "progress=false",
        f"data.num_workers={setup.size(2, 1)}",
        "trainer.log_every_n_steps=1",
        "trainer.devices=1",
        accelerator(setup),
        f"pool.root={data.pool}",
        f"pool.cache_dir={setup.work / 'cache'}",
        "selector=random",
        "selector.fraction=1",
    ]


def _found(setup: Setup, name: str, pattern: str) -> list[Path]:
    return sorted((setup.work / name / "train").glob(pattern))


def _losses(setup: Setup, name: str) -> list[float]:
    (log,) = _found(setup, name, "*/metrics.jsonl")
    return [record["train/loss"] for record in read_jsonl(log) if "train/loss" in record]


def _weights(setup: Setup, name: str) -> Tensor:
    (folder,) = _found(setup, name, "*")
    state = load_clip_model(str(folder)).model.state_dict()
    return torch.cat([value.flatten().double() for value in state.values()])
