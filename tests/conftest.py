"""Small pools in a temporary folder: tars of samples, and DataComp's metadata beside them.

The factories take what they write as plain objects, so that a test makes a defect by changing one:

    samples = make_samples(12)
    samples[3].caption = b""
    root = write_pool(samples, shards=2)
"""

from __future__ import annotations

import gc
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import made_once
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import settings
from PIL import Image
from python_server import environment_of_children
from torch import Tensor

from siftclip import redaction
from siftclip.datamodules.index.tar_index import ShardIndex, build_shard_index
from siftclip.datamodules.index.tar_walk import LocalTar, TarSample, walk_tar
from siftclip.datamodules.pool.pool import Pool, open_pool
from siftclip.datamodules.storage.local import LocalStorage
from siftclip.ranks import Ranks

T = TypeVar("T")

# What is imported stays, millions of objects: looking for garbage among them took a tenth of the
# time of all tests, and more of the collection. From `pytest_collection_finish` on it is left out.
gc.disable()

# Sums in another number of threads differ in their last bits; children inherit the environment.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

settings.register_profile("siftclip", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("siftclip")

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
FEATURE_KEYS = ("l14_img", "l14_txt")
TINY_ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options for tests that repeat for minutes, and for those of a GPU."""
    parser.addoption("--nightly", action="store_true", help="run the tests marked nightly alone")
    parser.addoption(
        "--device",
        default="cuda",
        choices=("cuda", "cpu"),
        help="of the tests marked gpu; cpu runs their code where there is no GPU",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the nightly tests, or with `--nightly` all others."""
    nightly = config.getoption("nightly")
    left_out = [item for item in items if bool(item.get_closest_marker("nightly")) != nightly]
    items[:] = [item for item in items if bool(item.get_closest_marker("nightly")) == nightly]
    config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish() -> None:
    """Collect garbage from now on, among new objects alone."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    gc.enable()


def pytest_unconfigure() -> None:
    """Let go of what is frozen, which nanobind else takes for leaks when Python ends."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """What tests marked `gpu` compare with the CPU, in exact float32; skips where it is missing."""
    device = torch.device(request.config.getoption("device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device; --device cpu runs the same code on the CPU")
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield device
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(autouse=True)
def nothing_secret() -> Iterator[None]:
    """What a test calls secret, such as `test`, must not be hidden in the messages of others."""
    yield
    redaction.forget()


@pytest.fixture(scope="session", autouse=True)
def composed_once() -> Iterator[None]:
    """See made_once.py."""
    with pytest.MonkeyPatch.context() as patch:
        made_once.compositions_once(patch)
        made_once.nothing_flushed(patch)
        yield


@pytest.fixture(scope="session")
def vocabulary_once() -> Iterator[None]:
    """See made_once.py. For folders whose tests import open_clip anyway."""
    with pytest.MonkeyPatch.context() as patch:
        made_once.vocabulary_once(patch)
        yield


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


@pytest.fixture(scope="session")
def write_pool_at(write_tar: Callable[..., Path]) -> Callable[..., Path]:
    """`write_pool_at(root, samples, shards=2, layout="shards")`: the root of a pool.

    The samples are cut into shards of equal size; layout "flat" puts the tars into the root.
    """

    def write(
        root: Path, samples: Sequence[PoolSample], *, shards: int = 2, layout: str = "shards"
    ) -> Path:
        place = root / "shards" if layout == "shards" else root
        for number, part in enumerate(np.array_split(np.arange(len(samples)), shards)):
            members = [member for i in part for member in samples[i].members()]
            write_tar(place / f"{number:08d}.tar", members)
        return root

    return write


@pytest.fixture
def write_pool(tmp_path: Path, write_pool_at: Callable[..., Path]) -> Callable[..., Path]:
    """`write_pool(samples, shards=2, folder="pool", layout="shards")`: a pool of the test's own."""

    def write(samples: Sequence[PoolSample], *, folder: str = "pool", **options: Any) -> Path:
        return write_pool_at(tmp_path / folder, samples, **options)

    return write


@pytest.fixture(scope="session")
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


@pytest.fixture
def tiny_tags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """`tiny_tags(name, architecture)`: open_clip's model of this name is tiny, its tags are a file.

    Returns the file. Nothing is downloaded; a preprocessing that belongs to a tag stays.
    """
    import open_clip
    from safetensors.torch import save_file

    def shrink(name: str, architecture: dict[str, Any] | None = None) -> Path:
        changed = open_clip.get_model_config(name) | (architecture or TINY_ARCHITECTURE)
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, changed)
        torch.manual_seed(0)
        model = open_clip.create_model(name)
        for key, parameter in model.named_parameters():
            if "c_proj.weight" in key:  # random ones are too small for the activation to matter
                parameter.data *= 50
        path = tmp_path / "downloaded" / "weights.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
        monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(path))
        return path

    return shrink


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with random weights, as a model folder."""
    # here, since importing open_clip takes seconds that many tests do without
    from siftclip.datamodules.models.load import load_clip_model, save_model_folder

    folder = tmp_path_factory.mktemp("models") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        save_model_folder(load_clip_model("tiny", architecture=TINY_ARCHITECTURE), folder)
    return folder


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
    barrier, board = threading.Barrier(size, timeout=300), [None] * size

    def run(rank: int) -> T:
        try:
            return function(ThreadRanks(rank, size, barrier, board))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as executor:
        runs = [executor.submit(run, rank) for rank in range(size)]
    faults = [error for at in runs if (error := at.exception()) is not None]
    for error in faults:  # the rank that failed first, not those that waited for it
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [at.result() for at in runs]


@pytest.fixture(scope="session")
def run_on_ranks() -> Callable[[int, Callable[[Ranks], Any]], list[Any]]:
    """`(size, function(ranks))` calls the function on ranks in lockstep: the answers by rank."""
    return _run_on_ranks


class StartedProcess:
    """A process of the server that runs, used like subprocess.Popen."""

    def __init__(self, pid: int, status: Path) -> None:
        self.pid, self._status = pid, status

    def poll(self) -> int | None:
        return int(self._status.read_text()) if self._status.exists() else None

    def wait(self, timeout: float = 120) -> int:
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return status

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


class PythonServer:
    """Starts Python processes that have imported everything: see python_server.py."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(
        self, *words: str, cwd: Path, folder: Path, env: dict[str, str], ranks: int | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `python *words` in `cwd` to its end, on `ranks` if given; output goes to `folder`."""
        files = {name: folder / name for name in ("stdout", "stderr")}
        status = self._ask(words, cwd, env, ranks=ranks, **_texts(files))
        texts = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
        return subprocess.CompletedProcess(words, status, **texts)

    def start(
        self,
        *words: str,
        cwd: Path,
        folder: Path,
        env: dict[str, str],
        ranks: int | None = None,
        terminal: Path | None = None,
    ) -> StartedProcess:
        """The same, and do not wait for its end; all streams are those of a terminal if given."""
        status = folder / "status"
        files = {name: terminal or folder / name for name in ("stdout", "stderr")}
        if terminal is not None:
            files["stdin"] = terminal
        pid = self._ask(words, cwd, env, ranks=ranks, status=str(status), **_texts(files))
        return StartedProcess(pid, status)

    def _ask(self, words: Sequence[str], cwd: Path, env: dict[str, str], **more: Any) -> int:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("helpers") / "python_server.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"words": words, "cwd": str(cwd), "environment": env, **more}
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            return int(self._process.stdout.readline())
        except BaseException:  # such as a timeout: the answer may come later, and would mislead
            self.stop()
            raise

    def stop(self) -> None:
        """End the server and whatever it runs."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None


