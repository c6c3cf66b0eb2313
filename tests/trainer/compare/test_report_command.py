"""Reports of runs that are there: of copies, of runs that no comparison made, while they train."""

from __future__ import annotations

import itertools
import re
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from compared import run_compare

from siftclip.errors import InputError
from siftclip.files import read_json, write_json, write_text
from siftclip.trainer.compare.arms import CompareOutcome
from siftclip.trainer.compare.found_runs import RECORD_NAME, find_runs
from siftclip.trainer.compare.serving import ReportServer, serve_report
from siftclip.trainer.demo.pool import DemoData


@dataclass(frozen=True)
class Compared:
    """A comparison of two arms with two seeds, whose files stay as they are."""

    outputs: Path
    outcome: CompareOutcome


@pytest.fixture(scope="module")
def compared(
    base_of: Any, composing: Any, demo_data: DemoData, tmp_path_factory: pytest.TempPathFactory
) -> Compared:
    folder = tmp_path_factory.mktemp("reported")
    options = [
        *base_of(folder),
        f"eval.root={demo_data.tasks}",
        "eval.tasks=[digit,colour]",
        "+eval.groups.both=[digit,colour]",
        *("compare.name=small", "compare.seeds=[0,1]", "compare.columns=[both]"),
        f"compare.truth={demo_data.truth}",
        *("eval.during.every_n_steps=1", "eval.during.max_samples=20"),
    ]
    with composing() as compose:
        outcome = run_compare(compose, options, words=["compare.name=small"])
    return Compared(folder / "outputs", outcome)


@pytest.fixture
def copy(compared: Compared, tmp_path: Path) -> Path:
    """The outputs on another path."""
    return Path(shutil.copytree(compared.outputs, tmp_path / "elsewhere" / "outputs"))


def texts(folder: Path) -> dict[str, str]:
    """The report's files, without the path of the folder of outputs."""
    names = ["report.md", "report.html", "results.csv", "differences.csv"]
    names += [f"tables/{path.name}" for path in (folder / "tables").iterdir()]
    names += [f"{name}.json" for name in ("results", "differences")]
    outputs = str(folder.parents[1])
    written = {
        name: (folder / name).read_text().replace(outputs, "OUTPUTS")
        for name in names
        if not name.endswith(".parquet")
    }
    assert {name for name in names if name.endswith(".parquet")} == {
        f"tables/{path.stem}.parquet" for path in (folder / "tables").glob("*.csv")
    }
    return written


def test_numbers_are_there_in_three_forms(compared: Compared) -> None:
    folder = compared.outcome.folder
    tables = sorted(folder.rglob("*.csv"))
    assert {"results", "differences", "runs", "composition"} <= {path.stem for path in tables}
    for path in tables:
        rows = pd.read_csv(path)
        for other in (
            pd.read_parquet(path.with_suffix(".parquet")),
            pd.DataFrame(read_json(path.with_suffix(".json")), columns=rows.columns),
        ):
            assert list(other.columns) == list(rows.columns)
            for name in rows.select_dtypes("number"):
                numbers = (each[name].to_numpy(dtype=float) for each in (rows, other))
                np.testing.assert_allclose(*numbers, rtol=1e-14, err_msg=f"{path} {name}")


def test_a_copy_elsewhere_gives_the_same_report(
    compared: Compared, copy: Path, typed: Callable[..., Any]
) -> None:
    before = texts(compared.outcome.folder)
    shutil.rmtree(copy / "compare" / "small" / "tables")
    result = typed("report", str(copy / "compare" / "small"), "progress=false")
    assert result.returncode == 0, result.stderr
    after = texts(copy / "compare" / "small")
    assert after.keys() == before.keys()
    for name in before:
        assert after[name] == before[name], name
    assert result.stdout.startswith(compared.outcome.table)


