from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from siftclip.errors import InputError
from siftclip.eval.metrics.outcomes import Outcomes
from siftclip.eval.reports.report import Summary, summarise, write_csv
from siftclip.eval.results.files import MAIN_METRIC, TaskResult
from siftclip.eval.significance.resampling import interval, replicates
from siftclip.eval.tasks.known_tasks import KNOWN_TASKS
from siftclip.eval.tasks.preparation import TaskFailure
from siftclip.tables import display_width


def make_result(
    key: str,
    hits: list[int] | None = None,
    *,
    value: float | None = None,
    metric: str | None = "acc1",
    family: str = "own",
    title: str | None = None,
    first_unit: int = 0,
    samples: int | None = None,
) -> TaskResult:
    """A result with outcomes of 0 and 1, or one as of another tool with a value only."""
    outcomes = units = None
    if hits is not None:
        outcomes = Outcomes(statistic="mean", arrays={"value": np.asarray(hits, np.float32)})
        units = np.arange(first_unit, first_unit + len(hits), dtype=np.uint64)
        value = float(np.mean(hits))
    return TaskResult(
        key=key,
        dataset=title or key,
        metrics={**({} if metric is None else {metric: value}), "acc5": 0.9, MAIN_METRIC: value},
        main_metric_name=metric,
        samples=samples if samples is not None else len(hits or []),
        interval=None if hits is None else (0.1, 0.8),
        seconds=1.5,
        model="m",
        family=family,
        outcomes=outcomes,
        units=units,
    )


@pytest.fixture
def summary() -> Summary:
    results = [
        make_result("birds", [1, 0, 1]),
        make_result(
            "vtab/dtd", [1, 0, 0, 1], family="vtab", title="Describable Textures", samples=1880
        ),
        make_result("cars", [1] * 1200, family="other", title="Stanford Cars"),
        make_result("fairness/fairface", family="fairness", title="FairFace", metric=None),
        make_result("imagenet1k", [0, 1], family="imagenet", title="ImageNet 1k"),
    ]
    groups = {
        "imagenet1k": ["imagenet1k"],
        "mine": ["birds", "cars", "vtab/dtd", "gtsrb", "wilds/fmow"],
        "none": ["mnist"],
    }
    failure = TaskFailure(key="wilds/fmow", message="0.tar ends in the middle of a file.\x1b[2J")
    return summarise(results, groups, missing=["gtsrb"], failures=[failure], resamples=100)


TABLE = r"""
task                        n  metric           value  95 % interval     chance
ImageNet
  ImageNet 1k               2  acc1            0.5000  [0.1000, 0.8000]       -
VTAB
  Describable Textures  1,880  acc1            0.5000  [0.1000, 0.8000]  0.0213
WILDS
  FMoW                      -  failed               -  -                      -
Fairness
  FairFace                  -  no main metric       -  -                      -
Other
  Stanford Cars         1,200  acc1            1.0000  [0.1000, 0.8000]       -
Custom tasks
  birds                     3  acc1            0.6667  [0.1000, 0.8000]       -

average       value                           95 % interval     chance
  imagenet1k  0.5000                          FIRST       -
  mine        0.7222 (partial: 3 of 5 tasks)  INTERVAL       -
  none        - (partial: 0 of 1 tasks)       -                      -

missing: gtsrb, mnist
failed: wilds/fmow: 0.tar ends in the middle of a file.\x1b[2J
""".strip()


def test_table(summary: Summary) -> None:
    low, high = summary.average_intervals["mine"] or (math.nan, math.nan)
    assert 0 < low < 0.7222 < high <= 1
    least, most = summary.average_intervals["imagenet1k"] or (math.nan, math.nan)
    assert 0 <= least < 0.5 < most <= 1
    text = TABLE.replace("INTERVAL", f"[{low:.4f}, {high:.4f}]")
    assert summary.table() == text.replace("FIRST", f"[{least:.4f}, {most:.4f}]")


def test_intervals_of_averages_are_of_the_members_that_are_there() -> None:
    a, b = make_result("a", [1, 0, 1, 1]), make_result("b", [0, 1, 0, 0, 1])
    groups: Any = {"all": ["a", "b", "c"], "one": ["a:acc1", "b"], "top": ["a:acc5", "b"]}
    assert summarise([a, b], {"g": "mnist"}).missing == ("mnist",)
    found = summarise([a, b], groups, resamples=400, seed=7)
    assert a.outcomes is not None
    assert a.units is not None
    assert b.outcomes is not None
    assert b.units is not None
    drawn = [
        replicates(one.outcomes, one.units, resamples=400, seed=7)
        for one in (a, b)
        if one.outcomes is not None and one.units is not None
    ]
    expected = interval(np.mean(drawn, axis=0))
    assert found.average_intervals == {"all": expected, "one": expected, "top": None}
    assert found.averages["one"].value == pytest.approx((0.75 + 0.4) / 2)
    assert found.averages["top"].value == pytest.approx((0.9 + 0.4) / 2)
    assert found.missing == ("c",)
    without = summarise([a, make_result("b", value=0.4)], groups, resamples=400)
    assert set(without.average_intervals.values()) == {None}
    assert set(summarise([a, b], groups, resamples=0).average_intervals.values()) == {None}


def test_names_for_loggers(summary: Summary) -> None:
    metrics = summary.metrics()
    assert metrics["eval/vtab/dtd/acc1"] == 0.5
    assert metrics["eval/birds/acc5"] == 0.9
    assert metrics["eval/average/imagenet1k"] == 0.5
    assert metrics["eval/average/mine (partial)"] == pytest.approx((2 / 3 + 1 + 0.5) / 3)
    assert "eval/average/mine" not in metrics
    assert "eval/average/none (partial)" not in metrics  # no value
    assert f"eval/fairness/fairface/{MAIN_METRIC}" not in metrics
    assert all(isinstance(value, float) for value in metrics.values())


