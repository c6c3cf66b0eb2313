from __future__ import annotations

import csv
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, confusion_matrix

from siftclip.eval.evaluate import ScoredTask
from siftclip.eval.metrics.class_metrics import (
    ClassPredictions,
    classification_metrics,
    multilabel_metrics,
    rank_classes,
)
from siftclip.eval.metrics.outcomes import Metrics, Outcomes
from siftclip.eval.metrics.pair_metrics import association_metrics, caption_selection_metrics
from siftclip.eval.metrics.retrieval_metrics import retrieval_metrics
from siftclip.eval.reports.error_analysis import write_details, write_predictions
from siftclip.eval.tasks.kinds.values import Task, TaskSamples, TaskScores

NAMES = ("=1+1", "größer", "cat", "dog", "cat", "-frog\n")


def make_samples(
    kind: str = "classification",
    count: int = 40,
    *,
    name: str = "vtab/own",
    classnames: tuple[str, ...] = NAMES,
    images: int = 1,
    **fields: Any,
) -> TaskSamples:
    root = Path("/tasks/wds_own")
    task = Task(
        name=name, title=name, root=root, split="test", kind=kind, main_metric=None,
        shards=(root / "test" / "0.tar", root / "test" / "1.tar"), classnames=classnames,
        templates=("{c}",),
    )  # fmt: skip
    tars = np.repeat(np.arange(count) % 2, images)
    places = np.column_stack([tars, np.zeros((len(tars), 2), dtype=np.int64)])
    given = {"labels": None, "captions": (), "associations": (), "metadata": None, **fields}
    return TaskSamples(
        task=task,
        keys=np.asarray([f"s{i:03d}" for i in range(count)]),
        places=places,
        first_image=np.arange(count + 1) * images,
        **given,
    )


def score(
    samples: TaskSamples,
    found: tuple[Metrics, dict[str, Outcomes]],
    predictions: ClassPredictions | None = None,
) -> ScoredTask:
    scores = TaskScores(metrics=found[0], outcomes=found[1], predictions=predictions)
    return ScoredTask(samples=samples, scores=scores)


def classified(
    count: int = 40, classnames: tuple[str, ...] = NAMES, **fields: Any
) -> tuple[ScoredTask, torch.Tensor]:
    rng = np.random.default_rng(0)
    classes = len(classnames)
    labels = rng.integers(0, classes - 1, count)  # the last class has no sample
    logits = torch.from_numpy(rng.normal(size=(count, classes)).astype(np.float32))
    logits[np.arange(count), labels] += 1
    predictions = rank_classes(logits, labels)
    samples = make_samples(count=count, classnames=classnames, labels=labels, **fields)
    return score(samples, classification_metrics(predictions, labels, classes), predictions), logits


