"""Selections that one can look at: what is counted, what passes, and hostile texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from siftclip.datamodules.index.uids import format_uids
from siftclip.datamodules.selection.selection import read_selection, read_subset
from siftclip.errors import InputError
from siftclip.eval.significance.words import telling_words
from siftclip.trainer.builders.selection import select_stage
from siftclip.trainer.compare import passing
from siftclip.trainer.compare.page import groups
from siftclip.trainer.compare.page.captions import read_captions
from siftclip.trainer.compare.page.grouping import CLUSTER
from siftclip.trainer.compare.show import Looked, diff_stage, show_stage
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.stages.subset import verify_stage
from siftclip.trainer.stages.train import train_stage


@pytest.fixture
def words(base: list[str]) -> list[str]:
    """Options of the small pool of 240 samples."""
    return [word for word in base if word.startswith(("pool.", "output_dir", "progress"))]


@pytest.fixture
def look(compose: Callable[..., Any], words: list[str]) -> Callable[..., Looked]:
    """`look("show", overrides)`: what a command has looked at."""

    def run(command: str, *overrides: str) -> Looked:
        stage = {"show": show_stage, "diff": diff_stage}[command]
        return stage(compose(command, [*words, *overrides]), lambda own: compose("train", own))

    return run


@pytest.fixture
def selection(base: list[str], compose: Callable[..., Any]) -> Path:
    """A selection by CLIP score."""
    kept = [word for word in base if word.startswith(("pool.", "features.", "output_dir"))]
    more = ["selector=clip_score", "selector.fraction=0.3", "progress=false"]
    return select_stage(compose("select", [*kept, *more])).folder


def test_a_selection_is_shown(look: Callable[..., Looked], selection: Path) -> None:
    found = look("show", f"show.selection={selection}", "show.samples=7")
    kept = read_selection(selection)
    assert found.text.startswith(f"{selection.name} keeps 72 samples (30.0%).")
    assert len(found.passing) == 72
    assert set(format_uids(found.view.pool.uids[found.passing])) == set(kept.ids)
    assert len(found.shown) == 7
    assert set(found.shown) <= set(found.passing)
    page = found.page.read_text()
    assert page.count("data:image/webp;base64,") >= 7
    assert "7 samples of what passes" in page
    again = look("show", f"show.selection={selection}", "show.samples=7")
    assert again.shown.tolist() == found.shown.tolist()
    other = look("show", f"show.selection={selection}", "show.samples=7", "seed=1")
    assert other.shown.tolist() != found.shown.tolist()


def test_a_pool_is_shown_by_its_own_columns(look: Callable[..., Looked], demo_data: Any) -> None:
    found = look("show", "show.images=false", f"show.truth={demo_data.truth}")
    assert len(found.passing) == len(found.view.pool) == 240
    assert "data:image" not in found.page.read_text()
    truth = pd.read_parquet(demo_data.truth)["kind"].value_counts()
    for kind, count in truth.items():
        assert any(line.split()[:2] == [kind, str(count)] for line in found.text.splitlines()), (
            found.text
        )


def test_what_passes_can_be_kept(
    look: Callable[..., Looked], tmp_path: Path, compose: Callable[..., Any], words: list[str]
) -> None:
    """Filters of captions and scores, against loops, and a subset of what they leave."""
    pool = look("show", "show.images=false").view.pool
    scores = tmp_path / "scores.parquet"
    values = np.linspace(0, 1, len(pool))
    ids = format_uids(pool.uids)
    pd.DataFrame({"uid": ids, "mine": values}).to_parquet(scores)
    filters = [f"show.scores={scores}", "show.column=mine", "show.min_score=0.5"]
    everything = look("show", *filters, "show.images=false")
    assert everything.passing.tolist() == np.flatnonzero(np.float32(values) >= 0.5).tolist()
    found = look("show", *filters, "show.text=DIGIT", "show.export=best", "show.images=false")
    assert 0 < len(found.passing) < len(everything.passing)
    uids, _ = read_subset(tmp_path / "outputs" / "subsets" / "best" / "selection.npy")
    assert sorted(format_uids(uids)) == sorted(ids[found.passing])
    assert "subset     best" in found.text
    verified = verify_stage(compose("subset_verify", [*words, "subset_verify.subset=best"]))
    assert verified.faults == []
    with pytest.raises(InputError, match=r"Nothing of .* passes show.text='no such words'"):
        look("show", "show.text=no such words")


class _Identifier:
    """English where there is a "the", else Danish."""

    def __call__(self, captions: Sequence[str]) -> list[str | None]:
        return ["en" if " the " in f" {text} " else "da" for text in captions]


def test_clusters_and_languages_are_filters(
    look: Callable[..., Looked],
    demo_data: DemoData,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Against the groups of the page, and a loop over all captions."""
    monkeypatch.setattr(groups, "SureLanguages", _Identifier)
    monkeypatch.setattr(passing, "SureLanguages", _Identifier)
    features = f"show.features={demo_data.root / 'features'}"
    everything = look("show", features, "show.images=false")
    clusters = everything.view.groups.find(CLUSTER)
    assert clusters is not None
    assert len(clusters.names) == 12
    assert min(clusters.labels) == 0
    for wanted in (3, clusters.names[2]):
        found = look("show", features, f"show.cluster='{wanted}'", "show.images=false")
        assert found.passing.tolist() == np.flatnonzero(clusters.labels == 2).tolist()
        assert f"{len(found.passing)} of them pass the filters" in found.text
    for name in clusters.names:
        assert name in everything.text
        assert f"<bdi>{name}</bdi>" in everything.page.read_text()
    texts = read_captions(everything.view.pool, np.arange(240), progress=False)
    danish = [row for row, text in enumerate(texts) if " the " not in f" {text} "]
    overrides = [features, "show.language=da", "show.cluster=1", "show.export=danish"]
    both = look("show", *overrides, "show.images=false")
    assert both.passing.tolist() == [row for row in danish if clusters.labels[row] == 0] != []
    uids, _ = read_subset(tmp_path / "outputs" / "subsets" / "danish" / "selection.npy")
    assert len(uids) == len(both.passing)
    for overrides, says in (
        ([features, "show.cluster=13"], r"show.cluster must be .* Got '13'. There are: 1.*; 12"),
        (["show.cluster=1"], "show.features=FOLDER names a folder"),
        (["show.features=nowhere"], "show.features must name a folder with features .*nowhere"),
        (["show.language=xx"], r"Got 'xx'. There are: (da|en) \(\d+\)"),
        (
            ["show.text=nosuchword", "show.language=da"],
            "show.text='nosuchword' and show.language='da'",
        ),
    ):
        with pytest.raises(InputError, match=says):
            look("show", *overrides)


