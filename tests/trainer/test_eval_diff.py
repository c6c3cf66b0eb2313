from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from siftclip.eval.outcomes import Outcomes
from siftclip.eval.results import MAIN_METRIC, TaskResult, append_result
from siftclip.selectors.errors import InputError
from siftclip.trainer.eval_diff import RESULTS_NAME, diff_stage


def write_run(folder: Path, keys: str, seed: int) -> Path:
    """A run directory with a result of each task, a letter."""
    rng = np.random.default_rng(seed)
    for key in keys:
        hits = (rng.random(50) < 0.5).astype(np.float32)
        result = TaskResult(
            key=key,
            dataset=key,
            metrics={"acc1": float(hits.mean()), MAIN_METRIC: float(hits.mean())},
            main_metric_name="acc1",
            samples=50,
            interval=None,
            seconds=1.0,
            model=str(seed),
            outcomes=Outcomes(statistic="mean", arrays={"value": hits}),
            units=np.arange(50, dtype=np.uint64),
        )
        append_result(folder / RESULTS_NAME, result)
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    return write_run(tmp_path / "a", "xyz", 0), write_run(tmp_path / "b", "yzw", 1)


def config(a: Path, b: Path, **eval_options: Any) -> Any:
    settings = {"groups": {}, "tasks": None, "suite": None, **eval_options}
    diff = {"a": str(a), "b": str(b), "resamples": 100, "output": None}
    return OmegaConf.create({"diff": diff, "eval": settings})


def test_only_the_tasks_that_are_named(runs: tuple[Path, Path]) -> None:
    found = diff_stage(config(*runs))
    assert [one.key for one in found.tasks] == ["y", "z"]
    assert (found.only_a, found.only_b) == (("x",), ("w",))
    one = diff_stage(config(runs[0] / RESULTS_NAME, runs[1], tasks=["z"]))
    assert [task.key for task in one.tasks] == ["z"]
    assert (one.only_a, one.only_b) == ((), ())
    test = one.tasks[0].test
    assert test is not None
    assert one.tasks[0].p_holm == test.p_value  # corrected for one task
    assert [task.key for task in diff_stage(config(*runs, tasks="z")).tasks] == ["z"]
    in_part = diff_stage(config(*runs, tasks=["z", "zebra"], suite="s"))
    assert [task.key for task in in_part.tasks] == ["z"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tasks": ["z", "zz"]},
            r"eval\.tasks must name .*\['w', 'x', 'y', 'z'\]. Got 'zz'. Did.*'z'",
        ),
        (
            {"tasks": ["zz"], "suite": "s"},
            r"^None of the 1 tasks of eval=s .* of \['w', 'x', 'y', 'z'\]",
        ),
        ({"tasks": []}, r"eval\.tasks must name at least one task, or be null"),
        ({"tasks": 3}, r"eval\.tasks must be a name, or a list of names"),
        ({"tasks": ["x"]}, r"at least one task in common .*a has x; .*b has \."),
        ({"groups": {"g": 3}}, r"eval\.groups\.g must be a name"),
    ],
)
def test_wrong_options(runs: tuple[Path, Path], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        diff_stage(config(*runs, **options))


def test_wrong_results(runs: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = runs
    with pytest.raises(InputError, match=r"^diff\.b must name a run .*nope does not exist"):
        diff_stage(config(a, tmp_path / "nope"))
    with pytest.raises(InputError, match=r"^diff\.a must .* has no eval_results\.jsonl"):
        diff_stage(config(tmp_path, b))
    table = b / "eval_results.csv"
    table.write_text("task\n")
    with pytest.raises(InputError, match=r"its eval_results\.jsonl, which .* Got .*results\.csv"):
        diff_stage(config(a, table))
    (tmp_path / RESULTS_NAME).write_text("")
    with pytest.raises(InputError, match="has no results in"):
        diff_stage(config(tmp_path, b))
    other = write_run(tmp_path / "other", "w", 2)
    with pytest.raises(InputError, match=r"at least one task in common"):
        diff_stage(config(a, other))


def test_the_differences_as_a_file(runs: tuple[Path, Path], tmp_path: Path) -> None:
    settings = config(*runs, groups={"all": ["x", "y", "z"], "none": ["x"]})
    settings.diff.output = str(tmp_path / "new" / "diff.csv")
    found = diff_stage(settings)
    with (tmp_path / "new" / "diff.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["task"] for row in rows] == ["y", "z", "average/all (partial)"]
    assert [float(row["difference"]) for row in rows] == [r["difference"] for r in found.records()]
    assert list(rows[0]) == list(found.records()[0])
    for wrong in (tmp_path / "diff.txt", tmp_path):
        settings.diff.output = str(wrong)
        with pytest.raises(InputError, match=r"diff\.output must be a file that ends with \.csv"):
            diff_stage(settings)
