"""What loggers are told of a selection: which samples are shown, and what artifacts are made of."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from siftclip.files import write_text
from siftclip.trainer.builders.selection import PoolSelection, select_stage
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.settings.logger import LoggerSettings
from siftclip.trainer.stages.tracking import (
    _score_histogram,
    evaluation_lineage,
    example_table,
    score_table,
    selection_lineage,
)

PIXELS = 10**6


@pytest.fixture
def select(base: list[str], compose: Callable[..., Any]) -> Callable[..., PoolSelection]:
    """`select(overrides)`: a selection of the small pool of 240 samples."""
    kept = [word for word in base if word.startswith(("pool.", "features.", "output_dir"))]

    def make(*overrides: str) -> PoolSelection:
        return select_stage(compose("select", [*kept, "progress=false", *overrides]))

    return make


def test_kept_samples_are_shown_from_the_best_to_the_worst(
    select: Callable[..., PoolSelection],
) -> None:
    selected = select("selector=clip_score", "selector.fraction=0.5")
    rows = example_table(selected, count=5, max_image_pixels=PIXELS)
    kept = [row for row in rows if row["kept"]]
    assert selected.scores is not None
    best_first = sorted(selected.scores.tolist(), reverse=True)
    assert [row["score"] for row in kept] == [best_first[at] for at in (0, 29, 59, 89, 119)]
    assert len(rows) == 10
    assert len({row["sample"] for row in rows}) == 10
    frame = selected.frame
    of_selection = {f"{tar}:{key}" for tar, key in zip(frame["tar"], frame["key"], strict=True)}
    assert {row["sample"] for row in kept} <= of_selection
    assert not {row["sample"] for row in rows if not row["kept"]} & of_selection
    assert (
        example_table(selected, count=5, max_image_pixels=PIXELS)[3]["sample"] == rows[3]["sample"]
    )


def test_a_selection_without_scores_is_shown_all_the_same(
    select: Callable[..., PoolSelection],
) -> None:
    selected = select("selector=random", "selector.fraction=1")
    rows = example_table(selected, count=1000, max_image_pixels=PIXELS)
    assert [row["kept"] for row in rows] == [True] * 240  # nothing is left out
    assert score_table(selected) == [] or rows[0]["score"] is not None


def test_samples_that_cannot_be_read_have_no_row(
    select: Callable[..., PoolSelection], copy_pool: Path, tmp_path: Path
) -> None:
    place = [f"pool.root={copy_pool}", f"pool.cache_dir={tmp_path / 'own'}"]
    selected = select("selector=random", "selector.fraction=0.5", *place)
    (path,) = copy_pool.rglob("*.tar")
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        images = [m for m in archive if m.name.endswith((".png", ".jpg"))]
    for member in images[:100]:
        content[member.offset_data : member.offset_data + 20] = bytes(20)
    stat = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    rows = example_table(selected, count=240, max_image_pixels=PIXELS)
    assert len(rows) == 140
    assert example_table(selected, count=240, max_image_pixels=1) == []


def test_what_is_not_wanted_has_a_record_alone(
    select: Callable[..., PoolSelection], tmp_path: Path
) -> None:
    selected, run = select("selector=clip_score"), RunDir(path=tmp_path / "run")
    whole = selection_lineage(selected, LoggerSettings(artifacts=("selection",)), run)
    assert [path.name for path in whole.files] == ["selection.npy", "selection.json"]
    bare = selection_lineage(selected, LoggerSettings(artifacts=["model"]), run)
    assert (bare.files, bare.name) == ([], whole.name)
    assert [source.kind for source in bare.sources] == ["pool", "features"]
    without_features = selection_lineage(select("selector=random"), LoggerSettings(), run)
    assert [source.kind for source in without_features.sources] == ["pool"]


def test_links_are_not_followed(tmp_path: Path) -> None:
    """A run's folder is data: a link in it must not send a file from elsewhere."""
    run, secret = RunDir(path=tmp_path / "run"), tmp_path / "secret"
    write_text(secret, "mine")
    write_text(run.path / "eval_results.csv", "task\n")
    (run.path / "eval_results.jsonl").symlink_to(secret)
    assert [path.name for path in evaluation_lineage(run, "x").files] == ["eval_results.csv"]


@pytest.mark.parametrize(
    "scores",
    [
        [1, 1, 1],
        [0, 0],
        [-1e30],
        [1e-30, 2e-30],
        [1, np.nextafter(np.float32(1), 2)],
        [-3e38, 3e38],
    ],
)
def test_every_finite_score_is_in_the_histogram(
    scores: list[float], select: Callable[..., PoolSelection]
) -> None:
    selected = select("selector=clip_score", "selector.fraction=0.5")
    found = np.full(len(selected.selection.uids), np.nan, dtype=np.float32)
    found[: len(scores)] = scores
    selection = replace(selected.selection, scores=found)
    histogram = _score_histogram(replace(selected, selection=selection))["selection/score"]
    assert sum(histogram.counts) == len(scores)
    assert histogram.low == np.float32(min(scores))