def test_compute_saved_follows_from_the_curves(compared: Compared) -> None:
    """Computed again from tables/curves.csv, pair by pair."""
    folder = compared.outcome.folder
    curves = pd.read_csv(folder / "tables" / "curves.csv")
    curves = curves[curves["metric"] == "eval_during/average/both"]
    saved = pd.read_csv(folder / "tables" / "savings.csv")
    assert saved[["column", "arm", "against"]].to_numpy().tolist() == [
        ["average/both", "clip_score", against] for against in ("samples", "flops", "seconds")
    ]
    for row in saved.itertuples():
        logs = []
        for seed in (0, 1):
            of_arm = curves[(curves["arm"] == "clip_score") & (curves["seed"] == seed)]
            for other in (0, 1):
                of_baseline = curves[(curves["arm"] == "random") & (curves["seed"] == other)]
                target, end = of_baseline[["value", row.against]].iloc[-1]
                points = of_arm[[row.against, "value"]].to_numpy().tolist()
                reached = None
                for (x, y), (after_x, after_y) in itertools.pairwise(points):
                    if y < target <= after_y:
                        reached = x + (target - y) / (after_y - y) * (after_x - x)
                    elif after_y < target:
                        reached = None
                if all(y >= target for _, y in points):
                    reached = points[0][0]
                logs += [] if reached is None else [np.log(end / reached)]
        assert (row.reached, row.pairs) == (len(logs), 4)
        if len(logs) == 4:
            assert row.factor == pytest.approx(np.exp(np.mean(logs)))
            assert row.low <= row.factor <= row.high
        else:
            assert np.isnan(row.factor)
    page = (folder / "report.html").read_text()
    assert "Compute saved" in page
    assert "no arm has more both for fewer FLOPs than" in (folder / "report.md").read_text()


def test_runs_that_no_comparison_made(
    compared: Compared, copy: Path, typed: Callable[..., Any], tmp_path: Path
) -> None:
    shutil.rmtree(copy / "compare")
    words = ["compare.baseline=random", "compare.columns=[both]", "report.folder=mine"]
    result = typed("report", str(copy / "train"), *words, "progress=false")
    assert result.returncode == 0, result.stderr
    found = pd.read_csv(tmp_path / "mine" / "differences.csv")
    expected = pd.read_csv(compared.outcome.folder / "differences.csv")
    keys = ["column", "arm"]
    numbers = ["mean", "difference", "low", "high", "p_value", "least"]
    found, expected = (t.sort_values(keys, ignore_index=True) for t in (found, expected))
    pd.testing.assert_frame_equal(found[[*keys, *numbers]], expected[[*keys, *numbers]])
    # and single runs, in any order
    runs = sorted(map(str, (copy / "train").iterdir()), reverse=True)
    assert typed("report", *runs, *words, "progress=false").returncode == 0
    again = pd.read_csv(tmp_path / "mine" / "differences.csv")
    again = again.sort_values(keys, ignore_index=True)
    pd.testing.assert_frame_equal(again[[*keys, *numbers]], found[[*keys, *numbers]])


def test_what_is_not_finished_is_said_on_top(copy: Path, typed: Callable[..., Any]) -> None:
    runs = sorted((copy / "train").iterdir())
    (runs[0] / "summary.json").unlink()
    shutil.rmtree(runs[1])
    folder = copy / "compare" / "small"
    result = typed("report", str(folder), "progress=false", "compare.images=false")
    assert result.returncode == 0, result.stderr
    partial = "Partial: of 4 runs 2 not finished; what is missing is listed below."
    assert partial in (folder / "report.md").read_text()
    assert partial in (folder / "report.html").read_text()
    for run in runs[2:]:
        (run / "summary.json").unlink()
    result = typed("report", str(folder), "progress=false")
    assert result.returncode == 2
    assert "none of 4 runs is finished" in result.stderr


def test_arms_have_seeds_of_their_own(
    compared: Compared, copy: Path, typed: Callable[..., Any]
) -> None:
    """As the second group of a baseline's seeds; nothing is missing, with a record or without."""
    (run,) = (copy / "train").glob("random-s1-*")
    text = (run / "config.yaml").read_text()
    write_text(run / "config.yaml", re.sub(r"(?m)^( *)seed: 1$", r"\1seed: 7", text))
    (copy / "compare" / "small" / RECORD_NAME).unlink()
    shutil.rmtree(copy / "compare" / "small" / "runs")
    words = ["compare.baseline=random", "compare.columns=[both]", "report.folder=mine"]
    result = typed("report", str(copy / "train"), *words, "progress=false")
    assert result.returncode == 0, result.stderr
    assert "Missing" not in result.stdout
    assert "clip_score      2" in result.stdout


