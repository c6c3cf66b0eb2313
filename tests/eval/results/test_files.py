from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from siftclip.errors import InputError
from siftclip.eval.metrics.outcomes import Outcomes
from siftclip.eval.reports.report import summarise
from siftclip.eval.results.files import (
    KeptResults,
    TaskResult,
    append_result,
    outcomes_path,
    read_results,
    write_lines,
)
from siftclip.eval.significance.resampling import point_value

UNITS = np.asarray([7, 2**64 - 3, 11, 7], dtype=np.uint64)


def result(key: str, value: float | None = 0.25, **changes: Any) -> TaskResult:
    hits = np.asarray([1, 0, 0, 0], dtype=np.float32)
    base = TaskResult(
        key=key,
        dataset=key.upper(),
        metrics={"acc1": value, "acc5": None, "main_metric": value},
        main_metric_name="acc1",
        samples=4,
        interval=(0.05, 0.7),
        seconds=1.5,
        model="abc",
        task="def",
        family="vtab",
        outcomes=Outcomes(statistic="mean", arrays={"value": hits}),
        units=UNITS,
    )
    return replace(base, **changes)


def test_outcomes_of_other_metrics_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "eval_results.jsonl"
    top = Outcomes(statistic="mean", arrays={"value": np.asarray([1, 1, 0, 0], dtype=np.float32)})
    metrics = {"acc1": 0.25, "acc5": 0.5, "main_metric": 0.25}
    append_result(path, result("mnist", metrics=metrics, other_outcomes={"acc5": top}))
    (read,) = read_results(path)
    found = read.outcomes_of("acc5")
    assert found is not None
    assert np.array_equal(found.arrays["value"], top.arrays["value"])
    assert read.outcomes_of("acc1") is read.outcomes_of("main_metric") is read.outcomes
    assert read.outcomes_of("acc9") is None
    summary = summarise([read], {"top": ["mnist:acc5"], "none": ["mnist:acc1"]})
    low, high = summary.average_intervals["top"] or (1.0, 0.0)
    assert 0 <= low < 0.5 < high <= 1
    assert not any(summary.average_notes.values())
    line = path.read_text().replace('"acc5": 0.5', '"acc5": 0.75')
    path.write_text(line)
    with pytest.raises(InputError, match=r"its acc5 is 0\.5, not 0\.75\. Delete it"):
        read_results(path)


def test_an_average_without_an_interval_says_why() -> None:
    lacking = result("mnist", metrics={"acc1": 0.25, "acc5": 0.5, "main_metric": 0.25})
    summary = summarise([lacking], {"top": ["mnist:acc5"]})
    assert summary.average_intervals["top"] is None
    assert "top: no interval: what mnist:acc5 is made of is not kept" in summary.table()


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "run" / "eval_results.jsonl"
    assert read_results(path) == []
    cells = {"value": np.full(4, 0.25, dtype=np.float32), "cell": np.arange(4, dtype=np.int32)}
    written = [
        result("mnist", chances={"acc1": 0.1}),
        result("cells", outcomes=Outcomes(statistic="worst_cell", arrays=cells)),
        result("none", None, outcomes=None, units=None, interval=None, main_metric_name=None),
    ]
    for one in written:
        append_result(path, one)
    read = read_results(path)
    assert read == written
    for one, expected in zip(read[:2], written, strict=False):
        assert one.outcomes is not None
        assert expected.outcomes is not None
        assert one.outcomes.statistic == expected.outcomes.statistic
        assert one.outcomes.arrays.keys() == expected.outcomes.arrays.keys()
        for name, array in expected.outcomes.arrays.items():
            assert one.outcomes.arrays[name].dtype == array.dtype
            np.testing.assert_array_equal(one.outcomes.arrays[name], array)
        assert one.units is not None
        assert one.units.dtype == np.uint64
        assert one.units.tolist() == UNITS.tolist()
        assert point_value(one.outcomes) >= 0
    assert read[2].outcomes is read[2].units is None
    assert sorted(p.name for p in path.parent.rglob("*.npz")) == ["cells.npz", "mnist.npz"]
    write_lines(path, KeptResults(results=tuple(read[1:]), failures=()))
    assert read_results(path) == written[1:]


def test_lines_have_the_shape_of_datacomp(tmp_path: Path) -> None:
    path = tmp_path / "eval_results.jsonl"
    append_result(path, result("mnist"))
    (line,) = path.read_text().splitlines()
    assert json.loads(line) == {
        "key": "mnist",
        "dataset": "MNIST",
        "metrics": {"acc1": 0.25, "acc5": None, "main_metric": 0.25},
        "main_metric_name": "acc1",
        "samples": 4,
        "interval": [0.05, 0.7],
        "family": "vtab",
        "seconds": 1.5,
        "model": "abc",
        "task": "def",
        "tars": None,
    }


def test_reads_a_file_of_datacomp(tmp_path: Path) -> None:
    path = tmp_path / "eval_results.jsonl"
    line = {"key": "vtab/dtd", "dataset": "DTD", "metrics": {"acc1": 0.1, "main_metric": 0.1}}
    fairness = {"key": "fairness/utkface", "dataset": "UTKFace", "metrics": {"acc": 0.5}}
    path.write_text(f"{json.dumps(line)}\n{json.dumps(fairness)}\n")
    dtd, utkface = read_results(path)
    assert (dtd.key, dtd.main_metric, dtd.model, dtd.outcomes) == ("vtab/dtd", 0.1, None, None)
    assert dtd.task is None
    assert utkface.main_metric is None


def test_a_key_does_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "run" / "eval_results.jsonl"
    append_result(path, result("../../vtab/dtd"))
    (file,) = tmp_path.rglob("*.npz")
    assert file.parent == tmp_path / "run" / "eval_results_outcomes"
    assert read_results(path)[0].outcomes is not None


def test_outcomes_of_an_earlier_result_are_not_taken_for_those_of_a_later(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    append_result(path, result("a"))
    write_lines(path, KeptResults(results=(), failures=()))
    append_result(path, result("a", None, model="other", outcomes=None, interval=None))
    (read,) = read_results(path)
    assert (read.model, read.outcomes) == ("other", None)


def test_the_line_comes_after_the_outcomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies between them has no line, and one that dies before has neither."""
    path = tmp_path / "r.jsonl"

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("siftclip.eval.results.files.append_jsonl", die)
        with pytest.raises(KeyboardInterrupt):
            append_result(path, result("a"))
    assert outcomes_path(path, "a").exists()
    assert read_results(path) == []
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            append_result(path, result("b"))
    assert read_results(path) == []
    assert [file.name for file in tmp_path.rglob("*.npz")] == ["a.npz"]


@pytest.mark.parametrize(
    "line",
    ["[]", "3", '{"key": "a"}', '{"key": 1, "dataset": "a", "metrics": {}}',
     '{"key": "a", "dataset": "a", "metrics": 1}',
     '{"key": "a", "dataset": "a", "metrics": {}, "interval": []}'],
)  # fmt: skip
def test_a_line_that_is_no_result(tmp_path: Path, line: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InputError, match=r"r\.jsonl, line 1, must be a (result|JSON)"):
        read_results(path)


def test_a_damaged_array(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    append_result(path, result("a"))
    file = tmp_path / "r_outcomes" / "a.npz"
    file.write_bytes(b"PK?")
    with pytest.raises(InputError, match=r"a\.npz is not a readable npz"):
        read_results(path)
    np.savez(file, other=np.arange(3))
    with pytest.raises(InputError, match=r"a\.npz must hold the arrays 'statistic' and 'units'"):
        read_results(path)
