"""Checks each loss on 2 and 4 ranks; run by test_ranks.py as a process of its own.

    python losses_on_ranks.py FOLDER

A small network goes through DistributedDataParallel, each rank with its part of one batch. Loss and
gradients averaged over ranks have to be those of one process with the whole batch. In float64, so
that nothing but rounding in the last digits is allowed. The ranks are forked, which costs nothing;
that is why this is no function of a pytest process, whose autograd has threads already.
"""

from __future__ import annotations

import copy
import multiprocessing
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from siftclip.trainer.losses import (
    ContrastiveLoss,
    DistillLoss,
    LossInputs,
    ReferenceGuidedLoss,
    SigLipLoss,
    SoftmaxLoss,
    caption_loss_sum,
    caption_tokens,
    tiles,
)

BATCH = 16
STEPS = 3  # the second and third meet averages of the reference-guided loss
StepFunction = Callable[[nn.Module, dict[str, Tensor], int, int], Tensor]
SELECTED = np.arange(100, 100 + 2 * BATCH)


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    make: Callable[[], ContrastiveLoss]
    weighted: bool = False
    bias: bool = True
    copies: bool = False  # samples are in the batch several times, on other ranks as well
    batch: int = BATCH
    tile: tuple[int, int] = (3, 5)


@dataclass(frozen=True, kw_only=True)
class Step:
    """The samples of a step; `part` takes those of a rank."""

    columns: dict[str, Tensor] = field(default_factory=dict)

    def part(self, rank: int, world_size: int) -> dict[str, Tensor]:
        return {name: value.chunk(world_size)[rank] for name, value in self.columns.items()}


def cases() -> list[Case]:
    def reference(**options: Any) -> Callable[[], ContrastiveLoss]:
        return lambda: ReferenceGuidedLoss(selected_rows=SELECTED, **options)

    both: list[Case] = []
    for weighted in (False, True):
        suffix = ", weighted" if weighted else ""
        both += [
            Case(name=f"softmax{suffix}", make=SoftmaxLoss, weighted=weighted),
            Case(
                name=f"distill{suffix}",
                make=lambda: DistillLoss(20.0, contrastive_weight=0.5, distill_weight=2.0),
                weighted=weighted,
            ),
            Case(name=f"reference{suffix}", make=reference(), weighted=weighted),
            Case(
                name=f"reference with averages{suffix}",
                make=reference(gamma=0.6, epsilon=1e-3, rho=11.0),
                weighted=weighted,
            ),
        ]
    dense = tiles.CPU_TILE
    return [
        *both,
        Case(name="softmax in one tile", make=SoftmaxLoss, tile=dense),
        Case(name="distill in one tile", make=lambda: DistillLoss(20.0), tile=dense),
        Case(name="softmax without bias", make=SoftmaxLoss, bias=False),
        Case(name="softmax, few samples", make=SoftmaxLoss, batch=4),  # one a rank of four
        *(replace(case, name=f"{case.name}, copies", copies=True) for case in both),
        Case(name="siglip, copies", make=SigLipLoss, copies=True),
        *(
            Case(name=f"siglip {dist_impl}", make=lambda d=dist_impl: SigLipLoss(d))
            for dist_impl in ("bidir", "shift", "reduce", "gather")
        ),
    ]


