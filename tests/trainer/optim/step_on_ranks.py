"""The gradients of a CoCa on 2 ranks; run by test_gradients.py as a process of its own.

    python step_on_ranks.py FOLDER

Each rank has half of a batch, and captions of other lengths. Loss and gradients, averaged over the
ranks as DDP does, are those of one process with the whole batch.
"""

from __future__ import annotations

import multiprocessing
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from test_gradients import coca, gradients, make_batch, split

from siftclip.trainer.losses import CocaLoss
from siftclip.trainer.optim.gradients import Objective

RANKS = 2


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/group",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    model, objective = coca(), Objective(loss=CocaLoss(caption_weight=2.0))
    cases = 0
    for weighted in (False, True):
        batch = make_batch(model, weights=weighted)
        expected_terms, expected = gradients(model, objective, [batch])
        mine = split(batch, RANKS)[rank]
        for parts in (1, 3):
            terms, found = gradients(
                model, objective, split(mine, parts), rank=rank, world_size=RANKS
            )
            for name, value in [*terms.items(), *found.items()]:
                dist.all_reduce(value)
                torch.testing.assert_close(
                    value / RANKS,
                    {**expected_terms, **expected}[name],
                    rtol=1e-6,
                    atol=1e-9,
                    msg=lambda text, case=(weighted, parts, name): f"{case}: {text}",
                )
            cases += 1
    dist.destroy_process_group()
    if rank == 0:
        print(f"{cases} cases equal", flush=True)


def main() -> None:
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run_rank, args=(rank, Path(sys.argv[1]))) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    main()
