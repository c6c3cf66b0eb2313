"""Write a pool of image-caption shards that looks like DataComp's, for benchmarks offline.

    python benchmarks/tools/make_pool.py FOLDER --samples 50000

Every image is cut, mixed and recoloured from the two photographs that scikit-learn ships, so that
JPEG decoders and page caches meet real image statistics: about 30 kB each, the longer side at most
512 pixels as img2dataset leaves it. A sample depends only on the seed and its number; shards that
exist are skipped, so an interrupted run continues where it stopped (use another folder for another
seed or another shard size).
"""

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import tarfile
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_image
from tqdm import tqdm

MAX_SIDE_PIXELS = 512
MAX_SHARD_SAMPLES = 10_000  # a key has four digits for the place in the shard
ASPECT_RATIOS = (1.0, 1.0, 4 / 3, 4 / 3, 3 / 2, 3 / 2, 16 / 9, 3 / 4, 3 / 4, 2 / 3, 2 / 3, 9 / 16)
WORDS = """
    a an the of in on with and for at by from near under over small large old new red blue green
    white black golden wooden modern vintage summer winter morning evening photo image picture
    print poster free shipping sale best price home garden kitchen table chair lamp window door
    flower temple roof river lake mountain beach forest road bridge city street market house
    hotel room view sky cloud sun rain snow dog cat horse bird fish woman man child people
    family dress shirt shoes bag watch ring car bike train boat plane phone camera laptop book
    music design pattern background texture vector illustration stock hand made cotton leather
    steel 2019 2020 2021 set pack size recipe cake coffee tea bread fresh organic travel guide
""".split()  # noqa: SIM905 - as a list it would be 130 lines
EXIF_TAGS = {
    "Image Make": "Canon",
    "Image Model": "Canon EOS 5D Mark III",
    "Image Orientation": "Horizontal (normal)",
    "Image XResolution": "300",
    "Image YResolution": "300",
    "Image ResolutionUnit": "Pixels/Inch",
    "Image Software": "Adobe Photoshop CS6 (Windows)",
    "Image DateTime": "2014:07:12 18:33:09",
    "Image YCbCrPositioning": "Co-sited",
    "Image ExifOffset": "252",
    "EXIF ExposureTime": "1/250",
    "EXIF FNumber": "28/5",
    "EXIF ExposureProgram": "Aperture Priority",
    "EXIF ISOSpeedRatings": "200",
    "EXIF ExifVersion": "0230",
    "EXIF DateTimeOriginal": "2014:07:12 18:33:09",
    "EXIF ShutterSpeedValue": "8",
    "EXIF ApertureValue": "5",
    "EXIF MeteringMode": "Pattern",
    "EXIF Flash": "Flash did not fire, compulsory flash mode",
    "EXIF FocalLength": "70",
    "EXIF ColorSpace": "sRGB",
    "EXIF ExifImageWidth": "1024",
    "EXIF ExifImageLength": "683",
    "EXIF WhiteBalance": "Auto",
}


@cache
def _photographs() -> tuple[Image.Image, ...]:
    return tuple(Image.fromarray(load_sample_image(n)) for n in ("china.jpg", "flower.jpg"))