def test_arms_differ_in_more_than_the_seed(copy: Path) -> None:
    runs = sorted((copy / "train").iterdir())
    other = Path(shutil.copytree(runs[0], copy / "train" / "other"))
    text = (other / "config.yaml").read_text()
    write_text(other / "config.yaml", re.sub(r"(?m)^  lr: .*$", "  lr: 0.125", text))
    found = find_runs([copy / "train"])
    assert sorted((run.arm, run.seed) for run in found.runs) == [
        *(("clip_score", 0), ("clip_score", 1), ("other", 0), ("random", 0), ("random", 1)),
    ]
    shutil.copytree(runs[0], copy / "train" / "twice")
    with pytest.raises(InputError, match="two runs of clip_score with seed 0"):
        find_runs([copy / "train"])


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("arms", {"x": 1}, "arms must be a list"),
        ("seeds", {"random": ["0"]}, "must be a whole number"),
        ("words", [3], "must be a text"),
        ("truth", 1, "truth"),
    ],
)
def test_a_record_that_cannot_be_is_told(
    copy: Path, typed: Callable[..., Any], field: str, value: object, says: str
) -> None:
    path = copy / "compare" / "small" / RECORD_NAME
    write_json(path, {**read_json(path), field: value})
    result = typed("report", str(path.parent), "progress=false")
    assert result.returncode == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_a_configuration_names_no_class(copy: Path, typed: Callable[..., Any]) -> None:
    """Of a run of somebody else: its scores are not shown, and nothing of it runs."""
    for run in (copy / "train").glob("clip_score-*"):
        text = (run / "config.yaml").read_text()
        text = text.replace("siftclip.selectors.ClipScore", "os.abort")
        write_text(run / "config.yaml", text)
    folder = copy / "compare" / "small"
    result = typed("report", str(folder), "progress=false")
    assert result.returncode == 0, result.stderr
    assert "the report shows no scores of clip_score" in result.stderr


def test_no_runs_are_told(typed: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for words in (["empty"], ["nowhere", "empty"]):
        result = typed("report", *words)
        assert result.returncode == 2
        assert "in which no run lies" in result.stderr


# ---- serving ------------------------------------------------------------------------------------
def get(address: str, path: str = "/", **headers: str) -> tuple[int, str]:
    try:
        request = urllib.request.Request(address + path, headers=headers)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


def test_a_served_report_is_the_latest_and_for_this_machine(compared: Compared) -> None:
    written, addresses = threading.Event(), []
    calls: list[int] = []

    class Stopped(Exception):
        pass

    def write() -> CompareOutcome:
        calls.append(1)
        if len(calls) == 1:
            raise InputError("compare.name=x: none of 4 runs is finished.")
        if len(calls) == 2:
            assert "none of 4 runs" in get(addresses[0])[1]
            partial = compared.outcome.comparison
            assert partial is not None
            object.__setattr__(partial, "missing", (object(),))  # still training
            return compared.outcome
        written.set()
        assert get(addresses[0])[1] == compared.outcome.report.read_text()
        assert get(addresses[0], "/report.html")[0] == 200
        assert get(addresses[0], "/../runs/x.json")[0] == 404
        assert get(addresses[0], Host="attacker.example:80")[0] == 403
        raise Stopped

    with pytest.raises(Stopped):
        serve_report(write, port=0, interval_seconds=0.01, serving=addresses.append)
    assert written.is_set()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(addresses[0], timeout=2)


def test_a_port_that_is_taken_is_told() -> None:
    server = ReportServer(0, 1)
    port = server.server_address[1]
    with pytest.raises(InputError, match=rf"report.port={port} cannot be listened on"):
        serve_report(lambda: None, port=port, interval_seconds=1, serving=print)  # type: ignore[arg-type,return-value]
    server.server_close()