def test_records_and_csv(summary: Summary, tmp_path: Path) -> None:
    records = summary.records()
    assert len({tuple(record) for record in records}) == 1
    assert records[1] == {
        "task": "vtab/dtd", "title": "Describable Textures", "family": "vtab", "metric": "acc1",
        "value": 0.5, "low": 0.1, "high": 0.8, "chance": KNOWN_TASKS["vtab/dtd"].chance,
        "samples": 1880, "seconds": 1.5, "tasks_present": None, "tasks_total": None,
        "note": None,
    }  # fmt: skip
    mine = next(one for one in records if one["task"] == "average/mine (partial)")
    assert (mine["tasks_present"], mine["tasks_total"]) == (3, 5)
    assert (mine["low"], mine["high"]) == summary.average_intervals["mine"]
    write_csv(tmp_path / "eval.csv", summary)
    read = pd.read_csv(tmp_path / "eval.csv")
    assert list(read) == list(records[0])
    expected = pd.DataFrame(records)
    for column in ("value", "low", "high", "chance", "samples", "tasks_total"):
        np.testing.assert_array_equal(read[column], expected[column].astype(float))
    assert read["task"].tolist() == expected["task"].tolist()


def test_chance_is_of_the_main_metric_of_the_task_list() -> None:
    chances = [
        make_result("vtab/pets"),
        make_result("vtab/pets", metric="mean_per_class_recall"),
        make_result("vtab/pets", metric=MAIN_METRIC),  # as files of other tools are read
        make_result("pets"),
        make_result("vtab/pets", metric="mean_per_class_recall", samples=3669),
        make_result("vtab/pets", metric="mean_per_class_recall", samples=3668),  # another set
    ]
    found = [summarise([result], {}).records()[0]["chance"] for result in chances]
    assert found == [None, 0.027027, 0.027027, None, 0.027027, None]


def test_chance_is_what_the_kind_says() -> None:
    results = [
        replace(make_result(key, [1, 0]), chances={"acc1": 0.25}) for key in ("counts", "vtab/pets")
    ]
    assert [row["chance"] for row in summarise(results, {}).records()[:2]] == [0.25, 0.25]


@pytest.mark.parametrize("columns", [20, 72, 80, 91, 92, 300])
def test_a_narrow_terminal(summary: Summary, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = summary.table().splitlines()
    width = min(100, max(72, columns))
    assert max(map(display_width, lines)) <= width
    assert ("chance" in lines[0]) == (columns >= 92)
    long = [make_result("x" * 99, [1], metric="mean_average_precision"), *summary.results]
    first = summarise(long, {"g" * 99: ["birds"]}).table().splitlines()
    assert max(map(display_width, first)) <= width
    assert any(line.startswith("  xx") and "xxx..." in line for line in first)


def test_a_task_of_which_the_metric_is_not_defined_is_not_missing() -> None:
    found = summarise([make_result("a", value=None), make_result("b", [1])], {"all": ["a", "b"]})
    assert found.missing == ()
    assert "(partial: 1 of 2 tasks)" in found.table()


def test_a_task_with_two_results_is_an_error() -> None:
    with pytest.raises(InputError, match="'a' has two"):
        summarise([make_result("a", [1]), make_result("a", [0])], {})


def test_no_result_at_all() -> None:
    found = summarise([], {}, failures=[TaskFailure(key="a", message="no.")])
    lines = found.table().splitlines()
    assert lines[1:3] == ["Custom tasks", "  a   -  failed      -  -                   -"]
    assert lines[-1] == "failed: a: no."
    assert found.metrics() == {}
    (record,) = found.records()
    assert (record["task"], record["value"], record["note"]) == ("a", None, "failed: no.")
    assert summarise([], {}).table() == "no results"


def test_forty_tasks_with_hostile_names_fit_and_nothing_is_lost() -> None:
    results = [
        make_result(
            key,
            [1, 0] if task.main_metric else None,
            family=task.family,
            title=task.title,
            metric=task.main_metric,
        )
        for key, task in KNOWN_TASKS.items()
    ]
    hostile = [
        make_result("x\x1b[2J" + "狗" * 60, [1], title="same"),
        make_result("y" * 120, [1], title="same"),
        make_result("z", [1], title="t\nImageNet" * 20, metric="m\r" * 40, family="new\x07" * 40),
    ]
    missing = [f"wds-missing-task-{i}" for i in range(30)]
    groups = {"g" * 150: [*KNOWN_TASKS, "mnist-2"]}
    found = summarise([*results, *hostile], groups, missing=missing, resamples=10)
    text = found.table()
    assert max(map(display_width, text.splitlines())) <= 100
    assert text.replace("\n", "").isprintable()
    assert all(task.title in text for task in KNOWN_TASKS.values())
    assert all(name in text for name in [*missing, "mnist-2", "yyyy...yyyy", "x\\x1b[2J"])
    lines = text.splitlines()
    order = [lines.index(title) for title in ("ImageNet", "VTAB", "WILDS", "Other", "Custom tasks")]
    assert order == sorted(order)
    assert lines[order[-1] + 3].startswith("new\\x07")  # an unknown family, after our own
    assert "partial: 38 of 41 tasks" in text


def test_tasks_of_one_title_are_shown_by_their_names() -> None:
    zero_shot = make_result("cifar10", [1], title="CIFAR-10", family="other")
    probe = replace(zero_shot, key="cifar10 linear probe")
    text = summarise([zero_shot, probe], {}).table()
    assert "  cifar10 " in text
    assert "  cifar10 linear probe " in text
