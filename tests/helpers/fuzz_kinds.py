"""Real files of each kind that is read, how each is mutated, and what reads it.

The only allowed outcomes are a value, an InputError, and bad samples that are counted.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from hostile_server import serve
from mutations import (
    mutate_archive,
    mutate_bytes,
    mutate_json,
    mutate_lines,
    mutate_npy,
    mutate_npz,
    mutate_parquet,
    mutate_safetensors,
    mutate_tar,
    mutate_yaml,
    npy_bytes,
)
from PIL import Image
from safetensors.torch import save_file
from wandb.proto.wandb_internal_pb2 import Record

from siftclip.datamodules.features.files import read_feature_file
from siftclip.datamodules.features.rows import RowFeatures
from siftclip.datamodules.features.store import open_features
from siftclip.datamodules.index.tar_index import build_shard_index, load_shard_index
from siftclip.datamodules.index.tar_walk import LocalTar
from siftclip.datamodules.index.uids import format_uid, to_structured
from siftclip.datamodules.models.load import load_clip_model, save_model_folder
from siftclip.datamodules.models.weights import load_weights, read_weights
from siftclip.datamodules.models.weights import read_config as read_model_config
from siftclip.datamodules.pool.image_sizes import read_image_sizes
from siftclip.datamodules.pool.metadata import read_labels, read_metadata
from siftclip.datamodules.pool.pool import Pool, make_storage, open_pool
from siftclip.datamodules.pool.reader import BadSampleError, SampleReader
from siftclip.datamodules.selection.columns import read_column, read_pool_column, read_pool_lists
from siftclip.datamodules.selection.compaction import _finished_shards
from siftclip.datamodules.selection.run import read_run_selection
from siftclip.datamodules.selection.selection import Selection, read_subset, write_selection
from siftclip.datamodules.storage.local import identify_shards
from siftclip.errors import InputError
from siftclip.eval.download.checksums import read_checksums
from siftclip.eval.encoding.feature_cache import FeatureCache
from siftclip.eval.metrics.outcomes import Outcomes
from siftclip.eval.results.files import TaskResult, append_result, read_kept
from siftclip.eval.tasks.samples import read_samples
from siftclip.eval.tasks.task import read_task
from siftclip.files import append_jsonl, write_json, write_npz
from siftclip.locks import describe_holder
from siftclip.selectors.core.source import ExternalColumn, FeatureFile
from siftclip.trainer.runtime.environment import environments
from siftclip.trainer.runtime.loggers import wandb_run_id
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.runtime.tracking.wandb_files import logged_rows
from siftclip.trainer.stages.export import _run_settings

ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {"layers": 1, "width": 8, "head_width": 8, "patch_size": 8, "image_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}
CONFIG = """\
seed: 0
pool: {root: pool, max_bad_fraction: 0.01}
model:
  name: vit_tiny
  pretrained: null
  architecture:
    embed_dim: 8
    vision_cfg: {layers: 1, width: 8}
  options: {force_quick_gelu: null}
