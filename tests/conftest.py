"""Small pools in a temporary folder: tars of samples, and DataComp's metadata beside them.

The factories take what they write as plain objects, so that a test makes a defect by changing one:

    samples = make_samples(12)
    samples[3].caption = b""
    root = write_pool(samples, shards=2)
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import settings
from PIL import Image
from torch import Tensor

from siftclip.datamodules.pool import Pool, open_pool
from siftclip.datamodules.storage import LocalStorage
from siftclip.datamodules.tar_index import ShardIndex, build_shard_index
from siftclip.datamodules.tar_walk import LocalTar, TarSample, walk_tar
from siftclip.selectors.ranks import Ranks

T = TypeVar("T")

# Sums in another number of threads differ in their last bits; children inherit the environment.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

settings.register_profile("siftclip", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("siftclip")

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
FEATURE_KEYS = ("l14_img", "l14_txt")


@dataclass(kw_only=True)
class PoolSample:
    """What the tar holds for one key. None leaves a file out."""

    key: str
    uid: str  # what metadata says, and `record` unless it is changed
    caption: bytes | None
    image: bytes | None
    image_suffix: str
    record: bytes | None  # the json

    def members(self) -> list[tuple[str, bytes]]:
        """Names and contents, in the order of the tar."""
        files = {self.image_suffix: self.image, "txt": self.caption, "json": self.record}
        return [
            (f"{self.key}.{suffix}", data) for suffix, data in files.items() if data is not None
        ]


def encode_image(number: int, suffix: str, size: tuple[int, int] = (40, 36)) -> bytes:
    """A picture that differs from sample to sample: noise over a colour."""
    generator = np.random.default_rng(number)
    pixels = generator.integers(0, 60, (size[1], size[0], 3)) + generator.integers(0, 190, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, format=FORMATS[suffix])
    return buffer.getvalue()


def make_uid(number: int) -> str:
    return hashlib.md5(b"test sample %d" % number).hexdigest()


@pytest.fixture(scope="session")
def make_samples() -> Callable[..., list[PoolSample]]:
    """`make_samples(count, start=0)`: samples whose images are jpg, png and webp in turn."""

    def make(count: int, *, start: int = 0) -> list[PoolSample]:
        samples = []
        for number in range(start, start + count):
            suffix = list(FORMATS)[number % len(FORMATS)]
            uid = make_uid(number)
            samples.append(
                PoolSample(
                    key=f"{number:09d}",
                    uid=uid,
                    caption=f"caption of sample {number}".encode(),
                    image=encode_image(number, suffix),
                    image_suffix=suffix,
                    record=json.dumps({"uid": uid, "width": 40}).encode(),
                )
            )
        return samples

    return make


@pytest.fixture(scope="session")
def write_tar() -> Callable[..., Path]:
    """`write_tar(path, members)`: a tar of (name, content) pairs; content None makes a folder."""

    def write(
        path: Path,
        members: Sequence[tuple[str, bytes | None]],
        *,
        tar_format: int = tarfile.GNU_FORMAT,
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=tar_format) as archive:
            for name, data in members:
                info = tarfile.TarInfo(name)
                if data is None:
                    info.type = tarfile.DIRTYPE
                    archive.addfile(info)
                else:
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        return path

    return write


@pytest.fixture(scope="session")
def index_tar() -> Callable[[Path], ShardIndex]:
    """`index_tar(path)`: the index of a tar, from no cache."""

    def index(path: Path) -> ShardIndex:
        with LocalTar(path) as tar:
            return build_shard_index(tar, path.name)

    return index


@pytest.fixture(scope="session")
def list_tar() -> Callable[[Path], list[TarSample]]:
    """`list_tar(path)`: the samples of a tar."""

    def samples(path: Path) -> list[TarSample]:
        with LocalTar(path) as tar:
            return list(walk_tar(tar))

    return samples


@pytest.fixture
def write_pool(tmp_path: Path, write_tar: Callable[..., Path]) -> Callable[..., Path]:
    """`write_pool(samples, shards=2, folder="pool", layout="shards")`: the root of a pool.

    The samples are cut into shards of equal size; layout "flat" puts the tars into the root.
    """

    def write(
        samples: Sequence[PoolSample],
        *,
        shards: int = 2,
        folder: str = "pool",
        layout: str = "shards",
    ) -> Path:
        root = tmp_path / folder
        place = root / "shards" if layout == "shards" else root
        for number, part in enumerate(np.array_split(np.arange(len(samples)), shards)):
            members = [member for i in part for member in samples[i].members()]
            write_tar(place / f"{number:08d}.tar", members)
        return root

    return write


@pytest.fixture
def write_metadata() -> Callable[..., dict[str, dict[str, np.ndarray]]]:
    """`write_metadata(folder, uids, parts=2, keys=..., dim=8)`: DataComp's parquet and npz.

    The rows are shuffled over the parts. Returns the features by key and uid.
    """

    def write(
        folder: Path,
        uids: Sequence[Any],
        *,
        parts: int = 2,
        keys: Sequence[str] = FEATURE_KEYS,
        dim: int = 8,
        seed: int = 0,
    ) -> dict[str, dict[str, np.ndarray]]:
        folder.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(seed)
        order = generator.permutation(len(uids))
        truth: dict[str, dict[str, np.ndarray]] = {key: {} for key in keys}
        for number, part in enumerate(np.array_split(order, parts)):
            arrays = {}
            for key in keys:
                values = generator.standard_normal((len(part), dim))
                values /= np.linalg.norm(values, axis=1, keepdims=True)
                arrays[key] = values.astype(np.float16)
                truth[key].update(zip([uids[i] for i in part], arrays[key], strict=True))
            name = hashlib.md5(b"part %d" % number).hexdigest()
            column = pa.array([uids[i] for i in part], type=pa.string())
            table = pa.table({"uid": column, "text": ["a caption"] * len(part)})
            pq.write_table(table, folder / f"{name}.parquet")
            np.savez(folder / f"{name}.npz", **arrays)  # type: ignore[arg-type]
        return truth

    return write


@pytest.fixture
def load_pool(tmp_path: Path) -> Callable[..., Pool]:
    """`load_pool(root, max_bad_fraction=0.0)`: the pool, with its indices in the test's folder."""

    def load(root: Path, *, max_bad_fraction: float = 0.0, cache: str = "cache") -> Pool:
        return open_pool(
            LocalStorage(str(root)),
            cache_dir=tmp_path / cache,
            max_bad_fraction=max_bad_fraction,
            progress=False,
        )

    return load


class ThreadRanks:
    """One of several threads that run in lockstep."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, board: list[Any]) -> None:
        self.rank, self.size = rank, size
        self._barrier, self._board = barrier, board

    def sum(self, values: Tensor) -> Tensor:
        self._board[self.rank] = values
        self._barrier.wait()
        total = torch.stack([part.clone() for part in self._board]).sum(0, dtype=values.dtype)
        self._barrier.wait()  # nobody may write to the board before all have read it
        return total

    def barrier(self) -> None:
        self._barrier.wait()


def _run_on_ranks(size: int, function: Callable[[Ranks], T]) -> list[T]:
    """Call `function(ranks)` on `size` ranks at once; the answers by rank."""
    barrier, board = threading.Barrier(size, timeout=60), [None] * size

    def run(rank: int) -> T:
        try:
            return function(ThreadRanks(rank, size, barrier, board))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as executor:
        return list(executor.map(run, range(size)))


@pytest.fixture(scope="session")
def run_on_ranks() -> Callable[[int, Callable[[Ranks], Any]], list[Any]]:
    """`(size, function(ranks))` calls the function on ranks in lockstep: the answers by rank."""
    return _run_on_ranks
