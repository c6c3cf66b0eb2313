"""What limits training on 1, 8 and 64 GPUs: a model of cost, checked against published throughput.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --model ViT-L-14 --gpu A100 --decode-us 1280 --cores 8
    python benchmarks/scaling.py --drawn 5 --scoring 0.25  # a fifth is trained on

Nothing here was measured on a GPU: the share of the peak that a GPU reaches is assumed (`--mfu`),
and so are the rates of links. Seconds of a loader process are those of `decode.py` and
`handing_over.py`. A step computes, exchanges features, and averages gradients while the backward
pass is under way; loading and copying happen beside it, so that the slowest of the three decides.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from siftclip.trainer.bench.feeding import PEAK_FLOPS, REACHED

BACKWARD = 2 / 3  # of the FLOPs of training, under which gradients are exchanged
FLOAT32 = 4  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model of open_clip, as its `docs/model_profile.csv` describes it."""

    forward_flops: float  # of a sample
    parameters: float
    width: int  # of the features
    pixels: int = 3 * 224 * 224


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU with its links, each in one direction."""

    peak_flops: float  # dense bf16
    host_bytes: float  # per second, from page-locked memory
    near_bytes: float  # per second, within a node of 8
    far_bytes: float  # per second, between nodes


MODELS = {
    "ViT-B-32": Model(forward_flops=14.78e9, parameters=151.3e6, width=512),
    "ViT-B-16": Model(forward_flops=41.09e9, parameters=149.6e6, width=512),
    "ViT-L-14": Model(forward_flops=175.3e9, parameters=427.6e6, width=768),
    "ViT-H-14": Model(forward_flops=381.7e9, parameters=986.1e6, width=1024),
    "ViT-g-14": Model(forward_flops=581.2e9, parameters=1366.7e6, width=1024),
}
GPUS = {
    "A100": Gpu(peak_flops=PEAK_FLOPS["A100"], host_bytes=25e9, near_bytes=240e9, far_bytes=20e9),
    "H100": Gpu(peak_flops=PEAK_FLOPS["H100"], host_bytes=50e9, near_bytes=360e9, far_bytes=40e9),
    "H200": Gpu(peak_flops=PEAK_FLOPS["H200"], host_bytes=50e9, near_bytes=360e9, far_bytes=40e9),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How a run is made, on each GPU."""

    batch: int  # trained samples
    cores: int  # that load
    decode_seconds: float  # of a core, for a sample
    mfu: float  # share of the peak that training reaches
    drawn: float = 1.0  # samples that are read for each that is trained on
    scoring: float = 1.0  # FLOPs of scoring a sample, as a share of a forward pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Trained samples per second and GPU that each part alone would allow."""

    loading: float
    copying: float
    computing: float
    device: float  # computing with what it waits for

    @property
    def rate(self) -> float:
        return min(self.loading, self.copying, self.device)

    @property
    def limit(self) -> str:
        if self.rate == self.loading:
            return "loading"
        if self.rate == self.copying:
            return "copying"
        return "computing" if self.device > 0.9 * self.computing else "exchange"


