"""The block sampler alone: drawing a sub-batch jointly, with learner and reference, on the CPU.

    python benchmarks/joint_sampling.py                           # 20,480 samples, one thread
    python benchmarks/joint_sampling.py --super-batch 163840 --rounds 1 --ours

`of plain` is the time of the float32 products alone, tile by tile and with nothing else, as a share
of the sampler's time; the two take turns. GFLOP/s counts products alone. The features are random
unit vectors of clustered samples, and scale and bias those of trained models.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from common import alternate, describe_machine
from make_features import make_part
from torch import Tensor

from siftclip.selectors.core.source import Logits
from siftclip.selectors.core.sub_batch import SubBatch
from siftclip.selectors.kernels.pair_log_sums import CPU_TILE
from siftclip.selectors.methods.jest.joint_sampling import Judge, chunk_sizes, joint_sample
from siftclip.selectors.methods.jest.pair_losses import LOSSES

LOGITS = {"sigmoid": Logits(scale=100.0, bias=-10.0), "softmax": Logits(scale=100.0)}


def products(judges: list[Judge], samples: int, chunks: int) -> None:
    """The products of the sampler, without what it does with them."""
    for judge in judges:
        image, text = judge.image.float(), judge.text.float()
        for size in chunk_sizes(samples, chunks)[:-1]:
            for left, right in ((image, text[:size]), (text, image[:size])):
                multiply(left, right)


def multiply(left: Tensor, right: Tensor) -> None:
    """left @ right.T in tiles of the shape that the sampler takes."""
    height = max(CPU_TILE, CPU_TILE**2 // len(right))
    width = max(CPU_TILE, CPU_TILE**2 // len(left))
    for rows in left.split(height):
        for columns in right.split(width):
            torch.mm(rows, columns.T)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--super-batch", type=int, default=20_480)
    parser.add_argument("--filter-ratio", type=float, default=0.8)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--losses", nargs="*", default=[*LOSSES])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ours", action="store_true", help="leave the plain products out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    candidates = options.super_batch
    samples = round(candidates * (1 - options.filter_ratio) / options.groups)
    uids, image, text = make_part(candidates, options.dim, seed=0)
    _, other_image, other_text = make_part(candidates, options.dim, seed=0)
    other_image = other_image.flip(1)  # other features of as good a model
    other_text = other_text.flip(1)
    usable = torch.ones(candidates, dtype=torch.bool)
    sub_batch = SubBatch(samples=samples, groups=options.groups)
    added = sum(chunk_sizes(samples, options.chunks)[:-1]) * options.groups
    flop = 8 * candidates * added * options.dim  # two directions of two models
    print(
        f"{describe_machine()}; {options.threads} thread(s); {candidates:,} candidates, of which "
        f"{samples * options.groups:,} in {options.chunks} chunks; dim {options.dim}; medians of "
        f"{options.rounds}\n\n"
        "| loss | s | us a candidate | GFLOP/s | of plain |\n|---|---|---|---|---|"
    )
    for loss in options.losses:
        judges = [
            Judge(image=image, text=text, logits=LOGITS[loss], sign=1.0),
            Judge(image=other_image, text=other_text, logits=LOGITS[loss], sign=-1.0),
        ]

        def sampler(loss: str = loss, judges: list[Judge] = judges) -> int:
            joint_sample(
                judges, usable, uids, sub_batch, losses=LOSSES[loss], chunks=options.chunks
            )
            return candidates

        def plain(judges: list[Judge] = judges) -> int:
            products(judges, samples * options.groups, options.chunks)
            return candidates

        sides = {"sampler": sampler} if options.ours else {"sampler": sampler, "plain": plain}
        median = {
            name: statistics.median(values)
            for name, values in alternate(sides, options.rounds).items()
        }
        ours = median["sampler"]
        share = "-" if options.ours else f"{100 * median['plain'] / ours:.0f} %"
        print(
            f"| {loss} | {ours * candidates:.2f} | {1e6 * ours:.1f} "
            f"| {flop / (ours * candidates) / 1e9:.0f} | {share} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