def _crop(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A random cut of one photograph, flipped half of the time, resized to `size`."""
    photograph = _photographs()[rng.integers(2)]
    largest = min(photograph.width / size[0], photograph.height / size[1])
    scale = largest * rng.uniform(0.65, 1.0)
    width, height = size[0] * scale, size[1] * scale
    left = rng.uniform(0, photograph.width - width)
    top = rng.uniform(0, photograph.height - height)
    image = photograph.resize(
        size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height)
    )
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def _image_size(rng: np.random.Generator) -> tuple[int, int]:
    """Most web images are larger than 512 pixels and were reduced to it; the others keep theirs."""
    longer = MAX_SIDE_PIXELS if rng.random() < 0.65 else int(rng.integers(200, MAX_SIDE_PIXELS))
    ratio = ASPECT_RATIOS[rng.integers(len(ASPECT_RATIOS))] * rng.uniform(0.95, 1.05)
    if ratio >= 1:
        return longer, max(1, round(longer / ratio))
    return max(1, round(longer * ratio)), longer


def _jpeg(rng: np.random.Generator) -> tuple[bytes, tuple[int, int]]:
    """A JPEG and its (width, height)."""
    size = _image_size(rng)
    image = _crop(rng, size)
    if rng.random() < 0.5:
        image = Image.blend(image, _crop(rng, size), rng.uniform(0.1, 0.5))
    image = ImageEnhance.Color(image).enhance(rng.uniform(0.4, 1.4))
    image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.6, 1.1))
    gains = rng.uniform(0.75, 1.15, size=3)
    table = np.clip(np.outer(gains, np.arange(256)), 0, 255).round().astype(int)
    image = image.point(table.ravel().tolist())
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(75, 93)))
    return buffer.getvalue(), size


def make_sample(seed: int, number: int, key: str) -> dict[str, bytes]:
    """The files of one sample by extension, in the order in which they stand in the tar."""
    rng = np.random.default_rng((seed, number))
    jpeg, (width, height) = _jpeg(rng)
    caption = " ".join(WORDS[i] for i in rng.integers(len(WORDS), size=rng.integers(5, 21)))
    tags = rng.integers(1, len(EXIF_TAGS) + 1) if rng.random() < 0.4 else 0
    enlargement = rng.uniform(1.0, 4.0) if max(width, height) == MAX_SIDE_PIXELS else 1.0
    uid = hashlib.md5(f"{seed}:{number}".encode()).hexdigest()
    record = {
        "uid": uid,
        "url": f"https://images.example.com/{uid[:2]}/{caption.replace(' ', '-')}-{number}.jpg",
        "caption": caption,
        "key": key,
        "status": "success",
        "error_message": None,
        "width": width,
        "height": height,
        "original_width": round(width * enlargement),
        "original_height": round(height * enlargement),
        "exif": json.dumps(dict(list(EXIF_TAGS.items())[:tags])),
        "sha256": hashlib.sha256(jpeg).hexdigest(),
    }
    return {"jpg": jpeg, "txt": caption.encode(), "json": json.dumps(record, indent=4).encode()}


def write_shard(
    shard: int, *, folder: Path, samples: int, shard_samples: int, seed: int
) -> tuple[int, int]:
    """Write one shard under a temporary name, then rename it; returns its samples and JPEG bytes.

    A shard that exists is left alone and counts no bytes.
    """
    first = shard * shard_samples
    count = min(shard_samples, samples - first)
    path = folder / f"{shard:08d}.tar"
    if path.exists():
        return count, 0
    temporary = path.with_suffix(".tar.tmp")
    jpeg_bytes = 0
    with tarfile.open(temporary, "w") as tar:
        for place in range(count):
            key = f"{shard:05d}{place:04d}"
            for extension, data in make_sample(seed, first + place, key).items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
                jpeg_bytes += len(data) if extension == "jpg" else 0
    os.replace(temporary, path)
    return count, jpeg_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="the shards come into FOLDER/shards")
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--shard-samples", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    if args.samples < 1:
        parser.error(f"--samples must be at least 1, got {args.samples}")
    if not 1 <= args.shard_samples <= MAX_SHARD_SAMPLES:
        parser.error(f"--shard-samples must be in 1..{MAX_SHARD_SAMPLES}, got {args.shard_samples}")
    folder = args.folder / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    write = partial(
        write_shard,
        folder=folder,
        samples=args.samples,
        shard_samples=args.shard_samples,
        seed=args.seed,
    )
    shards = range(-(-args.samples // args.shard_samples))
    written = written_bytes = 0
    with (
        multiprocessing.Pool(args.workers) as pool,
        tqdm(total=args.samples, unit="sample") as bar,
    ):
        for count, jpeg_bytes in pool.imap_unordered(write, shards):
            bar.update(count)
            if jpeg_bytes:
                written += count
                written_bytes += jpeg_bytes
    if written:
        print(f"{written} samples written, {written_bytes / written / 1e3:.1f} kB a JPEG")
    else:
        print("every shard was there already")


if __name__ == "__main__":
    main()
