"""Comparisons: the arms, what is reused, the tables, and the files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from compared import run_compare
from omegaconf import DictConfig
from wandb_offline import read_parts

from siftclip.datamodules.selection.selection import make_selection, read_selection
from siftclip.errors import InputError
from siftclip.eval.results.files import append_failure
from siftclip.eval.tasks.preparation import TaskFailure
from siftclip.files import read_jsonl
from siftclip.trainer.compare.arms import CompareOutcome
from siftclip.trainer.compare.collect import ArmComparison, _truth, collect
from siftclip.trainer.compare.page.galleries import choose_galleries, read_galleries
from siftclip.trainer.compare.page.page import html
from siftclip.trainer.compare.page.pool_view import open_view
from siftclip.trainer.compare.report import markdown
from siftclip.trainer.compare.run_notes import ArmRun
from siftclip.trainer.compare.tables import (
    as_markdown,
    cost_rows,
    format_main_table,
    main_rows,
    percent,
    selection_rows,
    spread,
)
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.runtime.seed_runs import other_seeds
from siftclip.trainer.settings.commands import CompareCommand

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


def test_report_shows_what_is_kept_and_dropped(compared: Compared, demo_data: DemoData) -> None:
    folder = compared.outcome.folder
    page = (folder / "report.html").read_text()
    assert page.count("data:image/webp;base64,") > 50
    assert len(page) < 20e6
    composition = pd.read_csv(folder / "tables" / "composition.csv")
    assert {"cluster of images", "kind"} <= {*composition["property"]}
    kinds = composition[composition["property"] == "kind"]
    truth = pd.read_parquet(demo_data.truth)["kind"].value_counts()
    oracle = kinds[kinds["arm"] == "oracle"].set_index("part")
    assert oracle["pool_samples"].to_dict() == truth.to_dict()
    assert oracle["recall"].gt(0).to_dict() == {kind: kind == "clean" for kind in truth.index}
    for _, rows in composition.groupby(["property", "arm"]):
        assert rows["kept_share"].sum() == pytest.approx(1)
        assert rows["pool_share"].sum() == pytest.approx(1)
        assert rows["ratio"].between(rows["low"] - 1e-9, rows["high"] + 1e-9).all()
    scores = pd.read_csv(folder / "tables" / "scores.csv").groupby("arm")[["pool", "kept"]].sum()
    runs = [RunDir(path=Path(path)) for path in pd.read_csv(folder / "tables" / "runs.csv")["run"]]
    of_score = next(run for run in runs if "clip_score-s0" in run.path.name)
    assert scores.loc["clip_score", "kept"] == len(read_selection(of_score.path).uids)
    report = (folder / "report.md").read_text()
    for row in composition.to_dict("records"):
        table = report.partition(f"| {row['property']} | of the pool |")[2].splitlines()
        line = next(line for line in table if line.startswith(f"| {row['part']} | "))
        place = ["random", "clip_score", "oracle"].index(row["arm"])
        star = "" if row["low"] <= 1 <= row["high"] else " *"
        assert line.split(" | ")[2 + place].removesuffix(" |") == f"{row['ratio']:.2f}{star}"
    samples = pd.read_csv(folder / "tables" / "samples.csv")
    kept = set(read_selection(of_score.path).ids)
    shown = samples[samples["gallery"] == "kept by clip_score, dropped by random"]
    assert 0 < len(shown) <= 48
    assert set(shown["uid"]) <= kept
    other = samples[samples["gallery"] == "kept by random, dropped by clip_score"]
    assert not set(other["uid"]) & kept


def test_report_without_a_pool_or_without_images(
    compared: Compared, copied: Copied, compose: Compose, options: list[str], tmp_path: Path
) -> None:
    comparison = collect(copied.config, copied.runs)
    arms = {arm: compose("train", options_of_train(options)) for arm in comparison.arms}
    without = compose("compare", [*options, "compare.images=false"])
    view = open_view(without, comparison, arms)
    assert not isinstance(view, str)
    page = html(comparison, samples=view)
    assert "data:image" not in page
    assert 'class="caption"' in page
    gone = compose("compare", [*options, f"pool.root={tmp_path / 'gone'}"])
    why = open_view(gone, comparison, arms)
    assert isinstance(why, str)
    assert "no samples are shown" in html(comparison, samples=why)


def test_samples_that_cannot_be_read_are_placeholders(
    copied: Copied, compose: Compose, options: list[str], demo_data: DemoData, tmp_path: Path
) -> None:
    shutil.copytree(demo_data.pool, tmp_path / "pool")
    own = [*options, f"pool.root={tmp_path / 'pool'}", f"pool.cache_dir={tmp_path / 'cache'}"]
    comparison = collect(copied.config, copied.runs)
    arms = {arm: compose("train", options_of_train(own)) for arm in comparison.arms}
    view = open_view(compose("compare", own), comparison, arms)
    assert not isinstance(view, str)
    galleries = choose_galleries(comparison, view)
    row = galleries[0].rows[0]
    shard = Path(view.pool.shards[view.pool.shard_of_row[row]].path)
    stat = shard.stat()
    with shard.open("r+b") as file:
        file.seek(int(view.pool.image_offsets_bytes[row]))
        file.write(b"\0" * int(view.pool.image_sizes_bytes[row]))
        file.seek(int(view.pool.text_offsets_bytes[row]))
        caption = "<b>\u202e\x1b[31m".encode()
        file.write(
            caption.ljust(int(view.pool.text_sizes_bytes[row]))[: view.pool.text_sizes_bytes[row]]
        )
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    first = read_galleries(view, galleries)[0].samples
    assert first[0].image is None
    assert "cannot be decoded" in first[0].fault
    assert all(sample.image is not None for sample in first[1:])
    page = html(comparison, samples=view)
    assert "<b>" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "could not be read" in page


def options_of_train(options: list[str]) -> list[str]:
    """Those of a comparison that `train` has, too."""
    return [each for each in options if "compare." not in each]


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
    line = next(x for x in report.splitlines() if x.startswith("| arm | overlap"))
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
        ('+compare.arms.x=["loss=plugin","loss.plugin=nope"]', r"loss\.plugin must be"),
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


def make_comparison(values: dict[str, list[float | None]]) -> ArmComparison:
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
    return ArmComparison(
        name="x",
        arms=tuple(values),
        seeds=dict.fromkeys(values, (0, 1)),
        baseline=next(iter(values)),
        again=None,
        tests={},
        columns=("t",),
        results=pd.DataFrame(records),
        runs=pd.DataFrame(runs),
        overlap=pd.DataFrame(),
        truth=None,
        settings={},
        environments={},
    )


def test_mean_and_deviation() -> None:
    comparison = make_comparison({"b": [0.5, 0.52], "a": [0.4, None]})
    table = spread(comparison, ["t"])
    assert list(table.index) == ["b", "a"]
    assert table.loc["b", ("t", "mean")] == pytest.approx(0.51)
    # sqrt(((0.5 - 0.51)^2 + (0.52 - 0.51)^2) / (2 - 1))
    assert table.loc["b", ("t", "sd")] == pytest.approx(np.sqrt(2e-4))
    assert np.isnan(table.loc["a", ("t", "mean")])
    assert main_rows(comparison, ["t"])[1] == ["b", "2", "7", "2.0", "51.0 ± 1.4", "3"]
    assert main_rows(comparison, ["t"])[2][4] == "-"
    lacking = replace(comparison, results=comparison.results.drop(index=1))  # no row at all
    assert main_rows(lacking, ["t"])[1][4] == "-"


@dataclass(frozen=True)
class Copied:
    config: CompareCommand
    runs: list[ArmRun]

    def without(self, *places: tuple[str, int]) -> list[ArmRun]:
        return [one for one in self.runs if (one.arm, one.seed) not in places]

    def results(self, arm: str, seed: int) -> Path:
        run = next(one for one in self.runs if (one.arm, one.seed) == (arm, seed)).run
        assert run is not None
        return run.results

    def drop(self, arm: str, seed: int, task: str) -> Path:
        """Remove a line of a run's results."""
        path = self.results(arm, seed)
        kept = [line for line in path.read_text().splitlines() if f'"key": "{task}"' not in line]
        path.write_text("\n".join(kept) + "\n")
        return path