def unit(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return F.normalize(torch.from_numpy(rng.normal(size=shape).astype(np.float32)), dim=-1)


def read(path: Path | None) -> pd.DataFrame:
    assert path is not None
    return pq.read_table(path).to_pandas()


def test_predictions_of_classes(tmp_path: Path) -> None:
    metadata = np.arange(80).reshape(40, 2)
    scored, logits = classified(metadata=metadata)
    path = write_predictions(tmp_path / "made", scored)
    assert path == tmp_path / "made" / "vtab-own_predictions.parquet"
    assert list((tmp_path / "made").iterdir()) == [path]
    table = read(path)
    assert list(table) == [
        "key", "tar", "label", "label_name", "prediction", "prediction_name", "correct",
        "score", "label_score", "label_rank", "top5_names", "top5_scores", "metadata",
    ]  # fmt: skip
    assert table["key"].tolist() == scored.samples.keys.tolist()
    assert table["tar"].tolist() == ["test/0.tar", "test/1.tar"] * 20
    best = np.argsort(-logits.numpy(), axis=1)[:, :5]
    assert table["prediction"].tolist() == best[:, 0].tolist()
    for row, order in zip(table.itertuples(), best.tolist(), strict=True):
        assert row.label_name == NAMES[row.label]
        assert row.prediction_name == NAMES[row.prediction]
        assert row.correct == (row.label == row.prediction)
        assert list(row.top5_names) == [NAMES[c] for c in order]
    scores = np.stack(table["top5_scores"].to_list())
    np.testing.assert_array_equal(scores, -np.sort(-logits.numpy(), axis=1)[:, :5])
    of_label = logits.numpy()[np.arange(40), table["label"]]
    assert table["score"].tolist() == scores[:, 0].tolist()
    assert table["label_score"].tolist() == of_label.tolist()
    assert table["score"].dtype == table["label_score"].dtype == scores.dtype == np.float32
    ranks = [sum(one > own for one in row) for row, own in zip(logits, of_label, strict=True)]
    assert table["label_rank"].tolist() == ranks
    assert ((table["label_rank"] == 0) == table["correct"]).all()
    assert table["correct"].mean() == scored.scores.metrics["acc1"]
    assert np.stack(table["metadata"].to_list()).tolist() == metadata.tolist()


def test_predictions_of_few_classes(tmp_path: Path) -> None:
    scored, _ = classified(classnames=("a", "b", "c"))
    table = read(write_predictions(tmp_path, scored))
    assert [*map(list, table["top5_names"])] == [[name] for name in table["prediction_name"]]
    assert [*map(list, table["top5_scores"])] == [[score] for score in table["score"]]
    assert set(table["label_rank"]) == {0, 1, 2}
    assert "metadata" not in table


def test_a_probe_of_few_shots_has_shares(tmp_path: Path) -> None:
    scored, _ = classified()
    shares = np.linspace(0, 1, 40, dtype=np.float32)
    outcomes = {"acc1": Outcomes(statistic="mean", arrays={"value": shares})}
    few = replace(scored, scores=TaskScores(metrics={}, outcomes=outcomes))
    table = read(write_predictions(tmp_path, few))
    assert list(table) == ["key", "tar", "label", "label_name", "share_correct"]
    assert table["share_correct"].tolist() == shares.tolist()
    assert write_details(tmp_path, few) == []


def test_faces_have_no_files(tmp_path: Path) -> None:
    scored = score(make_samples(metadata=np.zeros((40, 4), dtype=np.int64)), ({}, {}))
    assert write_predictions(tmp_path, scored) is None
    assert write_details(tmp_path, scored) == []
    assert list(tmp_path.iterdir()) == []


def test_several_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    labels = rng.random((40, 6)) < 0.3
    labels[:, 5] = False
    scores = torch.from_numpy(rng.normal(size=(40, 6)).astype(np.float32))
    samples = make_samples("multilabel", labels=labels)
    scored = score(samples, multilabel_metrics(scores, labels))
    table = read(write_predictions(tmp_path, scored))
    np.testing.assert_array_equal(np.stack(table["scores"].to_list()), scores.numpy())
    for row, hot, best in zip(
        table.itertuples(), labels, np.argsort(-scores.numpy(), axis=1), strict=True
    ):
        assert list(row.label_names) == [NAMES[c] for c in np.flatnonzero(hot)]
        assert list(row.top5_names) == [NAMES[c] for c in best[:5]]
    (path,) = write_details(tmp_path, scored)
    details = pd.read_csv(path)
    assert details["class"].tolist() == ["'=1+1", *NAMES[1:5], "'-frog\n"]
    assert details["samples"].tolist() == labels.sum(axis=0).tolist()
    for c in range(5):
        expected = average_precision_score(labels[:, c], scores[:, c].numpy())
        assert details["average_precision"][c] == pytest.approx(expected, abs=1e-6)
    mean = scored.scores.metrics["mean_average_precision"]
    assert details["average_precision"].mean() == pytest.approx(mean, abs=1e-6)


def test_retrieval(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    counts = [1 + i % 3 for i in range(12)]
    captions = tuple(
        tuple(f"caption {i} {j}" for j in range(count)) for i, count in enumerate(counts)
    )
    image_of = np.repeat(np.arange(12), counts)
    images, texts = unit(rng, 12, 8), unit(rng, len(image_of), 8)
    texts = F.normalize(texts + images[image_of], dim=-1)
    found = retrieval_metrics(images, texts, np.arange(len(image_of)), image_of)
    scored = score(make_samples("retrieval", 12, captions=captions), found)
    table = read(write_predictions(tmp_path, scored))
    assert [tuple(row) for row in table["captions"]] == list(captions)
    similarity = (texts @ images.T).numpy()
    for k in (1, 5):
        nearest_images = np.argsort(-similarity, axis=1)[:, :k]
        nearest_texts = np.argsort(-similarity.T, axis=1)[:, :k]
        for i in range(12):
            own = np.flatnonzero(image_of == i)
            assert table[f"text_hit@{k}"][i] == np.isin(nearest_texts[i], own).any()
            assert table[f"image_hits@{k}"][i] == (nearest_images[own] == i).sum()
    assert write_details(tmp_path, scored) == []


def test_caption_selection(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    images, texts = unit(rng, 20, 2, 4), unit(rng, 20, 2, 4)
    captions = tuple((f"a {i}", f"b {i}") for i in range(20))
    samples = make_samples("image_caption_selection", 20, images=2, captions=captions)
    scored = score(samples, caption_selection_metrics(images, texts))
    table = read(write_predictions(tmp_path, scored))
    assert table["tar"].tolist() == ["test/0.tar", "test/1.tar"] * 10
    for name in ("image_acc", "text_acc", "acc"):
        assert table[name].dtype == bool
        assert table[name].mean() == pytest.approx(scored.scores.metrics[name])
    assert (table["acc"] == (table["image_acc"] & table["text_acc"])).all()
    assert [tuple(row) for row in table["captions"]] == list(captions)


def test_association(tmp_path: Path) -> None:
    marks = tuple(np.array([i % 2 == 0, True, False, False, False]) for i in range(8))
    cosines = [np.array([0.9, 0.1, 0.5, 0.2, 0.3])] * 8
    samples = make_samples(
        "association", 8, images=5, captions=tuple((f"cue {i}",) for i in range(8)),
        associations=marks,
    )  # fmt: skip
    scored = score(samples, association_metrics(cosines, marks))
    table = read(write_predictions(tmp_path, scored))
    assert table["cue"].tolist() == [f"cue {i}" for i in range(8)]
    assert set(table["candidates"]) == {5}
    assert [list(row) for row in table["associated"]][:2] == [[0, 1], [1]]
    np.testing.assert_allclose(table["jaccard"], [1 / 3, 0] * 4, rtol=1e-6)


def test_details_of_classes(tmp_path: Path) -> None:
    scored, _ = classified()
    labels, predictions = scored.samples.labels, scored.scores.predictions
    assert predictions is not None
    assert labels is not None
    classes_path, confusion_path = write_details(tmp_path, scored)
    assert classes_path == tmp_path / "vtab-own_classes.csv"
    with confusion_path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    safe = ["'=1+1", "größer", "cat", "dog", "cat", "'-frog\n"]
    assert header == ["label \\ prediction", *safe]
    assert [row[0] for row in rows] == safe
    expected = confusion_matrix(labels, predictions.argmax, labels=range(6))
    assert [[int(cell) for cell in row[1:]] for row in rows] == expected.tolist()
    details = pd.read_csv(classes_path)
    assert details["class"].tolist() == safe
    assert details["samples"].tolist() == expected.sum(axis=1).tolist()
    assert details["recall"].mean() == pytest.approx(scored.scores.metrics["mean_per_class_recall"])
    assert np.isnan(details["recall"][5])
    wrong = expected - np.diag(np.diag(expected))
    assert details["times"].tolist() == wrong.max(axis=1).tolist()
    assert details["most_confused_with"][0] == safe[wrong[0].argmax()]


def test_large_confusions_are_left_out_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    many, _ = classified(classnames=tuple(f"c{i}" for i in range(1001)))
    with caplog.at_level(logging.WARNING):
        (path,) = write_details(tmp_path, many)
    assert "no confusion matrix is written, it would have 1001 x 1001 cells" in caplog.text
    assert len(pd.read_csv(path)) == 1001
    enough, _ = classified(classnames=tuple(f"c{i}" for i in range(1000)), name="other")
    assert len(write_details(tmp_path, enough)) == 2


def test_no_name_leads_out_of_the_folder(tmp_path: Path) -> None:
    scored, _ = classified(name="../../x")
    paths = [write_predictions(tmp_path, scored), *write_details(tmp_path, scored)]
    assert {path.parent for path in paths if path is not None} == {tmp_path}
    assert len(list(tmp_path.iterdir())) == 3
