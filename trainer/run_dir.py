"""A run directory: everything that one run leaves behind, and the only thing a report reads.

config.yaml      the resolved configuration
versions.json    versions of what it ran on, and the git commit
selection.npy    the selection in DataComp's format; selection.json its manifest
metrics.jsonl    a record every N steps; metrics.csv the same
checkpoints/     to continue from
model/           the trained model, as open_clip's `local-dir:` loads it
eval_results.jsonl  a line a task
budget.json      how long the run is
summary.json     written last: the run is finished
.lock            while a process trains: which one, and since when
"""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from siftclip.datamodules.clip_models import CONFIG_NAME, MODEL_FOLDER
from siftclip.datamodules.files import read_json, read_jsonl, write_json, write_text
from siftclip.datamodules.locks import LOCK_NAME
from siftclip.datamodules.selection import Selection, write_selection
from siftclip.trainer.budget import Budget

METRICS_NAME = "metrics.jsonl"
RESULTS_NAME = "eval_results.jsonl"
_SHARE = "online/share_"
PACKAGES = (
    "siftclip",
    "torch",
    "torchvision",
    "lightning",
    "open_clip_torch",
    "webdataset",
    "clip-benchmark",
    "wandb",
    "numpy",
    "pillow",
)


def is_rank_zero() -> bool:
    """Whether this process writes what all ranks share."""
    # Here, since importing Lightning takes seconds, which an evaluation need not cost.
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    return (getattr(rank_zero_only, "rank", 0) or 0) == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDir:
    """Paths and small files of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / MODEL_FOLDER

    @property
    def lock(self) -> Path:
        """Of the one process that trains, see `siftclip.datamodules.locks`."""
        return self.path / LOCK_NAME

    @property
    def results(self) -> Path:
        return self.path / RESULTS_NAME

    @property
    def has_model(self) -> bool:
        """Whether training has finished and the model is written."""
        return (self.model / CONFIG_NAME).is_file()

    @property
    def summary(self) -> dict[str, Any] | None:
        """What the run says about itself; None while it is not finished."""
        path = self.path / "summary.json"
        return read_json(path) if path.is_file() else None

    def latest_checkpoint(self) -> Path | None:
        """The checkpoint to continue from: the one of the highest step."""
        found = list(self.checkpoints.glob("step-*.ckpt"))
        return max(found, key=lambda path: int(path.stem.split("-")[1]), default=None)

    def budget(self) -> Budget | None:
        """How long the run is, once that is known."""
        path = self.path / "budget.json"
        return Budget(**read_json(path)) if path.is_file() else None

    def keep_budget(self, budget: Budget) -> None:
        """Write down how long the run is: what was measured for it need not come out again."""
        write_json(
            self.path / "budget.json",
            {"samples_seen": budget.samples_seen, "global_batch_size": budget.global_batch_size},
        )

    def costs(self) -> dict[str, float]:
        """Samples and FLOPs of the whole run, by name, as the last record of the log has them."""
        found: dict[str, float] = {}
        for record in read_jsonl(self.path / METRICS_NAME):
            found.update({k[5:]: v for k, v in record.items() if k.startswith("cost/")})
        return found

    def copies_fraction(self) -> float:
        """The share of batches that held a sample twice, of the selection that had the most."""
        records = read_jsonl(self.path / METRICS_NAME)
        return max((record.get("data/copies_fraction", 0.0) for record in records), default=0.0)

    def cost_line(self) -> str:
        """What a finished run has cost, in a line."""
        found = self.summary or {}
        return (
            f"{found['trained_samples']:,.0f} samples trained, {found['loaded_samples']:,.0f} "
            f"loaded; {found['flops']:.3g} FLOPs; {found['train_seconds']:.1f} s, of these waiting "
            f"{found['data_wait_seconds']:.1f}, scoring {found['scoring_seconds']:.1f}, selecting "
            f"{found['selection_seconds']:.1f}"
        )

    def shares_chosen(self) -> dict[str, float]:
        """The share of each kind among what was chosen in the loop, mean over the log's steps."""
        found: dict[str, dict[int, float]] = {}
        for record in read_jsonl(self.path / METRICS_NAME):
            for name, value in record.items():
                if name.startswith(_SHARE) and not name.endswith("_offered"):
                    found.setdefault(name.removeprefix(_SHARE), {})[record["step"]] = value
        return {kind: sum(values.values()) / len(values) for kind, values in found.items()}

    def seconds(self) -> dict[str, float]:
        """Seconds of training by what they went into, over all processes that worked on the run.

        `train_seconds` is all of it; `data_wait_seconds`, `scoring_seconds` and
        `selection_seconds` are parts of it, and what is left of them the training steps
        themselves. Steps that were repeated after a restart count once: the time that the run would
        have taken without the restart.
        """
        windows = {
            record["step"]: record
            for record in read_jsonl(self.path / METRICS_NAME)
            if "train/batch_time" in record
        }
        steps = sorted(windows)
        lengths = [step - before for step, before in zip(steps, [0, *steps], strict=False)]

        def total(name: str) -> float:
            return float(
                sum(
                    windows[step].get(name, 0.0) * n for step, n in zip(steps, lengths, strict=True)
                )
            )

        return {
            "train_seconds": total("train/batch_time"),
            "data_wait_seconds": total("train/data_time"),
            "scoring_seconds": total("train/scoring_time"),
            "selection_seconds": total("train/selection_time"),
        }

    def start(self, config: DictConfig, selection: Selection) -> None:
        """Write down what the run is, before its first step."""
        write_text(self.path / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
        write_json(self.path / "versions.json", versions())
        write_selection(selection, self.path)

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the run as finished."""
        write_json(self.path / "summary.json", summary)


def versions() -> dict[str, str | None]:
    """Versions of Python, the platform and the packages that decide about results; git commit."""
    found: dict[str, str | None] = {"python": platform.python_version(), "git": git_commit()}
    found["platform"] = platform.platform()
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def git_commit() -> str | None:
    """The commit of the checkout that this code runs from, with `-dirty`; None when installed."""
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