def _texts(paths: dict[str, Path]) -> dict[str, str]:
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture(scope="session")
def python_server() -> Iterator[PythonServer]:
    server = PythonServer()
    yield server
    server.stop()


@pytest.fixture
def child_environment() -> dict[str, str]:
    """The environment of a child: one thread, and no launcher's variables."""
    return environment_of_children()


@pytest.fixture
def run_python(
    python_server: PythonServer,
    child_environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_python(*words, cwd=..., ranks=None)`: `python *words`, which starts at once.

    What it prints is kept outside of the test's own folder.
    """
    folder = tmp_path_factory.mktemp("printed")

    def run(*words: str, cwd: Path, ranks: int | None = None) -> subprocess.CompletedProcess[str]:
        return python_server.run(*words, cwd=cwd, folder=folder, env=child_environment, ranks=ranks)

    return run


@pytest.fixture
def start_python(
    python_server: PythonServer,
    child_environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., StartedProcess]:
    """`start_python(*words, cwd=..., folder=..., terminal=None)`: the same, to be stopped.

    What it prints goes to the files `stdout` and `stderr` in `folder`, or to the terminal.
    """

    def start(*words: str, cwd: Path, folder: Path, terminal: Path | None = None) -> StartedProcess:
        return python_server.start(
            *words, cwd=cwd, folder=folder, env=child_environment, terminal=terminal
        )

    return start
