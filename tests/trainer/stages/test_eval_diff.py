from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf

from siftclip.errors import InputError
from siftclip.eval.metrics.outcomes import Outcomes
from siftclip.eval.results.files import (
    MAIN_METRIC,
    TaskResult,
    append_failure,
    append_result,
    read_results,
)
from siftclip.eval.tasks.preparation import TaskFailure
from siftclip.files import write_json
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.runtime.seed_runs import other_seeds
from siftclip.trainer.settings.commands import DiffCommand
from siftclip.trainer.settings.evaluation import EvalSettings
from siftclip.trainer.settings.fields.reader import read
from siftclip.trainer.settings.tools import DiffSettings
from siftclip.trainer.stages.eval_diff import RESULTS_NAME, diff_stage


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


def config(
    a: Path,
    b: Path,
    seeds_a: Any = None,
    seeds_b: Any = None,
    output: Path | None = None,
    **eval_options: Any,
) -> DiffCommand:
    settings = {"groups": {}, "tasks": None, "suite": None, **eval_options}
    diff = {"a": str(a), "b": str(b), "resamples": 100, "output": output and str(output)}
    diff |= {"seeds_a": seeds_a, "seeds_b": seeds_b}
    return DiffCommand(
        eval=read(EvalSettings, settings, "eval"), diff=read(DiffSettings, diff, "diff")
    )


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
    groups = {"all": ["x", "y", "z"], "none": ["x"]}
    found = diff_stage(config(*runs, output=tmp_path / "new" / "diff.csv", groups=groups))
    with (tmp_path / "new" / "diff.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["task"] for row in rows] == ["y", "z", "average/all (partial)"]
    assert [float(row["difference"]) for row in rows] == [r["difference"] for r in found.records()]
    assert list(rows[0]) == list(found.records()[0])
    for wrong in (tmp_path / "diff.txt", tmp_path):
        with pytest.raises(InputError, match=r"diff\.output must be a file that ends with \.csv"):
            diff_stage(config(*runs, output=wrong, groups=groups))


def test_tasks_that_failed_are_named(runs: tuple[Path, Path]) -> None:
    append_failure(runs[1] / RESULTS_NAME, TaskFailure(key="x", message="0.tar is damaged."))
    found = diff_stage(config(*runs))
    assert found.failed == {"b: x": "0.tar is damaged."}
    assert "failed in b: x: 0.tar is damaged." in found.table()


METHOD = {"pool": {"root": "p"}, "selector": {"name": "random"}, "optim": {"lr": 0.1}}


def finish(folder: Path, seed: int, **changes: Any) -> Path:
    """Make a folder of results a finished run."""
    settings = {"seed": seed, **METHOD, "output_dir": str(folder), **changes}
    settings["selector"] = {**settings["selector"], "seed": seed}
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(settings)))
    write_json(folder / "summary.json", {"seed": seed, "pool": "abc"})
    return folder


@pytest.fixture
def seeds(tmp_path: Path) -> tuple[list[Path], list[Path]]:
    """Runs of two methods, with 3 seeds each, and others beside them."""
    random = [
        finish(write_run(tmp_path / f"random-s{seed}-{seed:08d}", "xy", seed), seed)
        for seed in range(3)
    ]
    clip_score = {"selector": {"name": "clip_score"}}
    clip = [
        finish(
            write_run(tmp_path / f"clip-s{seed}-{seed:08d}", "xy", 10 + seed), seed, **clip_score
        )
        for seed in range(3)
    ]
    finish(write_run(tmp_path / "random-s5-00000005", "xy", 5), 5, optim={"lr": 0.2})
    finish(write_run(tmp_path / "random-s6-00000006", "xy", 6), 6, pool={"root": "q"})
    (finish(write_run(tmp_path / "random-s7-00000007", "xy", 7), 7) / "summary.json").unlink()
    write_json(
        finish(write_run(tmp_path / "random-s8-00000008", "xy", 8), 8) / "summary.json",
        {"seed": 8, "pool": "another"},
    )
    finish(write_run(tmp_path / "random-s1-99999999", "xy", 9), 1)  # on another machine, say
    return random, clip


@pytest.mark.parametrize("seed", [[], {"a": 1}, "1", None])
def test_a_seed_that_is_none_is_told(seed: Any, tmp_path: Path) -> None:
    run = RunDir(path=finish(write_run(tmp_path / "random-s1-00000001", "xy", 1), 1))
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    (run.path / "config.yaml").write_text(yaml.safe_dump({**config, "seed": seed}))
    with pytest.raises(InputError, match="seed must be a whole number"):
        other_seeds(run)


