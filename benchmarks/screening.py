"""The selection by negCLIPLoss with 8-bit products first, and in float32 alone.

    python benchmarks/screening.py [--samples 50000]

On features like those of a pool, where the first way leaves few samples open, and on random ones,
of which it would leave nearly all open: it looks at some samples first, and computes in float32 if
so. `always` does not look. The sides take turns in one process; medians and ratios of wall time.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from common import alternate, describe_machine, table
from make_features import make_part
from torch import Tensor
from torch.nn.functional import normalize

from siftclip.selectors.core.base import Chunk
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.kernels.hardware import int8_is_fast
from siftclip.selectors.methods.negcliploss import screening
from siftclip.selectors.methods.negcliploss.negcliploss import NegCLIPLoss


def random_part(samples: int, dim: int) -> tuple[np.ndarray, Tensor, Tensor]:
    """Uids and features as of make_part, without anything in common."""
    generator = torch.Generator().manual_seed(0)
    image, text = (
        normalize(torch.randn(samples, dim, generator=generator), dim=1).half() for _ in range(2)
    )
    return np.random.default_rng(0).integers(0, 2**64, (samples, 2), dtype=np.uint64), image, text


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not int8_is_fast():
        parser.error("this processor has no 8-bit products (VNNI): all sides would be float32")
    torch.set_num_threads(1)
    print(f"{describe_machine()}; one thread; {options.samples:,} samples, {options.dim} numbers")
    looks_from = screening.PROBE_FROM
    parts = {
        "like those of a pool": make_part(options.samples, options.dim, seed=0),
        "random": random_part(options.samples, options.dim),
    }
    for name, (uids, image, text) in parts.items():
        chunk = Chunk(
            rows=np.arange(options.samples),
            uids=uids,
            features={"l14_img": image, "l14_txt": text},
        )
        recomputed = 0

        def side(precision: str, looks: bool, chunk: Chunk = chunk) -> int:
            nonlocal recomputed
            screening.PROBE_FROM = looks_from if looks else 1 << 62
            selector = NegCLIPLoss(
                features="l14", batch_size=8192, passes=1, fraction=0.3, precision=precision
            )
            selector.select(MemorySource(chunk))
            recomputed = selector.recomputed_samples
            return len(chunk.rows)

        sides = {
            "float32": lambda: side("float32", looks=True),
            "8 bits first": lambda: side("screened", looks=True),
            "8 bits first, always": lambda: side("screened", looks=False),
        }
        seconds = alternate(sides, options.rounds)
        print(f"\nFeatures {name}; {recomputed:,} samples left open by the last side\n")
        print(table(seconds, "float32"))


if __name__ == "__main__":
    main()