@pytest.fixture
def copied(compared: Compared, compose: Compose, options: list[str], tmp_path: Path) -> Copied:
    """Copies of the six runs, which a test may damage."""
    results = pd.read_csv(compared.outcome.folder / "results.csv")
    runs = []
    for (seed, arm), rows in results.groupby(["seed", "arm"], sort=False):
        folder = tmp_path / f"{arm}-{seed}"
        shutil.copytree(str(rows["run"].iloc[0]), folder)
        runs.append(ArmRun(arm=str(arm), seed=int(str(seed)), run=RunDir(path=folder)))
    return Copied(compose("compare", options), runs)


def cells_of(comparison: ArmComparison, arm: str) -> dict[str, str]:
    """What the tables show of an arm."""
    shown: dict[str, str] = {}
    for table in (
        main_rows(comparison, ["digit", "colour", "average/both"]),
        cost_rows(comparison),
        selection_rows(comparison),
    ):
        row = next(row for row in table if row[0] == arm)
        shown |= dict(zip(table[0], row, strict=True))
    return shown


def test_nothing_is_missing_in_a_whole_comparison(copied: Copied, compared: Compared) -> None:
    comparison = collect(copied.config, copied.runs)
    assert comparison.missing == ()
    assert "-" not in cells_of(comparison, "random").values()
    assert cells_of(comparison, "random")["seeds"] == "2"
    assert format_main_table(comparison) == compared.outcome.table
    assert comparison.results["note"].isna().all()


