"""The images in a batch are open_clip's to the bit, or with torch's resizing nearly so."""

from __future__ import annotations

import io
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms import Compose, Normalize, ToTensor

from siftclip.datamodules.pool import reader
from siftclip.datamodules.pool.reader import BadSampleError, decode_image, decode_pixels
from siftclip.datamodules.streaming.image_transform import ImageTransform
from siftclip.errors import InputError

PHOTO = load_sample_image("china.jpg").copy()  # uint8 [427, 640, 3]
JITTER: dict[str, Any] = {
    "color_jitter": (0.4, 0.4, 0.4, 0.1),
    "color_jitter_prob": 0.8,
    "gray_scale_prob": 0.3,
}


def open_clips(train: bool = True, **options: Any) -> Any:
    augmentation = AugmentationCfg(**options.pop("augmentation", {}))
    return image_transform_v2(
        PreprocessCfg(**{"size": 64, **options}), is_train=train, aug_cfg=augmentation
    )


TRANSFORMS: dict[str, Callable[[], Any]] = {
    "train": open_clips,
    "wide crops": lambda: open_clips(augmentation={"scale": (0.1, 1.0)}),
    "eval": lambda: open_clips(train=False),
    "eval, squash": lambda: open_clips(train=False, resize_mode="squash"),
    "eval, longest": lambda: open_clips(train=False, resize_mode="longest"),
    "siglip": lambda: open_clips(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
}


def crops() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    images = []
    for _ in range(12):
        height, width = generator.integers(30, 400, 2)
        images.append(np.ascontiguousarray(PHOTO[:height, :width]))
    return images


def run(images: ImageTransform, pixels: np.ndarray, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    random.seed(seed)
    prepared = images.prepare(pixels if images.on_tensors else Image.fromarray(pixels))
    (out,) = images.empty_batch(1, prepared, finished=True)
    images.put(prepared, out)
    return out


def open_clip_run(transform: Any, pixels: np.ndarray, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    random.seed(seed)
    return transform(Image.fromarray(pixels))


@pytest.mark.filterwarnings("ignore:Unused augmentation")
@pytest.mark.parametrize("name", [*TRANSFORMS, "jitter"])
def test_images_are_open_clips_to_the_bit(name: str) -> None:
    make = TRANSFORMS.get(name, lambda: open_clips(augmentation=JITTER))
    transform = make()
    images = pickle.loads(pickle.dumps(ImageTransform(transform)))  # noqa: S301 - our own bytes
    for seed, pixels in enumerate(crops()):
        assert torch.equal(run(images, pixels, seed), open_clip_run(transform, pixels, seed))


@pytest.mark.parametrize("name", ["train", "wide crops", "eval", "siglip"])
def test_torch_resizing_takes_the_same_crop_and_rounds_otherwise(name: str) -> None:
    transform = TRANSFORMS[name]()
    images = ImageTransform(transform, "torch")
    level = 1 / 255 / min(images.normalization.std)
    total = different = 0
    for seed, pixels in enumerate(crops()):
        ours, theirs = run(images, pixels, seed), open_clip_run(transform, pixels, seed)
        assert (ours - theirs).abs().max() <= 1.01 * level
        total += ours.numel()
        different += int(((ours - theirs).abs() > level / 10).sum())
    assert different < 0.02 * total


def test_transforms_of_others_are_left_as_they_are() -> None:
    def transform(image: Image.Image) -> torch.Tensor:
        return torch.full((3, 4, 4), float(image.width))

    assert torch.equal(run(ImageTransform(transform), PHOTO, 0), torch.full((3, 4, 4), 640.0))
    alone = Compose([ToTensor()])
    assert torch.equal(run(ImageTransform(alone), PHOTO, 0), alone(Image.fromarray(PHOTO)))


@pytest.mark.filterwarnings("ignore:Unused augmentation")
def test_what_torch_cannot_do_is_refused() -> None:
    with pytest.raises(InputError, match=r"resize must be one of .*pillow.*Got 'opencv'"):
        ImageTransform(open_clips(), "opencv")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"does not know the step .*Use pillow"):
        ImageTransform(open_clips(augmentation=JITTER), "torch")
    with pytest.raises(InputError, match=r"ends with ToTensor and Normalize"):
        ImageTransform(Compose([ToTensor(), Normalize([0.5], [0.5]), torch.relu]), "torch")


def encode(pixels: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    mode = options.pop("mode", "RGB")
    Image.fromarray(pixels).convert(mode).save(buffer, format="JPEG", **options)
    return buffer.getvalue()


JPEGS: dict[str, dict[str, Any]] = {
    "4:2:0": {"quality": 85, "subsampling": 2},
    "4:4:4": {"quality": 95, "subsampling": 0},
    "4:2:2": {"quality": 70, "subsampling": 1},
    "progressive": {"progressive": True},
    "grey": {"mode": "L"},
    "CMYK": {"mode": "CMYK"},
}


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("with_simplejpeg", [True, False])
def test_decoding_is_pillows(
    kind: str, with_simplejpeg: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_simplejpeg:
        monkeypatch.setattr(reader, "simplejpeg", None)
    for pixels in crops()[:4]:
        data = encode(pixels, **JPEGS[kind])
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(np.asarray(decode_image(data, 10**6)), expected)
        assert np.array_equal(decode_pixels(data, 10**6), expected)


@pytest.mark.parametrize("kind", ["4:2:0", "progressive"])
def test_what_is_bad_does_not_depend_on_the_decoder(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut and damaged files: with simplejpeg the same are refused, the others have equal pixels."""
    whole = encode(crops()[0], **JPEGS[kind])
    generator = np.random.default_rng(1)
    cases = [whole[:size] for size in range(2, len(whole), max(1, len(whole) // 60))]
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[int(generator.integers(2, len(whole)))] = int(generator.integers(256))
        cases.append(bytes(damaged))

    def outcome(data: bytes) -> bytes | str:
        try:
            return decode_pixels(data, 10**7).tobytes()
        except BadSampleError as error:
            return str(error)

    found = [outcome(data) for data in cases]
    monkeypatch.setattr(reader, "simplejpeg", None)
    assert [outcome(data) for data in cases] == found
    assert {type(answer) for answer in found} == {bytes, str}


def test_pixel_limit_is_checked_before_decoding() -> None:
    data = encode(PHOTO)
    for decode in (decode_image, decode_pixels):
        with pytest.raises(BadSampleError, match=r"more pixels than max_image_pixels"):
            decode(data, 427 * 640 - 1)  # type: ignore[operator]
        decode(data, 427 * 640)  # type: ignore[operator]
