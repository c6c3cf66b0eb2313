"""Writes a feature set of any size, for benchmarks of selectors: clusters, mismatched pairs, noise.

    python benchmarks/make_features.py /tmp/bench/features --samples 12800000 --dim 768

The folder gets npz parts with `uids`, `l14_img` and `l14_txt`, float16 and uncompressed as
`siftclip embed` writes them: 39 GB for the command above. Parts that are there are kept.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from siftclip.files import write_npz

CLUSTERS = 1000
PART_SAMPLES = 492_308  # 26 parts of 12.8 million, as DataComp-small has


def make_part(
    samples: int, dim: int, *, seed: int, texts: bool = True
) -> tuple[np.ndarray, Tensor, Tensor]:
    """Uids uint64 [n, 2], image and text features float16 [n, d] of unit norm.

    Images scatter around centres of clusters of very different sizes, with a spectrum that falls as
    that of CLIP's features does, and share a direction. A text is its image turned towards noise by
    an amount that differs from pair to pair, and moved off, as CLIP's two modalities lie apart.
    """
    fixed = torch.Generator().manual_seed(1)
    spectrum = torch.arange(1, dim + 1).float().pow(-0.5)
    spectrum /= spectrum.norm()
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=fixed))[0]
    shared, gap = normalize(torch.randn(2, dim, generator=fixed), dim=1)
    centres = torch.randn(CLUSTERS, dim, generator=fixed) * spectrum
    generator = torch.Generator().manual_seed(seed)
    weights = 1.0 / torch.arange(1, CLUSTERS + 1)
    cluster = torch.multinomial(weights, samples, replacement=True, generator=generator)
    image = torch.randn(samples, dim, generator=generator).mul_(spectrum).mul_(0.6)
    image = normalize((image + centres[cluster]) @ rotation + shared, dim=1)
    text = image[:0]
    if texts:
        share = 0.1 + 0.3 * torch.rand(samples, 1, generator=generator)  # of the image in its text
        text = torch.randn(samples, dim, generator=generator).mul_(spectrum) @ rotation
        text = normalize(share * (image - 0.7 * shared) + 0.5 * text + 0.25 * shared + gap, dim=1)
    uids = np.random.default_rng([3, seed]).integers(0, 2**64, (samples, 2), dtype=np.uint64)
    return uids, image.half(), text.half()


def main() -> None:
    """Write the parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    for number, first in enumerate(range(0, arguments.samples, PART_SAMPLES)):
        path = arguments.folder / f"{number:04d}.npz"
        if path.exists():
            continue
        count = min(PART_SAMPLES, arguments.samples - first)
        uids, image, text = make_part(count, arguments.dim, seed=number)
        write_npz(path, uids=uids, l14_img=image.numpy(), l14_txt=text.numpy())
        print(f"{path.name}  {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