@pytest.mark.parametrize("failed", [False, True])
def test_a_task_that_one_run_lacks_has_no_mean(copied: Copied, failed: bool) -> None:
    path = copied.drop("clip_score", 1, "digit")
    reason = "not evaluated"
    if failed:
        reason = "failed: 0.tar is <b>damaged</b>."
        append_failure(path, TaskFailure(key="digit", message="0.tar is <b>damaged</b>."))
    comparison = collect(copied.config, copied.runs)
    (missing,) = comparison.missing
    assert (missing.arm, missing.seed, missing.task) == ("clip_score", 1, "digit")
    assert (missing.reason, missing.failed) == (reason, failed)
    cells = cells_of(comparison, "clip_score")
    assert (cells["digit"], cells["both"], cells["seeds"]) == ("-", "-", "2")
    assert "-" not in (cells["colour"], cells["kept"], cells["train s"])
    assert "-" not in cells_of(comparison, "random").values()
    rows = comparison.results
    rows = rows[(rows["arm"] == "clip_score") & (rows["task"] == "digit")]
    (row,) = rows[rows["seed"] == 1].to_dict("records")
    assert np.isnan(row["value"])
    assert row["note"] == reason
    average = comparison.results[comparison.results["task"] == "average/both"]
    assert average["note"].dropna().tolist() == ["without digit"]
    line = f"clip_score, seed 1: no value of digit: {reason}"
    assert line in format_main_table(comparison)
    assert line in markdown(comparison)
    assert escape(line) in html(comparison)


def test_a_seed_that_an_arm_lacks(copied: Copied) -> None:
    comparison = collect(copied.config, copied.without(("oracle", 0)))
    cells = cells_of(comparison, "oracle")
    assert cells.pop("seeds") == "1 of 2"
    assert (cells.pop("arm"), cells.pop("in the loop")) == (
        "oracle",
        "selected before training",
    )
    assert set(cells.values()) == {"-"}  # also its overlap, which is of the first seed
    assert cells_of(comparison, "random")["digit"] != "-"
    assert [one.text() for one in comparison.missing] == ["oracle, seed 0: there is no run"]
    rows = comparison.results
    rows = rows[(rows["arm"] == "oracle") & (rows["seed"] == 0)]
    assert rows["task"].tolist() == ["digit", "colour", "average/both"]
    assert rows["value"].isna().all()
    assert "| 1 of 2 |" in markdown(comparison)
    assert "<td>1 of 2</td>" in html(comparison)
    alone = collect(copied.config, copied.without(("oracle", 0), ("oracle", 1)))
    assert cells_of(alone, "oracle")["seeds"] == "0 of 2"
    assert "oracle, seed 1: there is no run" in markdown(alone)
    assert html(alone)


def test_a_run_that_is_not_finished(copied: Copied) -> None:
    path = copied.results("random", 1).parent
    (path / "summary.json").unlink()
    comparison = collect(copied.config, copied.runs)
    assert cells_of(comparison, "random")["seeds"] == "1 of 2"
    assert cells_of(comparison, "random")["colour"] == "-"
    (missing,) = comparison.missing
    assert missing.failed
    assert missing.text() == "random, seed 1: the run is not finished"
    assert len(comparison.runs) == 5
    for one in copied.runs:
        assert one.run is not None
        (one.run.path / "summary.json").unlink(missing_ok=True)
    with pytest.raises(InputError, match="none of 6 runs is finished"):
        collect(copied.config, copied.runs)