optim: {lr: 0.001, warmup_steps: 5}
scale: {samples_seen: 64, global_batch_size: 16}
"""
SAMPLES = 12
WANDB_ID = "run-0123abcd"


class Kind(NamedTuple):
    """A kind of file."""

    path: str  # in the folder of the base files
    mutate: Callable[[bytes, Random], bytes]
    read: Callable[[Path, Path], object]  # the folder, and the mutated file


class Counted(Exception):
    """Bad samples were counted."""


# ---- the base files ------------------------------------------------------------------------------
def write_base(root: Path) -> None:
    """Write a file of each kind."""
    uids = np.stack([np.zeros(SAMPLES, np.uint64), np.arange(SAMPLES, dtype=np.uint64)], axis=1)
    names = [format_uid(uid) for uid in uids]
    for shard in range(2):
        rows = range(shard * 6, shard * 6 + 6)
        _write_tar(root / f"pool/shards/{shard:08d}.tar", rows, names)
    _write_metadata(root / "pool/metadata", names)
    write_selection(_selection(uids), root / "run", scores=True)
    _write_run(root / "run")
    _write_features(root / "features")
    _write_task(root / "tasks/wds_own", names)
    _write_records(root / "records")
    clip = load_clip_model("tiny", architecture=ARCHITECTURE)
    save_model_folder(clip, root / "model")
    torch.save(clip.model.state_dict(), root / "model.pt")
    content = {"state_dict": clip.model.state_dict(), "epoch": 1, "open_clip_config": clip.config}
    torch.save(content, root / "run/step-1.ckpt")
    pool = open_base_pool(root)  # makes the index
    for name, place in (("table", pool.table_folder), ("probes", pool.table_folder.parent)):
        (root / name).symlink_to(place)  # whose own name is a hash
    for name in ("index", "features/kept"):
        (root / name).mkdir()
    _read_index(root, root / "index/kept.npz")
    (root / "features/kept.npz").rename(root / "features/kept/kept.npz")


def _write_tar(path: Path, rows: range, names: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for row in rows:
            record = {"uid": names[row], "width": 20, "height": 10}
            parts = {"jpg": _image(row), "txt": b"a caption", "json": json.dumps(record).encode()}
            _add(archive, f"{row:06d}", parts)


def _add(archive: tarfile.TarFile, key: str, parts: dict[str, bytes]) -> None:
    for suffix, data in parts.items():
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))


def _image(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def _unit_vectors(rows: int, columns: int = 8) -> np.ndarray:
    values = np.random.default_rng(rows).standard_normal((rows, columns))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


def _write_metadata(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True)
    table = {
        "uid": names,
        "score": np.linspace(0, 1, SAMPLES),
        "kind": ["a", "b"] * (SAMPLES // 2),
        "concepts": [[row % 3] for row in range(SAMPLES)],
        "original_width": range(SAMPLES),
        "original_height": range(SAMPLES),
    }
    pd.DataFrame(table).to_parquet(folder / "a.parquet")
    np.savez(folder / "a.npz", l14_img=_unit_vectors(SAMPLES), l14_txt=_unit_vectors(SAMPLES))


def _selection(uids: np.ndarray) -> Selection:
    manifest = {
        "selector": "clip_score", "pool": {"root": "pool"}, "kept_samples": SAMPLES,
        "kept_distinct": SAMPLES, "kept_fraction": 1.0, "unjudged_samples": 0, "never_samples": 0,
        "score_quantiles_pool": {"q50": 0.5}, "score_quantiles_kept": {"q50": 0.5},
        "members": [{"selector": "a", "samples": 1, "kept_distinct": 1, "seconds": 0.1}],
        "warnings": ["a"],
        "weights": {"min": 1.0, "mean": 1.0, "max": 1.0},
        "cost": {"seconds": 0.1, "cpu_seconds": 0.1, "ranks": 1, "device": "cpu"},
    }  # fmt: skip
    return Selection(
        uids=uids,
        multiplicities=np.ones(SAMPLES, np.int64),
        manifest=manifest,
        weights=np.ones(SAMPLES, np.float32),
        scores=np.linspace(0, 1, SAMPLES, dtype=np.float32),
    )


def _write_run(folder: Path) -> None:
    (folder / "config.yaml").write_text(CONFIG)
    write_json(folder / "budget.json", {"samples_seen": 64, "global_batch_size": 16})
    write_json(folder / "identity.json", {"format": 2, "selector": {"a": [1]}, "seed": 0})
    write_json(folder / "versions.json", {"python": "3.11", "threads": 1})
    summary = {"selector": "random", "seed": 0, "steps": 4, "coverage": 1.0, "train_seconds": 3.2}
    write_json(folder / "summary.json", summary)
    for step in range(3):
        append_jsonl(folder / "metrics.jsonl", {"step": step, "train/loss": 1.5})
        append_jsonl(folder / "sessions.jsonl", {"step": step, "environment": {"threads": step}})
    (folder / "wandb_id").write_text(f"{WANDB_ID}\n")
    part = folder / f"wandb/offline-run-0-x/run-{WANDB_ID}.wandb"
    part.parent.mkdir(parents=True)
    part.write_bytes(_part_of_wandb())
    units = np.arange(6, dtype=np.uint64)
    value = np.array([1, 0, 1, 1, 0, 1], np.float32)
    for name, statistic, arrays in (
        ("one", "mean", {"value": value}),
        ("two", "worst_cell", {"value": value, "cell": np.zeros(6, np.int64)}),
        ("three", "f1_macro", {"predicted": np.arange(6) % 2, "label": np.arange(6) % 2}),
    ):
        main = {"one": float(value.mean()), "two": float(value.mean()), "three": 1.0}[name]
        result = TaskResult(
            key=name, dataset=name, metrics={"main_metric": main, "acc1": main},
            main_metric_name="acc1", samples=6, interval=(main - 0.1, min(main + 0.1, 1.0)),
            family="own", seconds=0.5, model="m", units=units,
            outcomes=Outcomes(statistic=statistic, arrays=arrays),
        )  # fmt: skip
        append_result(folder / "eval_results.jsonl", result)


def _part_of_wandb() -> bytes:
    """Build a log in LevelDB's format, with one chunk a record: checksum, length, type."""
    content = b":W&B\0\0\0"
    for step in range(4):
        record = Record()
        for key, value in (("_step", step), ("trainer/global_step", step + 1), ("loss", 0.5)):
            record.history.item.add(key=key, value_json=json.dumps(value))
        data = record.SerializeToString()
        content += struct.pack("<IHB", 0, len(data), 1) + data
    return content


