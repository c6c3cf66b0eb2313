"""A small pool with features, tasks and truth, made once; and ways to run the commands on it."""

from __future__ import annotations

import json
import logging
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from omegaconf import DictConfig
from tiny_runs import NARROW_TEXT
from torch.utils.data import DataLoader, Sampler

from siftclip.datamodules.pool.pool import open_pool
from siftclip.datamodules.storage.local import LocalStorage
from siftclip.datamodules.streaming.loader_process import leave_process_group
from siftclip.files import write_npz
from siftclip.trainer.cli import main
from siftclip.trainer.demo.pool import DemoData, write_demo_data
from siftclip.trainer.settings.commands import COMMANDS
from siftclip.trainer.settings.read_command import compose as read_composed
from siftclip.trainer.settings.store import composing as initialized

Completed = Callable[..., subprocess.CompletedProcess[str]]

POOL_SAMPLES = 240
# Small and without batch norm, so that ranks and batches do not change what is computed.
TINY_RUN = [
    "model=vit_tiny",
    NARROW_TEXT,
    "scale.samples_seen=96",
    "scale.global_batch_size=16",
    "optim.warmup_steps=2",
    "logger=csv",
    "progress=false",
    "data.num_workers=0",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
]


@pytest.fixture(scope="session", autouse=True)
def one_vocabulary(vocabulary_once: None) -> None:
    """Every model has the same one."""


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    """A pool with features under the name `noise`, in the folder `features`, and four tasks."""
    root = tmp_path_factory.mktemp("demo")
    data = write_demo_data(
        root,
        pool_samples=POOL_SAMPLES,
        teacher_samples=48,
        classification_samples=30,
        count_samples=20,
        retrieval_samples=20,
        progress=False,
    )
    pool = open_pool(
        LocalStorage(str(data.pool)), cache_dir=root / "cache", max_bad_fraction=0, progress=False
    )
    generator = np.random.default_rng(0)
    features = generator.standard_normal((2, len(pool), 8))
    features /= np.linalg.norm(features, axis=2, keepdims=True)
    image, text = features.astype(np.float16)
    write_npz(root / "features" / "part.npz", uids=pool.uids, noise_img=image, noise_txt=text)
    return data


@pytest.fixture(scope="session")
def base_of(demo_data: DemoData) -> Callable[[Path], list[str]]:
    """`base_of(folder)`: overrides of a tiny run that writes into a folder alone."""

    def overrides(folder: Path) -> list[str]:
        return [
            *TINY_RUN,
            f"pool.root={demo_data.pool}",
            f"pool.cache_dir={demo_data.root / 'cache'}",
            f"features.root={demo_data.root / 'features'}",
            "features.name=noise",
            f"output_dir={folder / 'outputs'}",
        ]

    return overrides


@pytest.fixture
def base(base_of: Callable[[Path], list[str]], tmp_path: Path) -> list[str]:
    """Overrides of a tiny run that writes into `tmp_path` alone."""
    return base_of(tmp_path)


@contextmanager
def hydra_tree() -> Iterator[Callable[..., Any]]:
    GlobalHydra.instance().clear()
    with initialized():
        yield composed


def composed(command: str, overrides: Sequence[str], kind: type | None = None) -> Any:
    """The settings of a command, by the name of its file; or of a kind that has less."""
    name = command.replace("_", " ")
    return read_composed(kind or COMMANDS[name], name, overrides)


@pytest.fixture
def compose() -> Iterator[Callable[..., Any]]:
    """Compose the settings of a command, as the console script does."""
    with hydra_tree() as function:
        yield function


@pytest.fixture
def compose_tree(compose: Callable[..., Any]) -> Callable[..., DictConfig]:
    """Compose the configuration of a command, as Hydra has it."""
    return lambda command, overrides: hydra.compose(command, overrides=list(overrides))


@pytest.fixture(scope="session")
def composing() -> Callable[[], AbstractContextManager[Callable[..., Any]]]:
    """`with composing() as compose`: the same for a fixture that several tests share."""
    return hydra_tree


@pytest.fixture
def copy_pool(demo_data: DemoData, tmp_path: Path) -> Path:
    """A copy of the pool that a test may damage."""
    return Path(shutil.copytree(demo_data.pool, tmp_path / "pool"))


def siftclip_command(*arguments: str, ranks: int | None = None) -> list[str]:
    """The command line of a siftclip command, under torchrun if `ranks` is given."""
    launcher = [sys.executable]
    if ranks is not None:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
        launcher += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    return [*launcher, "-m", "siftclip.trainer.cli", *arguments]


@pytest.fixture
def cli(run_python: Completed, tmp_path: Path) -> Completed:
    """Run `siftclip ...` in `tmp_path`, in a process forked from one that has imported the rest."""

    def run(*arguments: str, ranks: int | None = None) -> subprocess.CompletedProcess[str]:
        return run_python("-m", "siftclip.trainer.cli", *arguments, cwd=tmp_path, ranks=ranks)

    return run