def test_other_seeds_are_the_runs_beside_it(seeds: tuple[list[Path], list[Path]]) -> None:
    random, clip = seeds
    assert [run.path for run in other_seeds(RunDir(path=random[0]))] == random[1:]
    assert [run.path for run in other_seeds(RunDir(path=clip[2]))] == clip[:2]
    found = diff_stage(config(random[0], clip[0]))
    assert found.seeds is not None
    assert (found.seeds.runs_a, found.seeds.runs_b, found.seeds.same_method) == (3, 3, False)
    means = [np.mean([float(r.main_metric or 0) for r in by_run]) for by_run in zip(
        *(read_results(run / RESULTS_NAME) for run in random), strict=True
    )]  # fmt: skip
    assert [record["mean_a"] for record in found.records()] == pytest.approx(means)
    assert "nothing can be said at 5 %" in " ".join(found.table().split())
    none = diff_stage(config(random[0], clip[0], seeds_a=[], seeds_b=[]))
    assert none.seeds is not None
    assert (none.seeds.runs_a, none.seeds.runs_b) == (1, 1)
    alone = diff_stage(config(random[0] / RESULTS_NAME, clip[0], seeds_b=str(clip[2])))
    assert alone.seeds is not None
    assert (alone.seeds.runs_a, alone.seeds.runs_b) == (3, 2)


def test_two_seeds_of_one_method(seeds: tuple[list[Path], list[Path]]) -> None:
    random, _ = seeds
    found = diff_stage(config(random[1], random[2]))
    assert found.seeds is not None
    assert (found.seeds.runs_a, found.seeds.same_method) == (3, True)
    assert "two seeds of one method" in found.headline()
    assert "To compare methods" not in found.table()
    named = diff_stage(config(random[1], random[2], seeds_a=[], seeds_b=[str(random[0])]))
    assert named.seeds is not None
    assert (named.seeds.runs_a, named.seeds.same_method) == (3, True)


def test_one_model_is_no_seed_of_itself(seeds: tuple[list[Path], list[Path]]) -> None:
    random, clip = seeds
    copy = random[0].with_name("copy")
    shutil.copytree(random[0], copy)
    for other in (random[0], copy):
        itself = diff_stage(config(random[0], other))
        assert itself.seeds is not None
        assert (itself.seeds.runs_a, itself.seeds.same_method) == (1, False)
        assert "Both are results of one model" in itself.headline()
        assert "method" not in " ".join(itself.verdict())
    with pytest.raises(
        InputError, match=r"each model once\. .*copy is there already, or is a copy"
    ):
        diff_stage(config(random[0], clip[0], seeds_a=[str(copy)]))
    with pytest.raises(InputError, match=r"diff\.seeds_b must name other runs .* each model once"):
        diff_stage(config(random[0], clip[0], seeds_a=[str(clip[1])], seeds_b=[str(clip[1])]))


def test_named_seeds_of_another_method_are_told(
    seeds: tuple[list[Path], list[Path]], caplog: pytest.LogCaptureFixture
) -> None:
    random, clip = seeds
    diff_stage(config(random[0], clip[0], seeds_a=[str(random[1])], seeds_b=[str(clip[1])]))
    assert "another method" not in caplog.text
    diff_stage(config(random[0], clip[0], seeds_a=[str(clip[2])]))
    assert f"{clip[2]} differs from that of {random[0]} in more than the seed" in caplog.text


def test_seeds_that_are_named_wrongly(seeds: tuple[list[Path], list[Path]]) -> None:
    random, clip = seeds
    for wrong in ([str(random[0])], [str(clip[0])], [str(random[1])] * 2):
        with pytest.raises(InputError, match=r"diff\.seeds_a must name other runs than diff\.a"):
            diff_stage(config(random[0], clip[0], seeds_a=wrong))
    for wrong in (3, {"x": 1}, [["a"]]):
        with pytest.raises(InputError, match=r"diff\.seeds_a must be a list of run directories"):
            diff_stage(config(random[0], clip[0], seeds_a=wrong))
    with pytest.raises(InputError, match=r"diff\.seeds_b must name a run directory"):
        diff_stage(config(random[0], clip[0], seeds_b=["nowhere"]))


@pytest.mark.parametrize(
    "text",
    ["a: &a [1]\nb: *a\n", "[" * 60_000 + "]" * 60_000, "{", "- 1", "\x00", "x: !!python/x 1"],
)
def test_a_damaged_neighbour_is_left_out(
    seeds: tuple[list[Path], list[Path]], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    random, clip = seeds
    (random[1] / "config.yaml").write_text(text)
    found = diff_stage(config(random[0], clip[0]))
    assert found.seeds is not None
    assert found.seeds.runs_a == 3  # the other run of seed 1
    assert f"{random[1]} is not looked at as another seed" in caplog.text
    with pytest.raises(InputError, match=r"config\.yaml is not the configuration of a run"):
        diff_stage(config(random[1], clip[0]))
