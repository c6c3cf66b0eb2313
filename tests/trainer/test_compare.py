"""Comparisons: the arms, what is reused, the tables, and the files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from omegaconf import DictConfig

from siftclip.datamodules.demo_pool import DemoData
from siftclip.datamodules.files import read_jsonl
from siftclip.datamodules.selection import read_selection
from siftclip.selectors.errors import InputError
from siftclip.trainer.compare.arms import CompareOutcome, compare_stage
from siftclip.trainer.compare.collect import Comparison
from siftclip.trainer.compare.tables import as_markdown, main_rows, percent, spread
from siftclip.trainer.run_dir import RunDir

Compose = Callable[..., DictConfig]


def options_of(base: list[str], demo_data: DemoData) -> list[str]:
    """A comparison of three arms and two seeds."""
    return [
        *base,
        f"eval.root={demo_data.tasks}",
        "eval.tasks=[digit,colour]",
        "+eval.groups.both=[digit,colour]",
        "compare.name=small",
        "compare.seeds=[0,1]",
        f"compare.truth={demo_data.truth}",
        f'+compare.arms.oracle=["selector=external","selector.path={demo_data.oracle}"]',
    ]


def run_compare(compose: Compose, options: list[str]) -> CompareOutcome:
    return compare_stage(compose("compare", options), options)


@pytest.fixture
def options(base: list[str], demo_data: DemoData) -> list[str]:
    return options_of(base, demo_data)


@dataclass(frozen=True)
class Compared:
    """A comparison that several tests look at: its files stay as they are."""

    outputs: Path
    outcome: CompareOutcome


@pytest.fixture(scope="module")
def compared(
    base_of: Any, composing: Any, demo_data: DemoData, tmp_path_factory: pytest.TempPathFactory
) -> Compared:
    folder = tmp_path_factory.mktemp("compared")
    with composing() as compose:
        outcome = run_compare(compose, options_of(base_of(folder), demo_data))
    return Compared(folder / "outputs", outcome)


def test_comparison_of_three_arms_and_two_seeds(compared: Compared) -> None:
    outcome = compared.outcome
    assert outcome.folder == compared.outputs / "compare" / "small"
    results = pd.read_csv(outcome.folder / "results.csv")
    assert set(results["arm"]) == {"random", "clip_score", "oracle"}
    assert set(results["seed"]) == {0, 1}
    assert set(results["task"]) == {"digit", "colour", "average/both"}
    # every number can be found in the run that it names
    row = results[(results["task"] == "digit") & (results["metric"] == "acc1")].iloc[0]
    lines = read_jsonl(Path(row["run"]) / "eval_results.jsonl")
    assert [r["metrics"]["acc1"] for r in lines if r["key"] == "digit"] == [row["value"]]
    both = results[results["task"] == "average/both"].iloc[0]
    own = results[(results["run"] == both["run"]) & (results["metric"] == "main_metric")]
    parts = own[own["task"].isin(["digit", "colour"])]["value"]
    assert both["value"] == pytest.approx(parts.mean())
    report = (outcome.folder / "report.md").read_text()
    for arm in ("random", "clip_score", "oracle"):
        assert arm in outcome.table
        assert f"| {arm} |" in report
    assert "± " in outcome.table
    assert "96 samples in 6 steps of batch 16" in report


def test_budgets_are_equal_and_random_draws_differ_by_seed(compared: Compared) -> None:
    runs = [RunDir(path=path) for path in (compared.outputs / "train").iterdir()]
    assert {run.summary["trained_samples"] for run in runs if run.summary} == {96}
    digests = {
        selector: {
            read_selection(run.path).digest
            for run in runs
            if run.summary and run.summary["selector"] == selector
        }
        for selector in ("random", "clip_score", "external")
    }
    assert [len(found) for found in digests.values()] == [2, 1, 1]


def test_truth_is_counted_among_the_selected(compared: Compared, demo_data: DemoData) -> None:
    report = (compared.outcome.folder / "report.md").read_text()
    line = next(x for x in report.splitlines() if x.startswith("| selector | overlap"))
    kinds = pd.read_parquet(demo_data.truth)["kind"].unique()
    assert all(kind in line for kind in kinds)
    oracle = next(x for x in report.splitlines() if x.startswith("| oracle | 0."))
    assert "100.0 %" in oracle.split("|")[4 + sorted(kinds).index("clean") + 1]


def test_finished_runs_are_reused_and_broken_ones_repeated(
    compared: Compared, options: list[str], compose: Compose, tmp_path: Path
) -> None:
    shutil.copytree(compared.outputs, tmp_path / "outputs")
    summaries = sorted((tmp_path / "outputs" / "train").glob("*/summary.json"))
    assert len(summaries) == 6
    times = {path: path.stat().st_mtime_ns for path in summaries}
    summaries[0].unlink()  # as if it had been killed before its end
    again = run_compare(compose, options)
    assert again.table == compared.outcome.table
    changed = [path for path in summaries if path.stat().st_mtime_ns != times[path]]
    assert changed == [summaries[0]]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compare.seeds=[]", r"compare\.arms and compare\.seeds must not be empty"),
        ("compare.seeds=[1,1]", r"compare\.seeds must be distinct. Got \[1, 1\]"),
        ('+compare.arms.x=["selector=nope"]', r"compare\.arms\.x: .*selector/nope"),
        ('+compare.arms.x=["selector.fraction=2"]', r"selector\.fraction must be .* Got 2"),
        ('+compare.arms.x=["scale.samples_seen=16"]', r"compare\.arms\.x has the budget"),
        ('+compare.arms.x=["loss=nope"]', r"compare\.arms\.x: .*loss/nope"),
        (
            '+compare.arms.x=["online=every_step","online.selector.fraction=7"]',
            r"online\.selector\.fraction must be",
        ),
        ("eval.root=null", r"eval\.root must name a folder of tasks"),
        ("eval.tasks=[nope]", r"nope"),
        ("trainer.devices=2", r"compare on 2 devices must be started by torchrun"),
    ],
)
def test_faults_are_found_before_the_first_run(
    override: str, message: str, options: list[str], compose: Compose, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        run_compare(compose, [*options, override])
    assert not (tmp_path / "outputs" / "train").exists()


def make_comparison(values: dict[str, list[float | None]]) -> Comparison:
    records = [
        {"arm": arm, "seed": seed, "task": "t", "metric": "main_metric", "value": value}
        for arm, own in values.items()
        for seed, value in enumerate(own)
    ]
    runs = [
        {
            "arm": r["arm"],
            "seed": r["seed"],
            "selected_samples": 7,
            "passes": 2.0,
            "train_seconds": 3,
        }
        for r in records
    ]
    return Comparison(
        name="x",
        arms=tuple(values),
        seeds=(0, 1),
        columns=("t",),
        results=pd.DataFrame(records),
        runs=pd.DataFrame(runs),
        overlap=pd.DataFrame(),
        truth=None,
        settings={},
        versions={},
    )


def test_mean_and_deviation() -> None:
    comparison = make_comparison({"b": [0.5, 0.52], "a": [0.4, None]})
    table = spread(comparison, ["t"])
    assert list(table.index) == ["b", "a"]
    assert table.loc["b", ("t", "mean")] == pytest.approx(0.51)
    # sqrt(((0.5 - 0.51)^2 + (0.52 - 0.51)^2) / (2 - 1))
    assert table.loc["b", ("t", "sd")] == pytest.approx(np.sqrt(2e-4))
    assert np.isnan(table.loc["a", ("t", "mean")])
    assert main_rows(comparison, ["t"])[1] == ["b", "7", "2.0", "51.0 ± 1.4", "3"]
    assert main_rows(comparison, ["t"])[2][3] == "-"


def test_cells() -> None:
    assert percent(0.517, float("nan")) == "51.7"
    assert percent(float("nan"), float("nan")) == "-"
    assert as_markdown([["a|b", "c"], ["d", "e"]]).splitlines()[0] == "| a\\|b | c |"
