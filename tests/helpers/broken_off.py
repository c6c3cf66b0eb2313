"""Commands that are broken off at any moment, and what counts of what they leave.

A `Work` is a command with the files that are its answer. `answers` reads them into values that can
be compared: content, without the times and amounts of memory that no run repeats.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tiny_runs import NARROW_TEXT

OF_TIME = ("time", "second", "wait", "memory", "wall")  # parts of names whose values do not repeat

_COMMON = ("progress=false", "trainer.accelerator=cpu", "trainer.devices=1")
_POOL = ("pool.root=pool", "pool.cache_dir=cache", "output_dir=outputs", *_COMMON)
_FEATURES = ("features.root=features", "features.name=noise")
_TRAIN = (
    *(*_POOL, *_FEATURES, "model=vit_tiny", NARROW_TEXT, "logger=csv", "data.num_workers=0"),
    *("trainer.log_every_n_steps=1", "trainer.checkpoint_every_n_steps=3"),
    *("scale.samples_seen=288", "scale.global_batch_size=16", "optim.warmup_steps=2"),
)
_ALL = ("selector=random", "selector.fraction=1")
_RUN_FILES = ("outputs/train/*/model/*.safetensors", "outputs/train/*/metrics.jsonl")


def train_words(*more: str) -> tuple[str, ...]:
    """Return the words of a training command of 18 steps, which take a second."""
    given = {word.partition("=")[0] for word in more}
    return ("train", *(w for w in _TRAIN if w.partition("=")[0] not in given), *more)


@dataclass(frozen=True, kw_only=True)
class Work:
    """A command, and patterns of the files that are its answer."""

    words: tuple[str, ...]
    files: tuple[str, ...]
    needs_run: bool = False  # the folder `run` must be there


WORKS = {
    "index": Work(words=("index", *_POOL), files=("cache/index*/table-*/*.npy",)),
    "embed": Work(
        words=(
            *("embed", *_POOL, "features=open_clip", "features.root=embedded"),
            *("features.name=tiny", "features.model.name=run/model", "data.num_workers=0"),
        ),
        files=("embedded/**/*.npz",),
        needs_run=True,
    ),
    "target": Work(
        words=(
            *("target", "features=open_clip", "features.name=tiny", *_COMMON),
            *("features.model.name=run/model", "data.num_workers=0", "target.root=tasks"),
            *("target.split=test", "output_dir=outputs"),
        ),
        files=("outputs/**/*.npz",),
        needs_run=True,
    ),
    "score": Work(
        words=("score", *_POOL, *_FEATURES, "selector=negcliploss"),
        files=("outputs/scores/*/*.npz",),
    ),
    "select": Work(
        words=("select", *_POOL, *_FEATURES, "selector=negcliploss", "selector.fraction=0.3"),
        files=("outputs/selections/*/*.npy",),
    ),
    "train": Work(
        words=train_words("selector=clip_score", "selector.fraction=0.5"), files=_RUN_FILES
    ),
    "train every_step": Work(
        words=train_words(
            *(*_ALL, "online=every_step"),
            *("selector@online.selector=jest", "online.selector.fraction=0.5"),
        ),
        files=_RUN_FILES,
    ),
    "train every_n_steps": Work(
        words=train_words(*_ALL, "online=every_n_steps", "online.every_n_steps=5"),
        files=_RUN_FILES,
    ),
    "eval": Work(
        words=(
            *("eval", "run", "eval.root=tasks", "output_dir=outputs", "data.num_workers=0"),
            *("eval.resamples=50", *_COMMON),
        ),
        files=("run/eval_results.jsonl", "run/eval_results_outcomes/*.npz"),
        needs_run=True,
    ),
    "compare": Work(
        words=(
            *("compare", *_TRAIN, "eval.root=tasks", "eval.tasks=[colour]", "compare.seeds=[0]"),
            *("scale.samples_seen=160", "eval.resamples=50"),
        ),
        files=(*_RUN_FILES, "outputs/compare/*/results.csv"),
    ),
    "export": Work(
        words=("export", "export.source=run", "export.path=exported.pt"),
        files=("exported.pt",),
        needs_run=True,
    ),
    "data compact": Work(
        words=(
            *("data", "compact", *_POOL, *_FEATURES, "selector=clip_score"),
            *("selector.fraction=0.5", "compact.output=copy", "compact.shard_samples=20"),
        ),
        files=("copy/shards/*.tar", "copy/**/*.npy"),
    ),
}


def answers(folder: Path, work: Work) -> dict[str, Any]:
    """Read what a command has answered, by the name of the file."""
    paths = [path for pattern in work.files for path in folder.glob(pattern)]
    assert paths, f"none of {work.files} is there"
    return {str(path.relative_to(folder)): _content(path) for path in sorted(paths)}


def _content(path: Path) -> Any:
    if path.suffix == ".jsonl":
        records = map(_timeless, map(json.loads, path.read_text(encoding="utf-8").splitlines()))
        return sorted(json.dumps(record, sort_keys=True) for record in records)
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return [_timeless(row) for row in csv.DictReader(file)]
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {name: _digest(arrays[name].tobytes()) for name in arrays.files}
    return _digest(path.read_bytes())


def _timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _timeless(value) if isinstance(value, dict) else value
        for name, value in record.items()
        if not any(word in name for word in OF_TIME)
    }


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def leftovers(folder: Path) -> Iterator[Path]:
    """Find what a finished command must not leave: files that are half written."""
    for path in folder.rglob("*"):
        if path.name.endswith((".tmp", ".part")):
            yield path
