"""Compare JPEG decoders on what open_clip's transforms at 224 pixels need: time and pixels.

    python benchmarks/decode.py POOL --samples 500 --rounds 7

Each decoder ends in an RGB `PIL.Image`, because that is what the transforms take, and pays for the
conversion. One thread; the files lie in memory; the decoders alternate block by block, so that
noise of the machine meets all of them. simplejpeg and PyTurboJPEG are left out where they are not
installed.
"""

import argparse
import io
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from open_clip.constants import OPENAI_DATASET_STD
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

SIZE = 224
# RandomResizedCrop(scale=(0.9, 1), ratio=(3/4, 4/3)): the shorter side of the smallest crop of an
# image of area A is sqrt(0.9 * A * 3/4).
CROP_SHARE = 0.9 * 0.75
BLOCK_SAMPLES = 25

Decoder = Callable[[bytes], Image.Image]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What was measured of one decoder; differences are in 1/255 against Pillow's full decode."""

    decode_us: float
    eval_us: float
    train_us: float
    reduced_fraction: float
    identical_fraction: float
    mean_difference: float
    max_difference: float
    mean_difference_eval: float
    max_difference_eval: float


def pillow(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def pillow_no_copy(data: bytes) -> Image.Image:
    """As `pillow`, less the copy that `convert` makes of an image that is RGB already."""
    image = Image.open(io.BytesIO(data))
    if image.mode != "RGB":
        return image.convert("RGB")
    image.load()
    return image


def pillow_draft(data: bytes) -> Image.Image:
    """At the smallest DCT scale that leaves both sides at 224 or more."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (SIZE, SIZE))
    return image.convert("RGB")


def pillow_draft_crop(data: bytes) -> Image.Image:
    """At the smallest DCT scale that leaves every train crop at 224 or more, so never enlarged."""
    image = Image.open(io.BytesIO(data))
    width, height = image.size
    for scale in (8, 4, 2):
        if (width / scale) * (height / scale) * CROP_SHARE >= SIZE**2:
            image.draft("RGB", (width // scale, height // scale))
            break
    return image.convert("RGB")


def torchvision_decode(data: bytes) -> Image.Image:
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    image_CHW = decode_jpeg(buffer, mode=ImageReadMode.RGB)
    return Image.fromarray(image_CHW.permute(1, 2, 0).numpy())


def decoders(turbojpeg_library: str | None) -> dict[str, Decoder]:
    """By name; the first is what the others are compared with."""
    found: dict[str, Decoder] = {
        "Pillow": pillow,
        "Pillow, no copy": pillow_no_copy,
        "Pillow, draft to 224": pillow_draft,
        "Pillow, draft safe for train crops": pillow_draft_crop,
        "torchvision": torchvision_decode,
    }
    try:
        import simplejpeg
    except ImportError:
        print("simplejpeg is not installed: left out")
    else:

        def simple(data: bytes, /, **options: int) -> Image.Image:
            return Image.fromarray(simplejpeg.decode_jpeg(data, colorspace="RGB", **options))

        fast = {"fastdct": True, "fastupsample": True}
        reduced = {"min_height": SIZE, "min_width": SIZE}
        found["simplejpeg"] = simple
        found["simplejpeg, fast"] = partial(simple, **fast)
        found["simplejpeg, n/8 to 224"] = partial(simple, **reduced)
        found["simplejpeg, 1/2^n to 224"] = partial(simple, **reduced, min_factor=2)
        found["simplejpeg, fast, n/8 to 224"] = partial(simple, **fast, **reduced)
    try:
        import turbojpeg

        turbo = turbojpeg.TurboJPEG(turbojpeg_library)
    except (ImportError, RuntimeError, OSError) as error:
        print(f"PyTurboJPEG is left out: {error}")
    else:

        def turbo_decode(data: bytes, /, flags: int = 0) -> Image.Image:
            return Image.fromarray(turbo.decode(data, turbojpeg.TJPF_RGB, flags=flags))

        found["PyTurboJPEG"] = turbo_decode
        found["PyTurboJPEG, fast"] = partial(
            turbo_decode, flags=turbojpeg.TJFLAG_FASTDCT | turbojpeg.TJFLAG_FASTUPSAMPLE
        )
    return found


def read_jpegs(pool: Path) -> Iterator[bytes]:
    for path in sorted((pool / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name.endswith(".jpg") else None
                if file is not None:
                    yield file.read()


def measure_seconds(
    variants: dict[str, Decoder], jpegs: list[bytes], rounds: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Seconds of (decode, eval transform, train transform) as an array (3, variants, samples).

    Each is the median over the rounds; before the first round each decoder runs through a block.
    """
    eval_transform = image_transform_v2(PreprocessCfg(size=SIZE), is_train=False)
    train_transform = image_transform_v2(PreprocessCfg(size=SIZE), is_train=True)
    order = list(enumerate(variants.values()))
    seconds = np.zeros((3, len(order), rounds, len(jpegs)))
    for _, decode in order:
        for data in jpegs[:BLOCK_SAMPLES]:
            image = decode(data)
            eval_transform(image)
            train_transform(image)
    for round_ in range(rounds):
        order = order[1:] + order[:1]
        for start in range(0, len(jpegs), BLOCK_SAMPLES):
            for variant, decode in order:
                torch.manual_seed(round_ * len(jpegs) + start)  # the same crops for each decoder
                for place, data in enumerate(jpegs[start : start + BLOCK_SAMPLES], start):
                    begin = time.perf_counter()
                    image = decode(data)
                    decoded = time.perf_counter()
                    eval_transform(image)
                    evaluated = time.perf_counter()
                    train_transform(image)
                    trained = time.perf_counter()
                    seconds[:, variant, round_, place] = (
                        decoded - begin,
                        evaluated - decoded,
                        trained - evaluated,
                    )
    return np.median(seconds, axis=2)


def compare_pixels(decode: Decoder, jpegs: list[bytes]) -> dict[str, float]:
    """The fields of `Row` that are not times. Direct differences are of images of equal size."""
    transform = image_transform_v2(PreprocessCfg(size=SIZE), is_train=False)
    units = torch.tensor(OPENAI_DATASET_STD)[:, None, None] * 255  # undoes the normalisation
    reduced = identical = 0
    means, maxima, eval_means, eval_maxima = [], [], [], []
    for data in jpegs:
        want, got = pillow(data), decode(data)
        if got.size != want.size:
            reduced += 1
        else:
            difference = np.abs(np.asarray(want, dtype=int) - np.asarray(got, dtype=int))
            means.append(difference.mean())
            maxima.append(difference.max())
            identical += not maxima[-1]
        difference_CHW = (transform(want) - transform(got)).abs() * units
        eval_means.append(difference_CHW.mean().item())
        eval_maxima.append(difference_CHW.max().item())
    return {
        "reduced_fraction": reduced / len(jpegs),
        "identical_fraction": identical / len(jpegs),
        "mean_difference": float(np.mean(means)) if means else float("nan"),
        "max_difference": float(np.max(maxima)) if maxima else float("nan"),
        "mean_difference_eval": float(np.mean(eval_means)),
        "max_difference_eval": float(np.max(eval_maxima)),
    }


def measure(variants: dict[str, Decoder], jpegs: list[bytes], rounds: int) -> dict[str, Row]:
    decode_s, eval_s, train_s = measure_seconds(variants, jpegs, rounds).mean(axis=-1)
    return {
        name: Row(
            decode_us=decode_s[place] * 1e6,
            eval_us=(decode_s[place] + eval_s[place]) * 1e6,
            train_us=(decode_s[place] + train_s[place]) * 1e6,
            **compare_pixels(decode, jpegs),
        )
        for place, (name, decode) in enumerate(variants.items())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pool", type=Path, help="a folder that make_pool.py wrote")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turbojpeg-library", help="path of libturbojpeg.so for PyTurboJPEG")
    args = parser.parse_args()
    torch.set_num_threads(1)
    jpegs = list(islice(read_jpegs(args.pool), args.samples))
    if len(jpegs) < args.samples:
        parser.error(f"{args.pool} has {len(jpegs)} samples, --samples is {args.samples}")
    print(
        "| decoder | decode, us | + eval transform, us | + train transform, us | reduced "
        "| identical | mean / max difference | the same after the eval transform |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for name, row in measure(decoders(args.turbojpeg_library), jpegs, args.rounds).items():
        print(
            f"| {name} | {row.decode_us:.0f} | {row.eval_us:.0f} | {row.train_us:.0f} "
            f"| {row.reduced_fraction:.0%} | {row.identical_fraction:.1%} "
            f"| {row.mean_difference:.3f} / {row.max_difference:.0f} "
            f"| {row.mean_difference_eval:.3f} / {row.max_difference_eval:.0f} |"
        )
    print(
        f"\n{len(jpegs)} JPEGs of {np.mean([len(j) for j in jpegs]) / 1e3:.1f} kB, one thread; per "
        f"image the median of {args.rounds} rounds, then the mean; differences in 1/255 against "
        "Pillow, direct ones of the images that were not reduced."
    )


if __name__ == "__main__":
    main()