def make_step(case: Case, step: int) -> Step:
    generator = torch.Generator().manual_seed(step)

    def normal(*shape: int) -> Tensor:
        return torch.randn(case.batch, *shape, generator=generator, dtype=torch.float64)

    columns = {
        "images": normal(6),
        "texts": normal(6),
        "teacher_image": F.normalize(normal(3), dim=1),
        "teacher_text": F.normalize(normal(3), dim=1),
        "rows": 100 + torch.randperm(len(SELECTED), generator=generator)[: case.batch],
    }
    if case.copies:
        columns["rows"] = 100 + (columns["rows"] - 100) * 5 // 8
    if case.weighted:
        # The first rank's samples weigh nothing but one, those of the others up to 3.
        columns["weights"] = torch.rand(case.batch, generator=generator).double() * 3
        columns["weights"][1 : case.batch // 4] = 0
    return Step(columns=columns)


class Towers(nn.Module):
    """Features of both towers, logit scale and bias."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.image = nn.Linear(6, 4, bias=False).double()
        self.text = nn.Linear(6, 4, bias=False).double()
        self.logit_scale = nn.Parameter(torch.tensor(2.3, dtype=torch.float64))
        start = torch.tensor(-2.0, dtype=torch.float64)
        self.logit_bias = nn.Parameter(start) if bias else None

    def forward(self, columns: dict[str, Tensor]) -> dict[str, Tensor | None]:
        return {
            "image_features": F.normalize(self.image(columns["images"]), dim=1),
            "text_features": F.normalize(self.text(columns["texts"]), dim=1),
            "logit_scale": self.logit_scale.exp(),
            "logit_bias": self.logit_bias,
        }


@dataclass(frozen=True, kw_only=True)
class ContrastiveStep:
    """A loss outside of the network that DDP wraps, so that DDP keeps its hands off the buffers."""

    objective: ContrastiveLoss
    copies: bool

    def __call__(
        self, network: nn.Module, columns: dict[str, Tensor], rank: int, world_size: int
    ) -> Tensor:
        extra = {name: value for name, value in columns.items() if name not in ("images", "texts")}
        ranks = {"rank": rank, "world_size": world_size}
        inputs = LossInputs(**network(columns), **extra, **ranks, copies=self.copies)
        return torch.stack(list(self.objective(inputs).values())).sum()


def caption_step(
    network: nn.Module, columns: dict[str, Tensor], rank: int, world_size: int
) -> Tensor:
    """CoCa's caption loss in two micro-batches."""
    labels = columns["labels"]
    logits = network(columns["states"])
    factor = world_size / caption_tokens(labels, world_size=world_size)
    sums = [
        caption_loss_sum(*micro_batch)
        for micro_batch in zip(logits.chunk(2), labels.chunk(2), strict=True)
    ]
    return torch.stack(sums).sum() * factor


def make_captions() -> Step:
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(1, 7, (BATCH, 6), generator=generator)
    for sample in range(BATCH):
        labels[sample, 1 + 5 * sample // BATCH :] = 0  # the last rank has the most tokens
    states = torch.randn(BATCH, 6, 5, generator=generator, dtype=torch.float64)
    return Step(columns={"states": states, "labels": labels})


def compare(
    name: str, network: nn.Module, run: StepFunction, steps: list[Step], rank: int, world_size: int
) -> None:
    alone, run_alone = copy.deepcopy((network, run))
    ranks = DistributedDataParallel(network)
    for step in steps:
        alone.zero_grad()
        ranks.zero_grad()
        expected = run_alone(alone, step.columns, 0, 1)
        expected.backward()
        loss = run(ranks, step.part(rank, world_size), rank, world_size)
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        close(mean / world_size, expected.detach(), f"{name}: loss")
        theirs = dict(alone.named_parameters())
        for parameter_name, parameter in network.named_parameters():
            assert parameter.grad is not None
            where = f"{name}: gradient of {parameter_name}"
            close(parameter.grad, theirs[parameter_name].grad, where)
    if isinstance(run, ContrastiveStep) and isinstance(run_alone, ContrastiveStep):
        compare_state(name, run.objective, run_alone.objective, world_size)


def compare_state(name: str, ranks: nn.Module, alone: nn.Module, world_size: int) -> None:
    for (buffer_name, buffer), other in zip(ranks.named_buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=1e-6, atol=0, msg=f"{name}: {buffer_name}")
        if buffer.is_floating_point():
            assert bool((buffer > -torch.inf).sum() > BATCH), name  # more than one step was seen
            everywhere = [torch.empty_like(buffer) for _ in range(world_size)]
            dist.all_gather(everywhere, buffer)
            assert all(torch.equal(one, buffer) for one in everywhere), f"{name}: ranks differ"


def close(found: Tensor, expected: Tensor | None, where: str) -> None:
    # The averages of the reference-guided loss are in float32.
    rtol = 1e-6 if "averages" in where else 1e-10
    torch.testing.assert_close(
        found, expected, rtol=rtol, atol=1e-12, msg=lambda text: f"{where}: {text}"
    )


def run_rank(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{world_size}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    checked = []
    for case in cases():
        tiles.CPU_TILE = case.tile
        steps = [make_step(case, step) for step in range(STEPS)]
        step = ContrastiveStep(objective=case.make(), copies=case.copies)
        compare(case.name, Towers(bias=case.bias), step, steps, rank, world_size)
        checked.append(case.name)
    torch.manual_seed(6)
    head = nn.Linear(5, 7).double()
    compare("caption", head, caption_step, [make_captions()], rank, world_size)
    dist.destroy_process_group()
    if rank == 0:
        print(f"{world_size} ranks: {len(checked) + 1} equal", flush=True)


def main() -> None:
    folder = Path(sys.argv[1])
    fork = multiprocessing.get_context("fork")
    for world_size in (2, 4):
        ranks = [
            fork.Process(target=run_rank, args=(rank, world_size, folder))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            sys.exit(1)


if __name__ == "__main__":
    main()
