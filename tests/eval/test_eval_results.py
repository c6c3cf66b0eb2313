from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from siftclip.eval.results import (
    TaskResult,
    aggregate,
    append_result,
    format_table,
    read_results,
    wilson_interval,
    write_lines,
)
from siftclip.selectors.errors import InputError


def result(key: str, value: float | None = 0.25, **metrics: float) -> TaskResult:
    return TaskResult(
        key=key,
        dataset=key.upper(),
        metrics={"acc1": value, "acc5": None, **metrics, "main_metric": value},
        main_metric_name="acc1",
        samples=4,
        interval=(0.05, 0.7),
        seconds=1.5,
        model="abc",
        correct=np.array([True, False, False, False]),
    )


def test_wilson_against_arithmetic() -> None:
    # 8 of 10, z^2 = 3.841459: centre = (.8 + 3.841459 / 20) / (1 + .3841459) = .992073 / 1.3841459
    # = .716740; radius = 1.959964 * sqrt(.16 / 10 + 3.841459 / 400) / 1.3841459
    # = 1.959964 * sqrt(.025603648) / 1.3841459 = .313615 / 1.3841459 = .226577
    low, high = wilson_interval(0.8, 10)
    assert low == pytest.approx(0.490162, abs=2e-6)
    assert high == pytest.approx(0.943317, abs=2e-6)


def test_wilson_against_scipy() -> None:
    binomtest = pytest.importorskip("scipy.stats").binomtest
    for hits, samples in [(0, 1), (1, 1), (0, 50), (17, 50), (50, 50), (499, 5000)]:
        expected = binomtest(hits, samples).proportion_ci(0.95, method="wilson")
        assert wilson_interval(hits / samples, samples) == pytest.approx(tuple(expected), abs=1e-12)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "run" / "eval_results.jsonl"
    assert read_results(path) == []
    written = [result("mnist"), replace(result("multi"), correct=None, interval=None)]
    for one in written:
        append_result(path, one)
    read = read_results(path)
    assert read == written
    assert read[1].correct is None
    assert read[0].correct is not None
    assert read[0].correct.dtype == np.bool_
    assert read[0].correct.tolist() == [True, False, False, False]
    assert sorted(p.name for p in path.parent.rglob("*.npz")) == ["mnist.npz"]
    write_lines(path, read[1:])
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
        "seconds": 1.5,
        "model": "abc",
    }


def test_reads_a_file_of_datacomp(tmp_path: Path) -> None:
    path = tmp_path / "eval_results.jsonl"
    line = {"key": "vtab/dtd", "dataset": "DTD", "metrics": {"acc1": 0.1, "main_metric": 0.1}}
    fairness = {"key": "fairness/utkface", "dataset": "UTKFace", "metrics": {"acc": 0.5}}
    path.write_text(f"{json.dumps(line)}\n{json.dumps(fairness)}\n")
    dtd, utkface = read_results(path)
    assert (dtd.key, dtd.main_metric, dtd.model, dtd.correct) == ("vtab/dtd", 0.1, None, None)
    assert utkface.main_metric is None


def test_a_key_does_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "run" / "eval_results.jsonl"
    append_result(path, result("../../vtab/dtd"))
    (file,) = tmp_path.rglob("*.npz")
    assert file.parent == tmp_path / "run" / "eval_results_correct"
    assert read_results(path)[0].correct is not None


@pytest.mark.parametrize(
    "line",
    ["[]", "3", '{"key": "a"}', '{"key": 1, "dataset": "a", "metrics": {}}',
     '{"key": "a", "dataset": "a", "metrics": 1}',
     '{"key": "a", "dataset": "a", "metrics": {}, "interval": []}'],
)  # fmt: skip
def test_a_line_that_is_no_result(tmp_path: Path, line: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InputError, match=r"r\.jsonl, line 1, must be a result"):
        read_results(path)


def test_a_damaged_array(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    append_result(path, result("a"))
    (tmp_path / "r_correct" / "a.npz").write_bytes(b"PK?")
    with pytest.raises(InputError, match=r"a\.npz is not a readable npz"):
        read_results(path)


def test_aggregate() -> None:
    results = [result("a", 0.2), result("b", 0.4, recall=0.9), result("undefined", None)]
    groups = {
        "both": ["a", "b"],
        "other_metric": ["a", "b:recall"],
        "missing": ["a", "c"],
        "missing_metric": ["c:recall"],
        "not_a_number": ["a", "undefined"],
    }
    means = aggregate(results, groups)
    assert means["both"] == pytest.approx(0.3)
    assert means["other_metric"] == pytest.approx(0.55)
    assert means["missing"] is means["missing_metric"] is means["not_a_number"] is None


def test_aggregate_refuses() -> None:
    with pytest.raises(InputError, match=r"eval\.groups\.on6 must name at least one"):
        aggregate([], {"on6": []})
    with pytest.raises(InputError, match=r"groups\.g: 'a:recal' .*It has \['acc1', 'acc5', 'main"):
        aggregate([result("a")], {"g": ["a:recal"]})


def test_table() -> None:
    retrieval = replace(
        result("captions", None), main_metric_name="mean_recall@1", interval=None, samples=1000
    )
    assert format_table([result("mnist"), retrieval]) == (
        "task         n  metric          value  95 % interval\n"
        "MNIST        4  acc1           0.2500  0.0500 to 0.7000\n"
        "CAPTIONS  1000  mean_recall@1       -  -"
    )
    assert format_table([]) == "task  n  metric  value  95 % interval"