def _write_features(folder: Path) -> None:
    folder.mkdir()
    values = _unit_vectors(9)
    np.save(folder / "target.npy", values)
    np.savez(folder / "target.npz", img=values, model="x", activation="GELU")
    save_file({"img": torch.from_numpy(values)}, folder / "target.safetensors")
    torch.save({"img": torch.from_numpy(values), "txt": torch.zeros(2, 3)}, folder / "target.pt")
    write_npz(
        folder / "kept.npz", ids=np.arange(3, dtype=np.uint64), features=np.ones((3, 4), "f4")
    )
    uids = np.stack([np.zeros(4, np.uint64), np.arange(4, dtype=np.uint64)], axis=1)
    (folder / "subset.npy").write_bytes(npy_bytes(to_structured(uids)))
    table = np.zeros(4, dtype=[("f0", "<u8"), ("f1", "<u8"), ("score", "<f4")])
    table["f1"] = np.arange(4)
    (folder / "scores.npy").write_bytes(npy_bytes(table))


def _write_task(folder: Path, names: list[str]) -> None:
    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("a cat\na dog\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of {c}.\n{c}\n")
    (folder / "test/nshards.txt").write_text("1\n")
    with tarfile.open(folder / "test/0.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for row in range(6):
            _add(archive, f"s{row:04d}", {"png": _image(row), "cls": b"%d" % (row % 2)})


def _write_records(folder: Path) -> None:
    folder.mkdir()
    files = {"test/0.tar": {"size": 3, "sha256": "ab"}}
    record = {"repository": "a", "revision": "", "commit": "c", "splits": ["test"], "files": files}
    write_json(folder / "checksums.json", record)
    state = {"name": "0.tar", "samples": 2, "bytes": 9, "faults": {"counts": {}, "examples": {}}}
    write_json(folder / "compact.json", {"members": "x", "pool": "y", "shards": [state]})
    holder = {"pid": 3, "host": "h", "since": "now", "command": "siftclip train"}
    write_json(folder / ".lock", holder)


def open_base_pool(root: Path) -> Pool:
    """Open the pool, without bound on what is bad."""
    folder = root / "cache"
    storage = make_storage(str(root / "pool"), cache_dir=folder, options={}, shard_cache_gb=0)
    return open_pool(storage, cache_dir=folder, max_bad_fraction=1.0, progress=False)


# ---- what reads them -----------------------------------------------------------------------------
@cache
def _base_pool(root: Path) -> Pool:
    return open_base_pool(root)


def _read_tar(_: Path, path: Path) -> None:
    with LocalTar(path) as tar:
        index = build_shard_index(tar, path.name)
    size = path.stat().st_size
    for offsets, sizes in (
        (index.sample_offsets_bytes, index.sample_sizes_bytes),
        (index.image_offsets_bytes, index.image_sizes_bytes),
        (index.text_offsets_bytes, index.text_sizes_bytes),
    ):
        assert (offsets >= 0).all()
        assert (sizes >= 0).all()
        assert (offsets + sizes <= size + 511).all()
    if index.faults.samples or index.truncated:
        raise Counted(index.faults.summary())


def _read_task(root: Path, _: Path) -> None:
    read_samples(read_task(root / "tasks/wds_own"))


def _read_store(root: Path, path: Path) -> None:
    keys = ("l14_img", "l14_txt")
    pool = _base_pool(root)
    store = open_features(pool, folder=path.parent, keys=keys, max_bad_fraction=1.0)
    RowFeatures.build(store, keys, len(pool)).gather(np.arange(len(pool)))
    if store.pool_coverage.present < len(pool):
        raise Counted


def _read_features(_: Path, path: Path, key: str | None = None) -> None:
    for chunk in read_feature_file(FeatureFile(path=str(path), key=key), 4):
        chunk.float().sum()


def _read_tables(root: Path, path: Path) -> None:
    pool = _base_pool(root)
    faults = read_metadata(path).faults
    for read in (
        lambda: read_pool_column(pool, ExternalColumn(path=None, column="score")),
        lambda: read_pool_lists(pool, ExternalColumn(path=None, column="concepts")),
        lambda: read_image_sizes(pool, progress=False),
        lambda: read_labels(path, "kind"),
        lambda: read_column(pool, path, "score"),
    ):
        try:
            read()
        except InputError:  # others may read what they need
            continue
    if faults.samples:
        raise Counted(faults.summary())


def _read_scores(root: Path, path: Path) -> None:
    read_column(_base_pool(root), path, "score")


def _read_index(root: Path, path: Path) -> None:
    tar = root / "pool/shards/00000000.tar"
    index = load_shard_index(
        tar.name, _base_pool(root).shards[0].stamp, partial(LocalTar, tar), path
    )
    assert len(index) == 6  # a cache is only a cache


def _read_pool(root: Path, _: Path) -> None:
    pool = open_base_pool(root)
    assert len(pool) == SAMPLES
    pool.table.find(pool.uids)


def _read_probes(root: Path, path: Path) -> None:
    identify_shards(_base_pool(root).shards, path.parent)


def _read_run(_: Path, path: Path) -> None:
    run = RunDir(path=path.parent)
    readers: dict[str, Callable[[], object]] = {
        "budget.json": run.budget,
        "identity.json": run.identity,
        "summary.json": lambda: run.summary,
        "metrics.jsonl": lambda: (run.costs(), run.seconds(), run.metrics),
        "versions.json": lambda: environments(run.path),
        "sessions.jsonl": lambda: environments(run.path),
        "config.yaml": lambda: _run_settings(run),
    }
    readers[path.name]()


def _read_selection(_: Path, path: Path) -> None:
    read_run_selection(path.parent)


def _read_results(root: Path, _: Path) -> None:
    read_kept(root / "run/eval_results.jsonl")


def _read_weights(root: Path, path: Path) -> None:
    read_model_config(path)
    read_weights(path)
    load_weights(_base_model(root), path)


@cache
def _base_model(root: Path) -> torch.nn.Module:
    return load_clip_model("tiny", architecture=ARCHITECTURE).model


def _read_model(_: Path, path: Path) -> None:
    load_clip_model(str(path.parent))


def _read_cache(_: Path, path: Path) -> None:
    FeatureCache(path.parent).find(np.arange(4, dtype=np.uint64))


def _read_compaction(_: Path, path: Path) -> None:
    _finished_shards(path.parent, {"members": "x", "pool": "y"}, ["0.tar"])


_mutate_checkpoint = partial(mutate_archive, mutate_member=mutate_bytes)

KINDS: dict[str, Kind] = {
    "tar": Kind("pool/shards/00000000.tar", mutate_tar, _read_tar),
    "tar of a task": Kind("tasks/wds_own/test/0.tar", mutate_tar, _read_task),
    "class names": Kind("tasks/wds_own/classnames.txt", mutate_bytes, _read_task),
    "templates": Kind(
        "tasks/wds_own/zeroshot_classification_templates.txt", mutate_bytes, _read_task
    ),
    "nshards.txt": Kind("tasks/wds_own/test/nshards.txt", mutate_bytes, _read_task),
    "npz of features": Kind("pool/metadata/a.npz", mutate_npz, _read_store),
    "parquet": Kind("pool/metadata/a.parquet", mutate_parquet, _read_tables),
    "parquet of features": Kind("pool/metadata/a.parquet", mutate_parquet, _read_store),
    "npz of a target": Kind("features/target.npz", mutate_npz, partial(_read_features, key="img")),
    "npy of a target": Kind("features/target.npy", mutate_npy, _read_features),
    "safetensors of a target": Kind(
        "features/target.safetensors", mutate_safetensors, _read_features
    ),
    "pt of a target": Kind(
        "features/target.pt", _mutate_checkpoint, partial(_read_features, key="img")
    ),
    "subset": Kind("features/subset.npy", mutate_npy, lambda _, path: read_subset(path)),
    "npy of scores": Kind("features/scores.npy", mutate_npy, _read_scores),
    "features of an evaluation": Kind("features/kept/kept.npz", mutate_npz, _read_cache),
    "index": Kind("index/kept.npz", mutate_npz, _read_index),
    "table's notes": Kind("table/notes.json", mutate_json, _read_pool),
    "table's arrays": Kind("table/uids.npy", mutate_npy, _read_pool),
    "table's tars": Kind("table/shard_of_row.npy", mutate_npy, _read_pool),
    "probes.json": Kind("probes/probes.json", mutate_json, _read_probes),
    "selection.json": Kind("run/selection.json", mutate_json, _read_selection),
    "selection.npy": Kind("run/selection.npy", mutate_npy, _read_selection),
    "scores.npy": Kind("run/scores.npy", mutate_npy, _read_selection),
    "weights.npy": Kind("run/weights.npy", mutate_npy, _read_selection),
    "eval_results.jsonl": Kind("run/eval_results.jsonl", mutate_lines, _read_results),
    "npz of outcomes": Kind("run/eval_results_outcomes/two.npz", mutate_npz, _read_results),
    "npz of outcomes, f1": Kind("run/eval_results_outcomes/three.npz", mutate_npz, _read_results),
    "budget.json": Kind("run/budget.json", mutate_json, _read_run),
    "identity.json": Kind("run/identity.json", mutate_json, _read_run),
    "summary.json": Kind("run/summary.json", mutate_json, _read_run),
    "versions.json": Kind("run/versions.json", mutate_json, _read_run),
    "metrics.jsonl": Kind("run/metrics.jsonl", mutate_lines, _read_run),
    "sessions.jsonl": Kind("run/sessions.jsonl", mutate_lines, _read_run),
    "wandb_id": Kind("run/wandb_id", mutate_bytes, lambda _, path: wandb_run_id(path.parent)),
    "part of a wandb run": Kind(
        f"run/wandb/offline-run-0-x/run-{WANDB_ID}.wandb",
        mutate_bytes,
        lambda root, _: logged_rows(root / "run", WANDB_ID),
    ),
    "config.yaml": Kind("run/config.yaml", mutate_yaml, _read_run),
    "checkpoint": Kind("run/step-1.ckpt", _mutate_checkpoint, _read_weights),
    "state dict": Kind("model.pt", _mutate_checkpoint, _read_weights),
    "safetensors": Kind("model/open_clip_model.safetensors", mutate_safetensors, _read_weights),
    "open_clip_config.json": Kind("model/open_clip_config.json", mutate_json, _read_model),
    "checksums.json": Kind(
        "records/checksums.json", mutate_json, lambda _, path: read_checksums(path.parent)
    ),
    "compact.json": Kind("records/compact.json", mutate_json, _read_compaction),
    "lock": Kind("records/.lock", mutate_json, lambda _, path: describe_holder(path)),
}


def outcome_of_answers(root: Path, random: Random) -> str:
    """Open a pool behind a server that answers wrongly, and read samples; see `outcome_of`.

    The pauses between attempts, and how long an answer may take, are set by the caller.
    """
    cache = root / f"cache-{random.randrange(10**9)}"
    with serve(root, random) as url:
        try:
            storage = make_storage(
                f"{url}/pool/shards/{{00000000..00000001}}.tar",
                cache_dir=cache,
                options={},
                shard_cache_gb=random.choice((0, 0, 1)),
            )
            pool = open_pool(storage, cache_dir=cache, max_bad_fraction=1.0, progress=False)
            reader = SampleReader(pool=pool, max_image_pixels=10_000)
            samples = [sample for _, sample in reader.read(np.arange(len(pool)))]
        except InputError as error:
            return "error" if len(str(error)) < 3000 else "a message of pages"
        finally:
            shutil.rmtree(cache, ignore_errors=True)
    is_whole = len(pool) == SAMPLES
    return "value" if is_whole and not any(map(_is_bad, samples)) else "counted"


def _is_bad(sample: object) -> bool:
    return isinstance(sample, BadSampleError)


# ---- inputs --------------------------------------------------------------------------------------
@contextmanager
def mutated(root: Path, kind: Kind, random: Random) -> Iterator[Path]:
    """Put a mutated file in the place of the base one inside the block; sometimes no file."""
    path = root / kind.path
    base = path.read_bytes()
    status = path.stat()
    try:
        if random.randrange(25) == 0:
            path.unlink()
            _put_no_file(path, random)
        else:
            path.write_bytes(kind.mutate(base, random))
        yield path
    finally:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        path.write_bytes(base)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _put_no_file(path: Path, random: Random) -> None:
    makers: tuple[Callable[[], object], ...] = (
        path.mkdir,
        path.touch,
        lambda: os.mkfifo(path),
        lambda: path.symlink_to(path.name),
        lambda: path.symlink_to("nowhere"),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.write_bytes(b"\x1f\x8b\x08" + bytes(500)),
    )
    random.choice(makers)()


def outcome_of(root: Path, kind: Kind, random: Random) -> str:
    """Read a mutated file: "value", "counted" or "error"; whatever else is raised is a fault."""
    message = ""
    with mutated(root, kind, random) as path:
        try:
            kind.read(root, path)
        except InputError as error:
            message = str(error)
        except Counted:
            return "counted"
    assert "Traceback" not in message
    assert len(message) < 3000, message[:300]  # a line, not what the file holds
    return "error" if message else "value"
