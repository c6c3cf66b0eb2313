"""Selectors beside the same formulas written straight in torch (plain_selectors.py).

    python benchmarks/selector_speed.py                           # 100,000 samples, one thread
    python benchmarks/selector_speed.py --samples 1000000 --ours  # how ours scales
    python benchmarks/selector_speed.py --threads 2 negcliploss vas

Every measurement has a process of its own; the sides take turns. `CPU us` is CPU time a sample,
`added MiB` the peak of memory beyond the features, `differ` how many rows are in one selection
alone. `of peak` is the formula's floating-point operations over the CPU time, as a share of what a
float32 product reaches in the same process: more than 100 % means that ours does not need them all,
or has done them in fewer bits.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plain_selectors as plain
import torch
from common import describe_machine
from make_features import make_part
from torch import Tensor

from siftclip.selectors.core.base import Chunk, Selector
from siftclip.selectors.core.compose import Then
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.rules import keep_top
from siftclip.selectors.core.source import FeatureFile
from siftclip.selectors.fitting.clusters import GivenCentroids
from siftclip.selectors.methods.clip_score import ClipScore
from siftclip.selectors.methods.clipcov.clipcov import ClipCov
from siftclip.selectors.methods.image_based import ImageBased
from siftclip.selectors.methods.negcliploss.negcliploss import NegCLIPLoss, block_order
from siftclip.selectors.methods.normsim import NormSim
from siftclip.selectors.methods.removal.vas_d import NormSimD, VasD
from siftclip.selectors.methods.semdedup import SemDeDup
from siftclip.selectors.methods.vas import Vas

TARGETS, LABELS, CENTROIDS = 20_000, 1_000, 10_000
BATCH, TEMPERATURE, STEPS = 8192, 0.01, 100
IMAGES = FeatureFile(path="target")
NAMES = FeatureFile(path="names")
CENTRES = FeatureFile(path="centroids")


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What a measurement works on."""

    uids: np.ndarray
    image: Tensor
    text: Tensor
    target: Tensor
    labels: Tensor
    centroids: Tensor

    def top(self, scores: Tensor, fraction: float) -> np.ndarray:
        """The rows that a fraction keeps."""
        count = int(len(self.uids) * fraction)
        return np.flatnonzero(keep_top(scores.numpy(), self.uids, count))


def make_data(
    samples: int, dim: int, *, targets: int = TARGETS, centroids: int = CENTROIDS
) -> Data:
    """Features of a pool, of a target's images, of class names, and centroids."""
    uids, image, text = make_part(samples, dim, seed=0)
    _, target, names = make_part(targets, dim, seed=1)
    _, centres, _ = make_part(centroids, dim, seed=2, texts=False)
    return Data(
        uids=uids, image=image, text=text, target=target, labels=names[:LABELS], centroids=centres
    )


# ---- the plain sides: rows that are kept ---------------------------------------------------------
def plain_negcliploss(data: Data) -> np.ndarray:
    order = torch.from_numpy(block_order(data.uids, 0, 0))
    blocks = list(order.split(BATCH))
    return data.top(plain.negcliploss(data.image, data.text, TEMPERATURE, blocks), 0.3)


def plain_vas(data: Data) -> np.ndarray:
    target = data.target.float()
    return data.top(plain.vas(data.image, target.T @ target / len(target)), 0.3)


def plain_vas_d(data: Data) -> np.ndarray:
    left = data.top(plain.clip_score(data.image, data.text), 0.45)
    return plain.dynamic(data.image, left, int(0.3 * len(data.uids)), STEPS)


def plain_normsim_d(data: Data) -> np.ndarray:
    left = data.top(plain.clip_score(data.image, data.text), 0.3)
    drawn = normsim_d().drawn

    def sample(step: int, rows: np.ndarray) -> np.ndarray:
        return rows[drawn(rows, data.uids[rows], step)]

    return plain.dynamic(data.image, left, int(0.2 * len(data.uids)), STEPS, sample)


