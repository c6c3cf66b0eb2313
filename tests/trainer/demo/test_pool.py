"""The demo's data: equal bytes for equal seeds, layouts that others read, safe to interrupt."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from siftclip.datamodules.index.tar_index import ShardIndex
from siftclip.datamodules.index.uids import parse_uids
from siftclip.datamodules.selection.selection import read_subset
from siftclip.errors import InputError
from siftclip.trainer.demo import pool as demo_pool
from siftclip.trainer.demo.digit_scenes import DIGIT_WORDS, INKS
from siftclip.trainer.demo.pool import MARKER_NAME, DemoData, write_demo_data
from siftclip.trainer.demo.samples import DefectMix

SMALL: dict[str, Any] = {
    "pool_samples": 220,
    "teacher_samples": 60,
    "classification_samples": 40,
    "count_samples": 30,
    "retrieval_samples": 20,
    "progress": False,
}


def webdataset_warns(test: Callable[..., None]) -> Callable[..., None]:
    """Allow what webdataset warns of: an option that clip_benchmark leaves out, and open tars."""
    for warning in (
        "ignore:WebDataset.shardshuffle",
        "ignore:unclosed file:ResourceWarning",
        "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning",
    ):
        test = pytest.mark.filterwarnings(warning)(test)
    return test


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_pool, "SHARD_SAMPLES", 100)
    monkeypatch.setattr(demo_pool, "METADATA_ROWS", 90)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_pool, "SHARD_SAMPLES", 100)
        patch.setattr(demo_pool, "METADATA_ROWS", 90)
        return write_demo_data(tmp_path_factory.mktemp("demo"), **SMALL)


def digest_all(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def read_members(path: Path) -> dict[str, dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as archive:
        for info in archive:
            key, suffix = info.name.split(".", 1)
            content = archive.extractfile(info)
            assert content is not None
            samples.setdefault(key, {})[suffix] = content.read()
    return samples


def read_pool(root: Path) -> dict[str, dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted((root / "shards").glob("*.tar")):
        samples |= read_members(path)
    return samples


def read_captions(root: Path) -> dict[str, str]:
    """The caption of each uid."""
    members = read_pool(root).values()
    return {json.loads(m["json"])["uid"]: m["txt"].decode() for m in members}


def named_in(caption: str, names: Collection[str]) -> set[str]:
    """Those of `names` that a caption holds; the number in "two digits" is not a digit's name."""
    text = re.sub(r"(two|three) digits", "", caption)
    return set(re.findall(r"[a-z]+", text)) & set(names)


def test_the_same_seed_gives_the_same_bytes(data: DemoData, tmp_path: Path) -> None:
    write_demo_data(tmp_path / "again", **SMALL)
    assert digest_all(tmp_path / "again") == digest_all(data.root)


def test_another_seed_gives_other_samples(data: DemoData, tmp_path: Path) -> None:
    other = write_demo_data(tmp_path / "other", seed=1, **SMALL)
    first, second = digest_all(data.root), digest_all(other.root)
    for path in first:
        if path.endswith((".tar", ".npy", "truth.parquet")):
            assert first[path] != second[path], path


def test_shards_are_indexed_without_a_fault(
    index_tar: Callable[[Path], ShardIndex], data: DemoData
) -> None:
    for root, sizes in ((data.pool, [100, 100, 20]), (data.teacher, [60])):
        indices = [index_tar(path) for path in sorted((root / "shards").glob("*.tar"))]
        assert [len(index) for index in indices] == sizes
        assert all(index.faults.samples == 0 and index.derived_uids == 0 for index in indices)
        uids = np.concatenate([index.uids for index in indices])
        assert len(np.unique(uids, axis=0)) == sum(sizes)


def test_members_agree_with_one_another(data: DemoData) -> None:
    suffixes = set()
    for number, (key, members) in enumerate(read_pool(data.pool).items()):
        assert key == f"{number // 100:08d}{number % 100:04d}"
        description = json.loads(members["json"])
        assert description["key"] == key
        assert description["caption"] == members["txt"].decode()
        assert description["status"] == "success"
        (suffix,) = set(members) - {"txt", "json"}
        suffixes.add(suffix)
        image = Image.open(io.BytesIO(members[suffix]))
        assert image.format == {"jpg": "JPEG", "png": "PNG"}[suffix]
        assert image.mode == "RGB"
        assert image.size == (description["width"], description["height"]) == (32, 32)
    assert suffixes == {"jpg", "png"}


def test_metadata_hold_the_same_samples_in_another_order(data: DemoData) -> None:
    files = sorted((data.pool / "metadata").glob("*.parquet"))
    assert len(files) == 3
    assert all(len(path.stem) == 32 for path in files)
    table = pd.concat([pd.read_parquet(path) for path in files], ignore_index=True)
    assert list(table) == ["uid", "url", "text", "original_width", "original_height", "sha256"]
    in_order = {}
    for members in read_pool(data.pool).values():
        (image,) = (members[s] for s in ("jpg", "png") if s in members)
        uid = json.loads(members["json"])["uid"]
        in_order[uid] = (members["txt"].decode(), hashlib.sha256(image).hexdigest())
    rows = table.itertuples(index=False)
    assert {row.uid: (row.text, row.sha256) for row in rows} == in_order
    assert table["uid"].tolist() != list(in_order)