@pytest.fixture
def typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Completed:
    """Run `siftclip ...` in `tmp_path` and in this process, which takes no second to start."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["siftclip", *words])
        status: Any = 0
        try:
            main._run([*words])
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(words, status, out, err)

    return run


@pytest.fixture
def new_cli(child_environment: dict[str, str], tmp_path: Path) -> Completed:
    """The same as a person starts it: a new Python, or torchrun, which takes seconds more."""

    def run(*arguments: str, ranks: int | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            siftclip_command(*arguments, ranks=ranks),
            cwd=tmp_path,
            env=child_environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    return run


@pytest.fixture
def launch(run_python: Completed, tmp_path: Path) -> Completed:
    """Run a Python script in `tmp_path` on several ranks."""

    def run(*arguments: str, ranks: int) -> subprocess.CompletedProcess[str]:
        return run_python(*arguments, cwd=tmp_path, ranks=ranks)

    return run


TRAIN_MANY = """
import json, sys
from omegaconf import OmegaConf
from siftclip.trainer.settings.commands import TrainCommand
from siftclip.trainer.settings.read_command import read_command
from siftclip.trainer.stages.train import train_stage

for config in json.loads(sys.argv[1]):
    train_stage(read_command(TrainCommand, OmegaConf.create(config)))
"""


@pytest.fixture
def train_on_ranks(launch: Completed, tmp_path: Path) -> Callable[[list[Any], int], None]:
    """`train_on_ranks(configs, ranks)`: the runs one after the other, on so many ranks."""

    def train(configs: list[Any], ranks: int) -> None:
        (tmp_path / "train_many.py").write_text(TRAIN_MANY)
        result = launch("train_many.py", json.dumps(configs), ranks=ranks)
        assert result.returncode == 0, result.stderr[-5000:]

    return train


@pytest.fixture
def start_cli(start_python: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Start `siftclip ...`, to be stopped; its errors go to `tmp_path`.printed/stderr."""

    def start(*arguments: str) -> Any:
        folder = tmp_path.with_suffix(".printed")
        folder.mkdir()
        return start_python("-m", "siftclip.trainer.cli", *arguments, cwd=tmp_path, folder=folder)

    return start


@pytest.fixture
def at_terminal(
    start_python: Callable[..., Any], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[int, str]]:
    """`at_terminal(*words, answer="y")`: run `siftclip ...` at a terminal and answer its question.

    Returns the exit status and what it prints. `before()` is called before it is answered.
    """

    def run(
        *words: str, answer: str = "", before: Callable[[], object] = lambda: None
    ) -> tuple[int, str]:
        own, others = pty.openpty()
        terminal, folder = Path(os.ttyname(others)), tmp_path_factory.mktemp("printed")
        command = ("-m", "siftclip.trainer.cli", *words)
        process = start_python(*command, cwd=tmp_path, folder=folder, terminal=terminal)
        text, has_ended = "", False
        while select.select([own], [], [], 0.2)[0] or not has_ended:
            has_ended = process.poll() is not None
            if select.select([own], [], [], 0)[0]:
                text += os.read(own, 1 << 16).decode(errors="replace")
            if answer and "? [y/N]" in text:
                before()
                os.write(own, f"{answer}\n".encode())
                answer = ""
        os.close(others)
        os.close(own)
        return process.wait(), text

    return run


class FromStep(Sampler[int]):
    """The numbers from `start` on; as long as the whole run, like the order of a stream."""

    def __init__(self, start: int, total: int) -> None:
        self.start, self.total = start, total

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.total))


class TinyTraining(LightningModule):
    """Three weights by manual optimization, a few batches a step, from the step of the trainer.

    `after_batch(step)` is called at the end of each training step, inside it.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        batches_a_step: int = 1,
        num_workers: int = 0,
        after_batch: Callable[[int], None] = lambda step: None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.tensor([0.1, 0.2, 0.3]))
        self.total_steps, self.batches_a_step = total_steps, batches_a_step
        self.num_workers, self.after_batch = num_workers, after_batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def training_step(self, batch: int, batch_idx: int) -> None:
        inputs = torch.sin(torch.tensor([1.0, 2.0, 3.0]) * batch)
        self.manual_backward((self.weight * inputs - 1).square().sum())
        if (batch_idx + 1) % self.batches_a_step == 0:
            optimizer = self.optimizers()
            optimizer.step()  # type: ignore[union-attr]
            optimizer.zero_grad()  # type: ignore[union-attr]
        self.after_batch(self.trainer.global_step)

    def train_dataloader(self) -> DataLoader[int]:
        total = self.total_steps * self.batches_a_step
        return DataLoader(
            range(total),  # type: ignore[arg-type]
            batch_size=None,
            sampler=FromStep(self.trainer.global_step * self.batches_a_step, total),
            num_workers=self.num_workers,
            worker_init_fn=leave_process_group if self.num_workers else None,
        )

    def fit(self, *callbacks: Callback, resume: Path | None = None, **options: Any) -> Trainer:
        """Train on the CPU with these callbacks, and give back the trainer."""
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        trainer = Trainer(
            accelerator="cpu",
            max_steps=self.total_steps,
            max_epochs=-1,
            callbacks=[*callbacks],
            logger=False,
            enable_checkpointing=any(isinstance(one, Checkpoint) for one in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            **options,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*treespec.*LeafSpec.*")
            warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
            warnings.filterwarnings("ignore", ".*ended before the epoch ended.*")
            trainer.fit(self, ckpt_path=resume, weights_only=True)
        return trainer


@pytest.fixture
def tiny_training() -> type[TinyTraining]:
    return TinyTraining


@pytest.fixture
def hangups() -> Iterator[None]:
    """Let SIGHUP come, which is ignored where the tests were started by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