def plain_clipcov(data: Data) -> np.ndarray:
    labels, image = data.labels.float(), data.image.float()
    classes = (image @ labels.T).argmax(1).numpy()
    centres = torch.zeros(2, LABELS, image.shape[1])
    index = torch.from_numpy(classes)
    counts = index.bincount(minlength=LABELS)
    for centre, values in zip(centres, (image, data.text.float()), strict=True):
        centre.index_add_(0, index, values)
        centre /= counts.clamp(min=1)[:, None]
    # the mean over the centres of the other classes that have members
    others = int((counts > 0).sum()) - 1
    between = torch.zeros(len(image))
    for centre, values in zip(centres.flip(0), (image, data.text.float()), strict=True):
        products = values @ centre.T
        between += (products.sum(1) - products.gather(1, index[:, None])[:, 0]) / others
    budget = int(0.1 * len(image))
    picks = plain.clipcov(data.image, data.text, labels, classes, between.numpy(), budget)
    return np.sort(np.asarray(picks))


def plain_image_based(data: Data) -> np.ndarray:
    centroids = data.centroids.float()
    near = torch.cat([(b.float() @ centroids.T).argmax(1) for b in data.target.split(1024)])
    kept = torch.zeros(len(centroids), dtype=torch.bool)
    kept[near] = True
    mine = torch.cat([(b.float() @ centroids.T).argmax(1) for b in data.image.split(1024)])
    return np.flatnonzero(kept[mine].numpy())


def plain_semdedup(data: Data) -> np.ndarray:
    image, centres = data.image.float(), data.centroids[:LABELS].float()
    products = image @ centres.T
    similarity, cluster = products.max(1)
    largest = torch.zeros(len(image))
    for number in range(LABELS):
        rows = (cluster == number).nonzero()[:, 0]
        # hard ones first: farthest from the centroid; of equals, the smaller uid
        uids = data.uids[rows.numpy()]
        rows = rows[np.lexsort((uids[:, 1], uids[:, 0], similarity[rows].numpy()))]
        matrix = image[rows] @ image[rows].T
        if len(rows):
            largest[rows] = matrix.triu(1).amax(0)
    return np.flatnonzero((largest <= 1 - 0.2).numpy())


