"""Tiny tasks made with Pillow, a tiny random CLIP, and clip_benchmark as the oracle."""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from siftclip.datamodules.models.load import ClipModel, load_clip_model
from siftclip.eval.tasks.kinds.values import Task
from siftclip.eval.tasks.task import find_tasks

TINY_CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 32, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}
# suffix, Pillow's format, mode: of each sort that a real benchmark has
IMAGE_SORTS = [
    ("png", "PNG", "RGB"),
    ("jpg", "JPEG", "RGB"),
    ("webp", "WEBP", "RGB"),
    ("jpeg", "JPEG", "L"),
    ("png", "PNG", "RGBA"),
    ("png", "PNG", "P"),
    ("jpg", "JPEG", "CMYK"),
]

Members = list[tuple[str, bytes]]


@pytest.fixture(scope="session", autouse=True)
def one_vocabulary(vocabulary_once: None) -> None:
    """Every model has the same one."""


def encode_image(seed: int, image_format: str = "PNG", mode: str = "RGB") -> bytes:
    """A random picture, 36 x 33 pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (33, 36, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format=image_format)
    return buffer.getvalue()


def encode_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def make_members(kind: str, samples: int, classes: int) -> list[Members]:
    """Samples whose labels cover all classes, in all sorts of images."""
    generator = np.random.default_rng(samples)
    made = []
    for i in range(samples):
        suffix, image_format, mode = IMAGE_SORTS[i % len(IMAGE_SORTS)]
        if kind == "classification":
            label = ("cls", str(i % classes).encode())
        elif kind == "multilabel":
            hot = (generator.random(classes) < 0.4).astype(np.int64)
            hot[i % classes] = 1
            label = ("npy", encode_npy(hot))
        elif kind == "image_caption_selection":
            # of two pictures and two captions
            pictures = [(f"{k}.{suffix}", encode_image(2 * i + k, image_format)) for k in (0, 1)]
            texts = f"thing {i % classes} here\na photo of thing {(i + 1) % classes}"
            made.append([*pictures, ("txt", texts.encode())])
            continue
        elif kind == "association":
            count = 5 + i % 6  # up to 10 candidates, which the main metric is of
            pictures = [(f"{k}.jpg", encode_image(i + k, "JPEG")) for k in range(count)]
            record = {"cue": f"Thing {i}", "associations": [0, 2, count - 1][: 1 + i % 3]}
            made.append([*pictures, ("json", json.dumps(record).encode())])
            continue
        else:
            captions = [f"picture {i}", f"größer than {i}", "a photo"][: 1 + i % 3]
            label = ("txt", "\n".join(captions).encode())
        made.append([(suffix, encode_image(i, image_format, mode)), label])
    return made


def write_task(
    root: Path,
    kind: str = "classification",
    *,
    samples: int = 14,
    classes: int = 6,
    shards: int = 2,
    members: Sequence[Members] | None = None,
    templates: str = "a photo of a {c}\nthe {c}",
    split: str = "test",
) -> Path:
    """Write a task folder and return it. `members` replaces the samples that would be made."""
    content = make_members(kind, samples, classes) if members is None else list(members)
    (root / split).mkdir(parents=True)
    (root / "dataset_type.txt").write_text(f"{kind}\n")
    if kind in ("classification", "multilabel"):
        (root / "classnames.txt").write_text("\n".join(f"thing {i}" for i in range(classes)))
        (root / "zeroshot_classification_templates.txt").write_text(templates)
    (root / split / "nshards.txt").write_text(str(shards))
    for shard in range(shards):
        with tarfile.open(root / split / f"{shard}.tar", "w") as archive:
            for i in range(len(content) * shard // shards, len(content) * (shard + 1) // shards):
                for suffix, data in content[i]:
                    info = tarfile.TarInfo(f"s{i:04d}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return root


@pytest.fixture(scope="session")
def make_task() -> Callable[..., Path]:
    """`write_task`, which test modules cannot import from here."""
    return write_task


@pytest.fixture(scope="session")
def make_image() -> Callable[..., bytes]:
    """`encode_image`."""
    return encode_image


@pytest.fixture(scope="session")
def make_npy() -> Callable[[np.ndarray], bytes]:
    """`encode_npy`."""
    return encode_npy


@pytest.fixture(scope="session")
def session_clip() -> ClipModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return load_clip_model("tiny", architecture=TINY_CLIP)


@pytest.fixture
def clip(session_clip: ClipModel) -> ClipModel:
    """A tiny random CLIP, in train mode as open_clip would leave it for training."""
    session_clip.model.train()
    return session_clip


@pytest.fixture(scope="session")
def task_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One task of each kind, and one with fewer than five classes. Not to be changed.

    The pictures of `few` are also in `things`, `many_labels` and `captions`.
    """
    root = tmp_path_factory.mktemp("tasks")
    write_task(root / "wds_things", "classification")
    write_task(root / "wds_few", "classification", samples=7, classes=3, shards=1)
    write_task(root / "wds_many_labels", "multilabel")
    write_task(root / "wds_captions", "retrieval", samples=13)
    write_task(root / "wds_pairs", "image_caption_selection", samples=9)
    write_task(root / "wds_cues", "association", samples=8)
    return root


@pytest.fixture
def tasks(task_root: Path) -> list[Task]:
    """The tasks of `task_root`, by name."""
    return find_tasks(task_root).complete()


@pytest.fixture
def changed_weights(clip: ClipModel) -> Callable[[], AbstractContextManager[None]]:
    """`with changed_weights():` the model is another one, by one weight."""

    @contextmanager
    def changed() -> Iterator[None]:
        parameter: Any = clip.model.visual.attnpool.c_proj.weight  # type: ignore[union-attr]
        original = parameter.detach().clone()
        with torch.no_grad():
            parameter.flatten()[0] += 1
        try:
            yield
        finally:
            with torch.no_grad():
                parameter.copy_(original)

    return changed


@pytest.fixture(scope="session")
def fixed_clip_benchmark() -> ModuleType:
    """benchmarks/tools/clip_benchmark_fixed.py: `repaired()` mends clip_benchmark's functions."""
    path = Path(__file__).parents[2] / "benchmarks" / "tools" / "clip_benchmark_fixed.py"
    spec = importlib.util.spec_from_file_location("clip_benchmark_fixed", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