def test_what_two_selections_differ_in(
    look: Callable[..., Looked], selection: Path, demo_data: DemoData
) -> None:
    found = look("diff", f"show.selection={selection}", f"show.other={demo_data.oracle}")
    first, second = ({*np.flatnonzero(times)} for times in found.view.kept.values())
    for text, rows in (
        (f"{selection.name} alone", first - second),
        (f"{demo_data.oracle.name} alone", second - first),
        ("both", first & second),
    ):
        (line,) = (line for line in found.text.splitlines() if line.startswith(text))
        assert line.split()[-1] == str(len(rows))
    page = found.page.read_text()
    share = len(first & second) / len(first | second)
    assert f">{share:.2f}</td>" in page
    assert f"kept by {demo_data.oracle.name}, dropped by {selection.name}" in page


def test_ranks_of_two_scores_are_correlated(
    look: Callable[..., Looked], base: list[str], compose: Callable[..., Any], tmp_path: Path
) -> None:
    """Of two runs, by the scores of their selectors; the selectors are the package's own."""
    runs = []
    for name in ("clip_score", "negcliploss"):
        kept = [word for word in base if not word.startswith(("experiment", "eval."))]
        run = tmp_path / "outputs" / "train" / name
        more = [f"selector={name}", "selector.fraction=0.3", f"run_dir={run}"]
        runs.append(train_stage(compose("train", [*kept, *more])).path)
    found = look("diff", f"show.selection={runs[0]}", f"show.other={runs[1]}")
    scores = [*found.view.scores.values()]
    assert len(scores) == 2
    assert np.isfinite(scores[0]).sum() == 240  # of the whole pool, not of what is kept
    correlation = spearmanr(*scores, nan_policy="omit").statistic
    assert f"correlate by {correlation:.2f}" in found.text
    assert found.view.groups.find(CLUSTER) is not None  # by the features of the runs
    assert "cluster of images" in found.text


def test_faults_are_told(look: Callable[..., Looked], selection: Path, tmp_path: Path) -> None:
    for command, overrides, says in (
        ("diff", [f"show.selection={selection}"], "show.selection and show.other must be given"),
        ("show", ["show.other=x"], "show.other is for siftclip diff"),
        ("show", ["show.min_score=0.5"], "need scores"),
        ("show", ["show.selection=nowhere"], "must be the name of a subset"),
        ("show", ["show.scores=nowhere.parquet"], "nowhere.parquet"),
        *(
            (
                "diff",
                [f"show.selection={selection}", f"show.other={selection}", f"show.{word}=x"],
                f"show.{word} is for siftclip show",
            )
            for word in ("text", "cluster", "language")
        ),
    ):
        with pytest.raises(InputError, match=says):
            look(command, *overrides)
    strange = tmp_path / "strange.txt"
    strange.write_text("0123456789abcdef0123456789abcdef\n")
    with pytest.raises(InputError, match=r"None of the 1 uids of .* is in the pool"):
        look("show", f"show.selection={strange}")


def test_hostile_captions_are_texts(
    make_samples: Callable[..., Any],
    write_pool: Callable[..., Path],
    compose: Callable[..., Any],
    tmp_path: Path,
) -> None:
    samples = make_samples(6)
    hostile = ["<script>alert(1)</script>", "\x1b[31mred\x1b[0m", '"><img src=x onerror=alert(1)>']
    for sample, caption in zip(samples, hostile, strict=False):
        sample.caption = caption.encode()
    root = write_pool(samples)
    found = show_stage(
        compose("show", [f"pool.root={root}", f"output_dir={tmp_path}", "progress=false"]),
        lambda own: compose("train", own),
    )
    page = found.page.read_text()
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "\x1b" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_words_tell_captions_apart() -> None:
    generator = np.random.default_rng(0)
    names = ["dog", "cat", "sun", "sky", "tree"]

    def captions(share: float) -> list[str]:
        return [
            f"a {generator.choice(names)} {'RARE' if generator.random() < share else 'thing'}"
            for _ in range(2000)
        ]

    found = telling_words(captions(0.02), captions(0.10), 5)
    assert found[-1].word == "rare"
    assert found[-1].z < -8
    assert found[-1].second == pytest.approx(0.10, abs=0.02)
    assert {share.word for share in found} <= {"rare", "thing", *names}
    assert telling_words([], [], 5) == []
    assert telling_words(["once only"], ["never more"], 5) == []