# ---- both sides ----------------------------------------------------------------------------------
def normsim_d() -> NormSimD:
    return NormSimD(features="l14", fraction=0.2, steps=STEPS, seed=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """Ours, the plain side, and the operations a sample of the formula that dominates it."""

    ours: Callable[[], Selector]
    plain: Callable[[Data], np.ndarray]
    flop: Callable[[int, int], float] | None = None  # of (samples, dim)


METHODS = {
    "clip_score": Method(
        ours=lambda: ClipScore(features="l14", fraction=0.3),
        plain=lambda data: data.top(plain.clip_score(data.image, data.text), 0.3),
    ),
    "negcliploss": Method(
        ours=lambda: NegCLIPLoss(features="l14", batch_size=BATCH, passes=1, fraction=0.3),
        plain=plain_negcliploss,
        flop=lambda n, d: 2 * n * BATCH * d,
    ),
    "vas": Method(
        ours=lambda: Vas(features="l14", target=IMAGES, fraction=0.3),
        plain=plain_vas,
        flop=lambda n, d: 2 * (n + TARGETS) * d * d,
    ),
    "normsim_2": Method(
        ours=lambda: NormSim(features="l14", target=IMAGES, p=2, fraction=0.3),
        plain=lambda data: data.top(plain.normsim(data.image, data.target, 2), 0.3),
        flop=lambda n, d: 2 * (n + TARGETS) * d * d,
    ),
    "normsim_inf": Method(
        ours=lambda: NormSim(features="l14", target=IMAGES, p=float("inf"), fraction=0.3),
        plain=lambda data: data.top(plain.normsim(data.image, data.target, float("inf")), 0.3),
        flop=lambda n, d: 2 * n * TARGETS * d,
    ),
    "vas_d": Method(
        ours=lambda: Then(
            stages=[
                ClipScore(features="l14", fraction=0.45),
                VasD(features="l14", fraction=0.3, steps=STEPS),
            ]
        ),
        plain=plain_vas_d,
    ),
    "normsim_d": Method(
        ours=lambda: Then(stages=[ClipScore(features="l14", fraction=0.3), normsim_d()]),
        plain=plain_normsim_d,
    ),
    "clipcov": Method(
        ours=lambda: ClipCov(features="l14", fraction=0.1, labels=NAMES),
        plain=plain_clipcov,
    ),
    "image_based": Method(
        ours=lambda: ImageBased(
            features="l14", target=IMAGES, clustering=GivenCentroids(file=CENTRES)
        ),
        plain=plain_image_based,
        flop=lambda n, d: 2 * (n + TARGETS) * CENTROIDS * d,
    ),
    "semdedup": Method(
        ours=lambda: SemDeDup(
            key="l14_img",
            clustering=GivenCentroids(file=FeatureFile(path="few")),
            eps=0.2,
        ),
        plain=plain_semdedup,
    ),
}


@torch.no_grad()
def kept_rows(method: str, side: str, data: Data) -> np.ndarray:
    """What one side of a method keeps."""
    if side == "plain":
        return METHODS[method].plain(data)
    chunk = Chunk(
        rows=np.arange(len(data.uids)),
        uids=data.uids,
        features={"l14_img": data.image, "l14_txt": data.text},
    )
    files = {
        IMAGES: data.target,
        NAMES: data.labels,
        CENTRES: data.centroids,
        FeatureFile(path="few"): data.centroids[:LABELS],
    }
    selector = METHODS[method].ours()
    return np.flatnonzero(selector.select(MemorySource(chunk, files=files)).multiplicities)


def measure(method: str, side: str, samples: int, dim: int, threads: int, connection: Any) -> None:
    """Run one side and send what it took and what it kept."""
    torch.set_num_threads(threads)
    data = make_data(samples, dim)
    left, right = torch.randn(2, 2048, dim)
    peak = 0.0
    for _ in range(5):
        start = time.process_time()
        left @ right.T
        peak = max(peak, 2 * 2048**2 * dim / (time.process_time() - start))
    before = memory_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    start, cpu_start = time.perf_counter(), time.process_time()
    kept = kept_rows(method, side, data)
    connection.send(
        {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu_start,
            "added_mib": memory_mib("VmHWM") - before,
            "gemm_flops": peak,
            "kept": kept,
        }
    )


def memory_mib(name: str) -> float:
    """A line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def run(method: str, side: str, samples: int, dim: int, threads: int) -> dict[str, Any]:
    """One measurement in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=measure, args=(method, side, samples, dim, threads, theirs))
    child.start()
    theirs.close()
    try:
        answer: dict[str, Any] = ours.recv()
    except EOFError:
        raise SystemExit(f"{method}, {side}: the process ended without an answer") from None
    child.join()
    return answer


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", default=[*METHODS])
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ours", action="store_true", help="leave the plain side out")
    options = parser.parse_args()
    sides = ("ours",) if options.ours else ("ours", "plain")
    print(
        f"{describe_machine()}; {options.samples:,} samples of dim {options.dim}, "
        f"{options.threads} thread(s), medians of {options.rounds}\n"
    )
    print(
        "| method | ours CPU us | plain CPU us | times as fast | ours s | samples/s | of peak "
        "| ours added MiB | plain added MiB | kept | differ |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|"
    )
    for name in options.methods:
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(options.rounds):
            for side in sides:
                found[side].append(run(name, side, options.samples, options.dim, options.threads))
        print(row(name, found, options.samples, options.dim), flush=True)


def row(name: str, found: dict[str, list[dict[str, Any]]], samples: int, dim: int) -> str:
    """A line of the table."""

    def median(side: str, key: str) -> float:
        return statistics.median(float(answer[key]) for answer in found[side])

    cpu, seconds = median("ours", "cpu_seconds"), median("ours", "seconds")
    flop = METHODS[name].flop
    share = (
        f"{100 * flop(samples, dim) / cpu / median('ours', 'gemm_flops'):.0f} %" if flop else "-"
    )
    kept = found["ours"][0]["kept"]
    cells = [name, f"{1e6 * cpu / samples:.2f}"]
    if "plain" in found:
        theirs = median("plain", "cpu_seconds")
        cells += [f"{1e6 * theirs / samples:.2f}", f"{theirs / cpu:.1f}"]
    else:
        cells += ["-", "-"]
    cells += [f"{seconds:.2f}", f"{samples / seconds:,.0f}", share]
    cells.append(f"{median('ours', 'added_mib'):.0f}")
    if "plain" in found:
        differ = np.setxor1d(kept, found["plain"][0]["kept"])
        cells += [f"{median('plain', 'added_mib'):.0f}", f"{len(kept):,}", f"{len(differ)}"]
    else:
        cells += ["-", f"{len(kept):,}", "-"]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