def test_numbers_that_cannot_be_are_not_compared(copied: Copied) -> None:
    path = copied.results("random", 1)
    text = path.read_text()
    first = json.loads(text.splitlines()[0])
    value = first["metrics"]["main_metric"]
    path.write_text(text.replace(f'"main_metric": {value}', '"main_metric": NaN', 1))
    comparison = collect(copied.config, copied.runs)
    (missing,) = comparison.missing
    assert (missing.task, missing.reason) == (first["key"], "the main metric is NaN")
    assert cells_of(comparison, "random")[first["key"]] == "-"
    path.write_text(text.replace(f'"main_metric": {value}', '"main_metric": 7.0', 1))
    with pytest.raises(InputError, match=r"eval_results\.jsonl, line 1, must .* Got 7\.0"):
        collect(copied.config, copied.runs)


def test_a_comparison_with_failures_ends_with_an_error(
    compared: Compared, options: list[str], compose: Compose, demo_data: DemoData, tmp_path: Path
) -> None:
    assert compared.outcome.failed == ()
    compared.outcome.require_complete()
    shutil.copytree(compared.outputs, tmp_path / "outputs")
    shutil.copytree(demo_data.tasks, tmp_path / "tasks")
    tar = tmp_path / "tasks" / "wds_digit" / "test" / "0.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    outcome = run_compare(compose, [*options, f"eval.root={tmp_path / 'tasks'}"])
    assert len(outcome.failed) == 6
    with pytest.raises(InputError, match=r"not complete, 6 runs or tasks failed: random, seed 0"):
        outcome.require_complete()
    results = pd.read_csv(outcome.folder / "results.csv")
    failed = results[results["note"].fillna("").str.startswith("failed")]
    assert set(failed["task"]) == {"digit"}
    assert len(failed) == 6


def test_truth_counts_samples_as_often_as_they_are_trained_on(tmp_path: Path) -> None:
    uids = [f"{number:032x}" for number in range(4)]
    truth = tmp_path / "truth.parquet"
    pd.DataFrame({"uid": uids, "kind": ["clean", "clean", "copy", "wrong"]}).to_parquet(truth)
    selection = make_selection(
        np.array([[0, number] for number in range(4)], dtype=np.uint64),
        np.array([5, 0, 2, 1]),
        {},
    )
    run = RunDir(path=tmp_path / "none")
    runs = [(ArmRun(arm="a", seed=0, run=run), run)]
    shares = _truth(truth, {("a", 0): selection}, runs)
    assert shares.loc["a"].to_dict() == {"clean": 5 / 8, "copy": 2 / 8, "wrong": 1 / 8}


def test_runs_of_an_arm_are_seeds_of_one_method(compared: Compared) -> None:
    runs = [RunDir(path=path) for path in sorted((compared.outputs / "train").iterdir())]
    for run in runs:
        others = other_seeds(run)
        assert len(others) == 1
        assert others[0].path.name.split("-s")[0] == run.path.name.split("-s")[0]


def test_cells() -> None:
    assert percent(0.517, float("nan")) == "51.7"
    assert percent(float("nan"), float("nan")) == "-"
    assert as_markdown([["a|b", "c"], ["d", "e"]]).splitlines()[0] == "| a\\|b | c |"


@pytest.mark.slow
def test_runs_and_report_are_one_group_of_wandb(
    options: list[str], compose: Compose, tmp_path: Path
) -> None:
    more = ["compare.seeds=[0]", "eval.tasks=[digit]", "logger=wandb", "logger.mode=offline"]
    more.append("logger.artifacts=[evaluation,report]")
    options = [word for word in options if "+eval.groups" not in word] + more
    outcome = run_compare(compose, options)
    folders = sorted((tmp_path / "outputs" / "train").iterdir())
    runs = [read_parts(folder)[-1] for folder in folders]
    assert {(part.run.run_group, part.run.display_name) for part in runs} == {
        ("small", f"{arm}-s0") for arm in ("random", "clip_score", "oracle")
    }
    (report,) = read_parts(outcome.folder)
    assert (report.run.run_group, report.run.job_type) == ("small", "report")
    assert len(report.table("report/results")["data"]) == len(outcome.frame)
    assert {artifact.type for artifact in report.artifacts} >= {"evaluation", "report"}
    # other loggers are no other comparison
    again = run_compare(compose, [*options, "logger.group=mine"])
    assert again.folder == outcome.folder
    assert [path.name for path in (tmp_path / "outputs" / "compare").iterdir()] == ["small"]
