"""Numbers that cannot be are refused, or counted as missing, by the one reader of results."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftclip.errors import InputError
from siftclip.eval.metrics.outcomes import Outcomes
from siftclip.eval.reports.report import summarise
from siftclip.eval.results.aggregates import result_averages
from siftclip.eval.results.files import (
    KeptResults,
    TaskResult,
    append_failure,
    append_result,
    outcomes_path,
    read_kept,
    read_results,
    write_lines,
)
from siftclip.eval.results.result_checks import check_metrics, check_outcomes
from siftclip.eval.significance.resampling import point_value
from siftclip.eval.tasks.preparation import TaskFailure

Arrays = dict[str, Any]
N = 6
UNITS = np.arange(N, dtype=np.uint64)
FLOATS = np.linspace(0, 1, N).astype(np.float32)
NUMBERS = np.arange(N, dtype=np.int32) % 3
OUTCOMES = {
    "mean": {"value": FLOATS},
    "class_mean": {"value": FLOATS, "cell": NUMBERS},
    "worst_cell": {"value": FLOATS, "cell": NUMBERS - 1},
    "f1_macro": {"predicted": NUMBERS, "label": NUMBERS[::-1].copy()},
    "two_means": {"value": FLOATS, "hits": FLOATS, "queries": FLOATS + 1},
    "average_precision": {
        "scores": np.stack([FLOATS, -FLOATS], axis=1),
        "labels": np.stack([NUMBERS == 0, NUMBERS == 1], axis=1),
    },
}


def write(path: Path, statistic: str = "mean", **changes: Any) -> None:
    """One result with what it is made of."""
    outcomes = Outcomes(statistic=statistic, arrays=OUTCOMES[statistic])  # type: ignore[arg-type]
    value = point_value(outcomes)
    result = TaskResult(
        key="a",
        dataset="A",
        metrics={"acc1": value, "count_x": 3.0, "l2": 7.5, "acc5": None, "main_metric": value},
        main_metric_name="acc1",
        samples=N,
        interval=(value, value),
        seconds=1.0,
        model="m",
        task="t",
        outcomes=outcomes,
        units=UNITS,
    )
    append_result(path, replace(result, **changes))


def edit(path: Path, **changes: Any) -> None:
    """Change fields of the last line."""
    *lines, last = path.read_text().splitlines()
    path.write_text("\n".join([*lines, json.dumps({**json.loads(last), **changes})]) + "\n")


@pytest.mark.parametrize("statistic", list(OUTCOMES))
def test_what_is_written_is_read(tmp_path: Path, statistic: str) -> None:
    write(tmp_path / "r.jsonl", statistic)
    (result,) = read_results(tmp_path / "r.jsonl")
    assert result.outcomes is not None
    assert result.outcomes.statistic == statistic
    assert result.metrics["l2"] == 7.5  # no share


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": {}}, r"key must be a text"),
        ({"key": ""}, r"key must be a text"),
        ({"key": "\ud800"}, r"key must be a text"),
        ({"key": "k" * 999}, r"File name too long"),
        ({"dataset": 3}, r"dataset must be a text .* Got 3"),
        ({"family": [1]}, r"family must be a text"),
        ({"model": 1}, r"model must be a text"),
        ({"main_metric_name": 1}, r"main_metric_name must be a text"),
        ({"samples": "x"}, r"samples must be a number\. Got 'x'"),
        ({"samples": -1}, r"samples must be finite and at least 0\. Got -1"),
        ({"samples": 1.5}, r"samples must be a whole number"),
        ({"samples": True}, r"samples must be a number\. Got True"),
        ({"samples": 5}, r"samples is 5, but its outcomes are of 6"),
        ({"seconds": -1}, r"seconds must be finite and at least 0"),
        ({"samples": 1e300}, r"samples must lie in|whole number of at most 2\*\*53"),
        ({"seconds": math.nan}, r"seconds must be finite"),
        ({"seconds": 10**400}, r"seconds must lie in \[-1e100, 1e100\]"),
        ({"interval": ["a", "b"]}, r"interval must be a number\. Got 'a'"),
        ({"interval": [0.1]}, r"interval must be two numbers"),
        ({"interval": {"0": 1}}, r"interval must be two numbers"),
        ({"interval": [0.6, 0.4]}, r"interval must begin with its lower end"),
        ({"interval": [-0.2, 0.9]}, r"interval must be a share in \[0, 1\]"),
        ({"interval": [0.0, math.nan]}, r"interval must be finite"),
        ({"interval": [0.8, 0.9]}, r"interval must hold the main metric 0\.5"),
        ({"metrics": None}, r"metrics must be numbers by name"),
        ({"metrics": {"main_metric": "x"}}, r"metrics\.main_metric must be a number"),
        ({"metrics": {"main_metric": True}}, r"metrics\.main_metric must be a number"),
        ({"metrics": {"main_metric": 7.0}}, r"metrics\.main_metric must be a share .* Got 7\.0"),
        ({"metrics": {"main_metric": -0.1}}, r"metrics\.main_metric must be a share"),
        ({"metrics": {"main_metric": 1e308}}, r"metrics\.main_metric must be a share"),
        ({"metrics": {"main_metric": math.inf}}, r"metrics\.main_metric must be finite"),
        ({"metrics": {"main_metric": 10**400}}, r"metrics\.main_metric must be a share"),
        ({"metrics": {"text_retrieval_recall@5": 50}}, r"must be a share in \[0, 1\], not a perc"),
        ({"metrics": {"count_slide:3": 1.5}}, r"count_slide:3 must be a whole number"),
        ({"metrics": {"l2": math.inf}}, r"metrics\.l2 must be finite"),
        ({"metrics": {"l2": -math.inf}}, r"metrics\.l2 must be finite"),
        ({"metrics": {"l2": 1e308}}, r"metrics\.l2 must lie in \[-1e100, 1e100\]"),
        ({"metrics": {"l2": 10**400}}, r"metrics\.l2 must lie in"),
        ({"metrics": {"roc_auc": 7.0}}, r"metrics\.roc_auc must be a share"),
        ({"metrics": {"count_x": 10**20}}, r"count_x must be a whole number of at most 2\*\*53"),
        ({"metrics": {"acc1": 0.5, "main_metric": 0.4}}, r"main_metric is 0\.4, but acc1 is 0\.5"),
        ({"metrics": {"acc1": 0.5, "main_metric": None}}, r"main_metric is None, but acc1 is 0\.5"),
        ({"metrics": {"main_metric": 0.4}, "interval": None}, r"is not of the result"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path: Path, changes: Arrays, message: str) -> None:
    path = tmp_path / "r.jsonl"
    write(path)
    edit(path, **changes)
    with pytest.raises(InputError, match=message) as caught:
        read_results(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize(
    "data",
    [
        *(b"\xff\xfe\n{}\n", b"[" * 100_000 + b"\n{}\n", b"\0\0\n{}\n", b"[]\n", b'"x"\n', b"1\n"),
        b'{"metrics": {"acc1": 0.1, "acc1": 0.9}}\n',
        b'{"samples": ' + b"9" * 5000 + b"}\n",
        '{"key": "a"}\n'.encode("utf-16"),
    ],
)
def test_damaged_lines(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"r\.jsonl, line 1, (is not JSON|must be a JSON object)"):
        read_results(path)


def test_a_mark_at_the_start_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert [result.key for result in read_results(path)] == ["a"]


def test_a_task_has_one_result(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path)
    write(path, seconds=2.0)
    with pytest.raises(InputError, match=r"r\.jsonl, line 2: .* 'a' has two\. Delete one"):
        read_kept(path)
    (last,) = read_kept(path, latest=True).results
    assert last.seconds == 2.0


@pytest.mark.parametrize("nan", [{"main_metric": math.nan}, {"main_metric": 0.5, "acc1": math.nan}])
def test_nan_is_counted_and_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, nan: dict[str, float]
) -> None:
    path = tmp_path / "r.jsonl"
    write(path)
    write(path, key="b")
    edit(path, metrics={**nan, "acc5": math.nan})
    first, second = read_results(path)
    assert "2 metrics are NaN and count as missing" in caplog.text
    assert first.note == ""
    assert (second.main_metric, second.interval, second.outcomes) == (None, None, None)
    average = result_averages([first, second], {"both": ["a", "b"]})["both"]
    assert (average.value, average.missing) == (first.main_metric, ("b",))
    summary = summarise([first, second], {})
    assert "b: no value: the main metric is NaN" in summary.table()
    assert summary.records()[1]["note"] == "no value: the main metric is NaN"


names = st.sampled_from(["acc1", "acc5", "mean_recall@1", "jaccard_score_6", "F1-macro_all"])
anything = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.floats())
)


@given(st.dictionaries(names, anything))
def test_no_share_outside_of_0_and_1_gets_through(metrics: dict[str, Any]) -> None:
    try:
        values, undefined = check_metrics(metrics)
    except ValueError:
        assert any(
            not isinstance(v, int | float) or isinstance(v, bool) or not 0 <= v <= 1
            for v in metrics.values()
            if v is not None
        )
    else:
        assert all(v is None or 0 <= v <= 1 for v in values.values())
        assert {k for k, v in metrics.items() if v != v} == {*undefined}


def changed(statistic: str, change: Callable[[Arrays], Any]) -> Arrays:
    arrays: Arrays = {name: array.copy() for name, array in OUTCOMES[statistic].items()}
    change(arrays)
    return arrays


def put(name: str, value: Any) -> Callable[[Arrays], Any]:
    """Set the first number of an array."""
    return lambda arrays: arrays[name].flat.__setitem__(0, value)


@pytest.mark.parametrize(
    ("statistic", "change", "message"),
    [
        ("mean", lambda a: a.clear(), r"mean needs the arrays \['value'\]\. Got \[\]"),
        ("mean", lambda a: a.update(cell=NUMBERS), r"mean needs the arrays"),
        ("mean", lambda a: a.update(value=FLOATS[:3]), r"value must be floats for 6 units"),
        ("mean", lambda a: a.update(value=FLOATS.astype("U5")), r"value must be floats"),
        ("mean", lambda a: a.update(value=FLOATS[:, None]), r"value must be floats"),
        ("mean", put("value", 7), r"value must be shares in \[0, 1\] or NaN"),
        ("mean", put("value", math.inf), r"value must be shares"),
        ("mean", put("value", 1.001), r"value must be shares"),
        ("mean", put("value", -0.001), r"value must be shares"),
        ("class_mean", lambda a: a.update(cell=FLOATS), r"cell must be integers"),
        ("worst_cell", put("cell", -2), r"cell must be at least -1"),
        ("f1_macro", put("label", -1), r"label must be at least 0"),
        ("f1_macro", put("predicted", -1), r"predicted must be at least 0"),
        ("two_means", put("hits", 5), r"hits must not be more than queries"),
        ("two_means", put("hits", 1.01), r"hits must not be more than queries"),
        ("two_means", put("hits", -0.001), r"hits must be finite and not negative"),
        ("two_means", put("queries", math.nan), r"queries must be finite"),
        ("average_precision", put("scores", math.nan), r"scores must be finite"),
        ("average_precision", lambda a: a.update(labels=a["labels"][:, :1]), r"labels must be"),
        ("median", lambda a: None, r"statistic must be one of"),
    ],
)
def test_outcomes_that_cannot_be(
    statistic: str, change: Callable[[Arrays], Any], message: str
) -> None:
    arrays = changed(statistic if statistic in OUTCOMES else "mean", change)
    with pytest.raises(ValueError, match=message):
        check_outcomes(statistic, arrays, UNITS)


def test_units_that_cannot_be() -> None:
    for units in (UNITS.astype(np.int64), UNITS[:0], UNITS[None]):
        with pytest.raises(ValueError, match="units must be uint64"):
            check_outcomes("mean", OUTCOMES["mean"], units)


def test_outcomes_of_another_result(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path)
    file = outcomes_path(path, "a")
    np.savez(file, statistic=np.asarray("mean"), units=UNITS, array_value=FLOATS / 2)
    with pytest.raises(InputError, match=r"a\.npz is not of the result that it lies beside"):
        read_results(path)
    np.savez(file, statistic=np.asarray("mean"), units=UNITS, array_value=FLOATS.astype("U3"))
    with pytest.raises(InputError, match=r"a\.npz is damaged: value must be floats"):
        read_results(path)
    file.unlink()
    assert read_results(path)[0].outcomes is None


def test_failures_are_lines_with_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path)
    failure = TaskFailure(key="vtab/dtd", message="0.tar is damaged.", model="m")
    append_failure(path, failure)
    line = json.loads(path.read_text().splitlines()[1])
    assert line["metrics"] == {"main_metric": None}
    assert (line["dataset"], line["error"]) == ("Describable Textures", "0.tar is damaged.")
    kept = read_kept(path)
    assert [result.key for result in kept.results] == ["a"]
    assert kept.failures == (failure,)
    write_lines(path, kept)
    assert read_kept(path) == kept
    write(path, key="vtab/dtd")  # a result answers the failure
    assert [result.key for result in read_results(path)] == ["a", "vtab/dtd"]
    assert read_kept(path).failures == ()
    assert KeptResults(results=tuple(read_results(path)), failures=()) == read_kept(path)