def limits(model: Model, gpu: Gpu, run: Run, gpus: int) -> Limits:
    """Compute what each part allows on so many GPUs, of which 8 are in a node."""
    link = gpu.near_bytes if gpus <= 8 else gpu.far_bytes
    scored = model.forward_flops * run.scoring * run.drawn if run.drawn > 1 else 0.0
    training = 3 * model.forward_flops / (run.mfu * gpu.peak_flops)  # seconds of a sample
    computing = training + scored / (run.mfu * gpu.peak_flops)
    # each rank gets the features of all others, and gives back their gradients
    exchanged = 2 * 2 * model.width * FLOAT32 * (gpus - 1) / link
    averaged = 2 * (gpus - 1) / gpus * model.parameters * FLOAT32 / link / run.batch
    exposed = max(0.0, averaged - BACKWARD * training)
    return Limits(
        loading=run.cores / run.decode_seconds / run.drawn,
        copying=gpu.host_bytes / model.pixels / run.drawn,
        computing=1 / computing,
        device=1 / (computing + exchanged + exposed),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Throughput that somebody has measured, of one model on few and on many GPUs."""

    source: str
    model: str
    gpu: str
    batch: int
    few: tuple[int, float]  # GPUs, samples per second of all
    many: tuple[int, float]


NEMO = "NVIDIA, NeMo's user guide"
# Of LAION's runs there is one number each: what it says is the share of the peak.
PUBLISHED = (
    Published(source=NEMO, model="ViT-g-14", gpu="A100", batch=64, few=(8, 559), many=(128, 8633)),
    Published(source=NEMO, model="ViT-g-14", gpu="H100", batch=64, few=(8, 935), many=(128, 13829)),
)
LAION = (  # model, A100s, samples per second: trained_models_info.csv of arXiv 2212.07143
    ("ViT-B-32", 128, 108_845),
    ("ViT-B-32", 344, 219_759),
    ("ViT-B-16", 344, 136_371),
    ("ViT-L-14", 1024, 79_116),
)


def mfu(model: Model, gpu: Gpu, per_gpu: float) -> float:
    """Return the share of the peak that so many samples per second are."""
    return 3 * model.forward_flops * per_gpu / gpu.peak_flops


def limit_rows(model: Model, gpu: Gpu, run: Run, counts: Sequence[int]) -> list[list[str]]:
    """Return header and a row for each number of GPUs."""
    rows = [["GPUs", "loading", "copying", "computing", "with exchange", "limit", "samples/s"]]
    for gpus in counts:
        found = limits(model, gpu, run, gpus)
        parts = (found.loading, found.copying, found.computing, found.device)
        rows.append(
            [
                str(gpus),
                *(f"{each:,.0f}" for each in parts),
                found.limit,
                f"{found.rate * gpus:,.0f}",
            ]
        )
    return rows


def published_rows() -> list[list[str]]:
    """Return header and a row per published pair: the efficiency there, and of this model."""
    rows = [["source", "model", "GPUs", "share of the peak", "efficiency", "of this model"]]
    for each in PUBLISHED:
        model, gpu = MODELS[each.model], GPUS[each.gpu]
        (few, slow), (many, fast) = each.few, each.many
        reached = mfu(model, gpu, slow / few)
        run = Run(batch=each.batch, cores=1, decode_seconds=1e-9, mfu=reached)
        one, all_of_them = (limits(model, gpu, run, gpus).device for gpus in (few, many))
        rows.append(
            [
                each.source,
                each.model,
                f"{few} to {many} {each.gpu}",
                f"{reached:.0%}",
                f"{fast / many / (slow / few):.1%}",
                f"{all_of_them / one:.1%}",
            ]
        )
    for name, gpus, rate in LAION:
        reached = mfu(MODELS[name], GPUS["A100"], rate / gpus)
        source = "LAION's scaling laws"
        rows.append([source, name, f"{gpus} A100", f"{reached:.0%}", "-", "-"])
    return rows


def as_table(rows: Sequence[Sequence[str]]) -> str:
    """Format header and rows as Markdown."""
    header, *others = rows
    lines = [header, ["---"] * len(header), *others]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="ViT-B-32")
    parser.add_argument("--gpu", choices=GPUS, default="H100")
    parser.add_argument("--gpus", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--batch", type=int, default=1024, help="trained samples of a GPU")
    parser.add_argument("--cores", type=int, default=14, help="that load, for each GPU")
    parser.add_argument("--decode-us", type=float, default=3030, help="of a core, for a sample")
    parser.add_argument("--mfu", type=float, default=REACHED, help="share of the peak")
    parser.add_argument("--drawn", type=float, default=1, help="read for each that is trained on")
    parser.add_argument("--scoring", type=float, default=1, help="as a share of a forward pass")
    options = parser.parse_args()
    run = Run(
        batch=options.batch,
        cores=options.cores,
        decode_seconds=options.decode_us / 1e6,
        mfu=options.mfu,
        drawn=options.drawn,
        scoring=options.scoring,
    )
    rows = limit_rows(MODELS[options.model], GPUS[options.gpu], run, options.gpus)
    print(f"{options.model} on {options.gpu}, trained samples per second and GPU:\n")
    print(as_table(rows))
    print(f"\nAgainst published throughput:\n\n{as_table(published_rows())}")


if __name__ == "__main__":
    main()
