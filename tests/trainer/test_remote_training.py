"""Training from a pool behind a URL, and with the options of streaming, gives what it must."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from omegaconf import DictConfig

from siftclip.datamodules.models.load import load_clip_model
from siftclip.errors import InputError
from siftclip.files import read_jsonl
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.stages.train import train_stage

Compose = Callable[..., DictConfig]


@pytest.fixture
def remote_base(base: list[str], demo_data: DemoData, tmp_path: Path) -> list[str]:
    """The overrides of `base`, for a copy of the pool in fsspec's memory."""
    place = f"/{tmp_path.name}"  # of this test: the memory is that of the whole process
    MemoryFileSystem().put(str(demo_data.pool), place, recursive=True)
    kept = [o for o in base if not o.startswith(("pool.root=", "pool.cache_dir="))]
    return [*kept, f"pool.root=memory:/{place}", f"pool.cache_dir={tmp_path / 'remote'}"]


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return load_clip_model(str(run.path)).model.state_dict()


def assert_same(first: RunDir, second: RunDir) -> None:
    ours, theirs = weights(first), weights(second)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("cache_gb", [0, 1])
def test_remote_pool_trains_the_same_weights(
    base: list[str], remote_base: list[str], compose: Compose, tmp_path: Path, cache_gb: int
) -> None:
    local = train_stage(compose("train", base))
    outputs = f"output_dir={tmp_path / 'elsewhere'}"
    options = [*remote_base, outputs, f"pool.shard_cache_gb={cache_gb}"]
    remote = train_stage(compose("train", options))
    assert remote.path.name == local.path.name  # the same run, wherever the pool is
    assert_same(local, remote)
    assert bool(list((tmp_path / "remote").glob("shards/*.tar"))) == bool(cache_gb)


def test_options_that_change_samples_are_other_runs(base: list[str], compose: Compose) -> None:
    plain = train_stage(compose("train", base))
    window = train_stage(compose("train", [*base, "data.shuffle_window_shards=1"]))
    resized = train_stage(compose("train", [*base, "data.resize=torch"]))
    assert len({run.path.name for run in (plain, window, resized)}) == 3
    last = [
        [r for r in read_jsonl(run.path / "metrics.jsonl") if "train/loss" in r][-1]["train/loss"]
        for run in (plain, window, resized)
    ]
    assert last[0] != last[1]
    assert last[0] == pytest.approx(last[2], rel=1e-2)


def test_waiting_and_bad_samples_are_logged(base: list[str], compose: Compose) -> None:
    run = train_stage(compose("train", base))
    records = [r for r in read_jsonl(run.path / "metrics.jsonl") if "train/loss" in r]
    assert all(0 <= record["train/data_wait_fraction"] <= 1 for record in records)
    assert {record["data/bad_samples"] for record in records} == {0.0}
    assert {record["data/retries"] for record in records} == {0.0}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("data.resize=opencv", r"data.resize must be one of .*Got 'opencv'"),
        ("data.shuffle_window_shards=0", r"data.shuffle_window_shards must be an integer"),
        ("data.timeout_seconds=-1", r"data.timeout_seconds must be at least 0"),
        ("data.prefetch_batches=0", r"data.prefetch_batches must be an integer"),
        ("pool.shard_cache_gb=-1", r"pool.shard_cache_gb must be at least 0"),
        ("pool.shard_cache_gb=1", r"pool.shard_cache_gb is for pools behind a URL"),
        ("+pool.storage_options.anon=true", r"pool.storage_options is for pools behind a URL"),
        ("pool.index_workers=many", r"pool.index_workers must be an integer of at least 1"),
    ],
)
def test_wrong_options_are_named(
    base: list[str], compose: Compose, option: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train_stage(compose("train", [*base, option]))
