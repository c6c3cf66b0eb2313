"""The plan of a comparison: what is there, what the rest costs, and the question before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compared import planned, run_compare

from siftclip.errors import InputError
from siftclip.trainer.compare import forecast as forecasts
from siftclip.trainer.compare.forecast import forecast_arms, step_digest
from siftclip.trainer.compare.run_notes import RunNotes
from siftclip.trainer.demo.pool import DemoData

Compose = Callable[..., Any]
SLOWER = '+compare.arms.slower=["loss=siglip"]'


@pytest.fixture
def options(base: list[str], demo_data: DemoData) -> list[str]:
    """A comparison of two arms whose steps are the same, with two seeds."""
    tasks = [f"eval.root={demo_data.tasks}", "eval.tasks=[digit,colour]"]
    return [*base, *tasks, "compare.name=small", "compare.seeds=[0,1]"]


def test_a_plan_says_what_is_there_and_what_is_left(
    compose: Compose, options: list[str], tmp_path: Path
) -> None:
    more = [*options, SLOWER]
    run_compare(compose, [*more, "compare.only=[clip_score]"])
    outcome = run_compare(compose, [*more, "plan=true", "compare.seeds=[0,1,2]"])
    assert outcome.comparison is None
    rows = [" ".join(line.split()) for line in outcome.table.splitlines()]
    of_arm = {row.split()[0]: row for row in rows if " of 3 " in row}
    assert of_arm["clip_score"].startswith("clip_score 2 of 3 1 0:00:0")
    assert of_arm["clip_score"].endswith("its finished runs")
    assert of_arm["random"].startswith("random 0 of 3 3 0:00:0")
    assert of_arm["random"].endswith("runs of clip_score")
    assert of_arm["slower"].endswith("measured steps")
    assert "7 runs are left to train" in outcome.table
    assert outcome.seconds_left > 0
    assert len(list((tmp_path / "outputs" / "train").iterdir())) == 2


def test_arms_with_the_same_steps_are_measured_once(
    compose: Compose, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    plan_stage = forecasts.plan_stage

    def counted(settings: Any) -> Any:
        measured.append(settings.selector.name)
        return plan_stage(settings)

    monkeypatch.setattr(forecasts, "plan_stage", counted)
    arms = ['+compare.arms.half=["selector=clip_score","selector.fraction=0.5"]', SLOWER]
    plan = planned(compose, ["~compare.arms.random", *options, *arms])
    assert plan.arms[0] == "clip_score"
    notes = RunNotes(folder=tmp_path / "none")
    found = forecast_arms(plan, notes, progress=False)
    assert [each.arm for each in found] == list(plan.arms)
    assert [each.source for each in found] == [
        *("measured steps", "steps of clip_score", "measured steps"),
    ]
    assert len(measured) == 2
    measured.clear()
    # the one that needs no features is measured first: nothing is embedded for the question
    found = forecast_arms(planned(compose, [*options, arms[0]]), notes, progress=False)
    assert {each.arm: each.source for each in found} == {
        "random": "measured steps",
        "clip_score": "steps of random",
        "half": "steps of random",
    }
    assert len({(each.seconds, each.flops, each.disk_bytes) for each in found}) == 1
    assert measured == ["random"]


@pytest.mark.parametrize(
    ("word", "is_alike"),
    [
        ("seed=7", True),
        ("selector=random", True),
        ("output_dir=elsewhere", True),
        ("compare.name=other", True),
        ("loss=siglip", False),
        ("scale.global_batch_size=32", False),
        ("scale.samples_seen=960", False),
        ("online=every_step", False),
        ("data.num_workers=3", False),
    ],
)
def test_what_moves_the_cost_of_a_step(
    word: str, is_alike: bool, compose: Compose, base: list[str]
) -> None:
    own, other = compose("train", base), compose("train", [*base, word])
    assert (step_digest(own) == step_digest(other)) is is_alike


def test_selectors_move_the_steps_of_runs_that_select_in_the_loop(
    compose: Compose, base: list[str]
) -> None:
    words = [[*base, "online=every_step", f"selector={name}"] for name in ("random", "clip_score")]
    assert len({step_digest(compose("train", own)) for own in words}) == 2


def test_the_disk_that_a_run_takes_is_known_before(
    compose: Compose, options: list[str], tmp_path: Path
) -> None:
    plan = planned(compose, [*options, "compare.seeds=[0]", "~compare.arms.clip_score"])
    notes = RunNotes(folder=tmp_path / "outputs" / "compare" / "small")
    (before,) = forecast_arms(plan, notes, progress=False)
    run_compare(compose, [*options, "compare.seeds=[0]", "~compare.arms.clip_score"])
    (after,) = forecast_arms(plan, notes, progress=False)
    assert (before.finished, after.finished) == (0, 1)
    assert before.disk_bytes == pytest.approx(after.disk_bytes, rel=0.1)
    assert before.flops == pytest.approx(after.flops)


def test_an_arm_that_cannot_be_planned_is_named(compose: Compose, options: list[str]) -> None:
    broken = '+compare.arms.broken=["selector=external","selector.path=/no/such/file.npy"]'
    with pytest.raises(InputError, match=r"^compare\.arms\.broken: .*/no/such/file"):
        run_compare(compose, [*options, broken, SLOWER.replace("slower", "z"), "plan=true",
                              "~compare.arms.random", "~compare.arms.clip_score"])  # fmt: skip


@pytest.mark.slow
def test_long_comparisons_are_asked_for_at_a_terminal(
    options: list[str], at_terminal: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    words = ["compare", *options, "compare.seeds=[0]"]
    long = [*words, "compare.ask_above_hours=1e-9"]
    status, text = at_terminal(*long, answer="n")
    assert status == 0, text
    assert "2 runs are left to train" in text
    assert "Nothing was trained." in text
    assert not list((tmp_path / "outputs").glob("train/*"))
    status, text = at_terminal(*long, answer="y")
    assert status == 0, text
    assert "report.html" in text
    status, text = at_terminal(*words, "compare.ask_above_hours=1")
    assert status == 0, text  # the plan is printed, and nothing is asked
    assert "0 runs are left to train" in text
    assert "[y/N]" not in text


def test_without_a_terminal_nothing_is_asked(
    cli: Callable[..., Any], options: list[str], tmp_path: Path
) -> None:
    words = [*options, "compare.seeds=[0]", "compare.ask_above_hours=1e-9", "--part", "1/2"]
    result = cli("compare", *words)
    assert result.returncode == 0, result.stderr
    assert "1 of 2 runs of the comparison are done." in result.stdout
    assert len(list((tmp_path / "outputs" / "train").iterdir())) == 1