def test_truth_is_of_the_pool_and_outside_of_it(data: DemoData) -> None:
    truth = pd.read_parquet(data.truth)
    captions = read_captions(data.pool)
    assert truth["uid"].tolist() == list(captions)
    assert truth["kind"].value_counts().to_dict() == DefectMix().counts(220)
    assert truth["oracle"].tolist() == (truth["kind"] == "clean").tolist()
    kind_of = dict(zip(truth["uid"], truth["kind"], strict=True))
    for row in truth.itertuples(index=False):
        named_digits = named_in(captions[str(row.uid)], DIGIT_WORDS)
        named_inks = named_in(captions[str(row.uid)], list(INKS))
        digits, inks = set(str(row.digits).split()), set(str(row.colours).split())
        if row.kind in ("clean", "duplicate"):
            assert named_digits in (digits, set())
            assert named_inks <= inks
        if row.kind == "mismatched":
            assert not named_digits & digits
            assert not named_inks & inks
        if row.kind == "duplicate":
            assert kind_of[str(row.duplicate_of)] == "clean"
            assert captions[str(row.duplicate_of)] == captions[str(row.uid)]
        else:
            assert row.duplicate_of == ""
    assert not list(data.pool.rglob("*truth*"))


def test_the_oracle_is_a_subset_file_of_the_clean_samples(data: DemoData) -> None:
    truth = pd.read_parquet(data.truth)
    uids, multiplicities = read_subset(data.oracle)
    assert set(multiplicities.tolist()) == {1}
    expected = parse_uids(truth.loc[truth["kind"] == "clean", "uid"].tolist())
    assert {tuple(uid) for uid in uids.tolist()} == {tuple(uid) for uid in expected.tolist()}
    raw = np.load(data.oracle)
    assert np.array_equal(raw, np.sort(raw))


def test_the_teacher_has_true_captions_only(data: DemoData) -> None:
    captions = read_captions(data.teacher).values()
    assert len(captions) == 60
    assert all(named_in(caption, DIGIT_WORDS) or " digit" in caption for caption in captions)


@webdataset_warns
@pytest.mark.parametrize(
    ("task", "samples", "classes"), [("digit", 40, 10), ("colour", 40, 8), ("count", 30, 3)]
)
def test_clip_benchmark_reads_the_classification_tasks(
    data: DemoData, task: str, samples: int, classes: int
) -> None:
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    dataset = builder.build_wds_dataset(task, np.asarray, data_dir=str(data.tasks / f"wds_{task}"))
    items = list(dataset)
    assert len(items) == samples
    assert len(dataset.classes) == classes
    assert all("{c}" in template for template in dataset.templates)
    assert {label for _, label in items} <= set(range(classes))
    assert all(image.shape == (32, 32, 3) for image, _ in items)


@webdataset_warns
def test_clip_benchmark_reads_the_retrieval_task(data: DemoData) -> None:
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    root = data.tasks / "wds_retrieval"
    items = list(builder.build_wds_dataset("retrieval", np.asarray, data_dir=str(root)))
    assert len({captions[0] for _, captions in items}) == len(items) == 20
    assert all(len(captions) == 1 for _, captions in items)


def test_a_second_call_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_demo_data(tmp_path, **SMALL)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr(demo_pool, "split_digits", None)  # would be called first
    assert write_demo_data(tmp_path, **SMALL) == DemoData(root=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times


def test_other_arguments_replace_the_data(tmp_path: Path) -> None:
    write_demo_data(tmp_path, **SMALL)
    stale = tmp_path / "pool" / "metadata" / "features.npz"
    stale.write_bytes(b"of the old pool")
    write_demo_data(tmp_path, **{**SMALL, "pool_samples": 40})
    assert not stale.exists()
    assert len(read_pool(tmp_path / "pool")) == 40


def test_an_interrupted_call_starts_over(
    data: DemoData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo_pool, "write_task", fail)
        with pytest.raises(KeyboardInterrupt):
            write_demo_data(tmp_path, **SMALL)
    assert (tmp_path / "pool" / "shards" / "00000000.tar").exists()
    (tmp_path / "pool" / "shards" / "00000009.tar").write_bytes(b"left over")
    write_demo_data(tmp_path, **SMALL)
    assert digest_all(tmp_path) == digest_all(data.root)


def test_folders_of_somebody_else_are_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "pool" / "precious.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    with pytest.raises(InputError, match=f"already holds pool without {MARKER_NAME}"):
        write_demo_data(tmp_path, **SMALL)
    assert precious.read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["pool_samples", "teacher_samples", "classification_samples", "count_samples"]
)
def test_sizes_are_checked_before_anything_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} must be an integer of at least 1. Got 0"):
        write_demo_data(tmp_path, **{**SMALL, name: 0})
    assert not list(tmp_path.iterdir())
