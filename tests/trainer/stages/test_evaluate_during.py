"""Evaluation in the middle of training: it tells what the model can, and changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from siftclip.datamodules.models.load import load_clip_model
from siftclip.errors import InputError
from siftclip.eval.results.files import read_results
from siftclip.files import read_jsonl
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.loop.meter import WindowMeter
from siftclip.trainer.loop.progress import numbers_of
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.stages.train import train_stage

Compose = Callable[..., DictConfig]


def during(run: RunDir) -> dict[int, dict[str, float]]:
    """What was found at each step, without the seconds."""
    found: dict[int, dict[str, float]] = {}
    for record in read_jsonl(run.path / "metrics.jsonl"):
        values = {
            name.removeprefix("eval_during/"): value
            for name, value in record.items()
            if name.startswith("eval_during/") and name != "eval_during/seconds"
        }
        if values:
            found[record["step"]] = values
    return found


@pytest.fixture
def options(base: list[str], demo_data: DemoData) -> list[str]:
    return [
        *base,
        f"eval.root={demo_data.tasks}",
        "+eval.groups.both=[digit,colour]",
        "+eval.groups.none=[digit,colour,count]",
        "eval.resamples=20",
        "eval.during.tasks=[digit,colour,retrieval]",
    ]


@pytest.mark.parametrize("average", [False, True])
def test_training_is_the_same_with_it(
    average: bool, options: list[str], compose: Compose, tmp_path: Path
) -> None:
    options = [*options, *(["optim.ema_decay=0.5"] if average else [])]
    plain = train_stage(compose("train", [*options, f"run_dir={tmp_path / 'plain'}"]))
    run = train_stage(
        compose("train", [*options, f"run_dir={tmp_path / 'with'}", "eval.during.every_n_steps=2"])
    )
    assert during(plain) == {}
    found = during(run)
    assert sorted(found) == [2, 4, 6]
    assert set(found[2]) == {"digit", "colour", "retrieval", "average/both"}
    final = {result.key: result.main_metric for result in read_results(run.results)}
    assert {name: found[6][name] for name in ("digit", "colour", "retrieval")} == {
        name: final[name] for name in ("digit", "colour", "retrieval")
    }
    assert found[6]["average/both"] == pytest.approx((found[6]["digit"] + found[6]["colour"]) / 2)
    losses = [
        [r["train/loss"] for r in read_jsonl(one.path / "metrics.jsonl") if "train/loss" in r]
        for one in (plain, run)
    ]
    assert losses[0] == losses[1]
    states = [load_clip_model(str(one.path)).model.state_dict() for one in (plain, run)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_part_of_the_samples(options: list[str], compose: Compose) -> None:
    few = [*options, "eval.during.every_n_steps=6", "eval.during.max_samples=10"]
    (found,) = during(train_stage(compose("train", few))).values()
    assert found["digit"] * 10 == pytest.approx(round(found["digit"] * 10))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_all_ranks_take_part(
    ranks: int,
    options: list[str],
    compose: Compose,
    compose_tree: Compose,
    train_on_ranks: Callable[[list[Any], int], None],
    tmp_path: Path,
) -> None:
    """Two also with sharded weights and their average; the evaluation after training, too."""
    shared = [*options, "optim.eps=1e-3", "eval.during.every_n_steps=3"]
    ways: dict[str, list[str]] = {"ddp": []}
    if ranks == 2:
        ways["fsdp"] = ["trainer.strategy=fsdp", "optim.ema_decay=0.5"]
    configs = []
    for name, own in ways.items():
        config = compose_tree("train", [*shared, *own, f"run_dir={tmp_path / name}"])
        configs.append(OmegaConf.to_container(config))
    train_on_ranks(configs, ranks)
    for name, own in ways.items():
        alone = [option for option in own if "strategy" not in option]
        config = compose("train", [*shared, *alone, f"run_dir={tmp_path / name} alone"])
        expected, run = train_stage(config), RunDir(path=tmp_path / name)
        assert sorted(during(run)) == [3, 6]
        for step, values in during(expected).items():
            # weights differ by rounding, so one sample of the 20 to 30 of a task may differ
            assert during(run)[step] == pytest.approx(values, abs=1 / 20 + 1e-9)
        assert [r.key for r in read_results(run.results)] == [
            r.key for r in read_results(expected.results)
        ]
        assert all(r.interval is not None for r in read_results(run.results))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("eval.during.every_n_steps=0", r"eval.during.every_n_steps must be .* at least 1"),
        ("eval.during.max_samples=0", r"eval.during.max_samples must be .* at least 1"),
        ("eval.during.tasks=[nope]", r"eval.during.tasks must name tasks .*'nope'"),
        ("eval.root=null", r"eval.root must name a folder"),
    ],
)
def test_faults_are_found_before_training(
    wrong: str, message: str, options: list[str], compose: Compose, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        train_stage(compose("train", [*options, "eval.during.every_n_steps=2", wrong]))
    assert not list(tmp_path.glob("outputs/train/*/checkpoints/*"))


def test_its_seconds_are_no_part_of_training() -> None:
    meter = WindowMeter(torch.device("cpu"))
    start = time.perf_counter()
    one = torch.ones(())
    meter.add({"loss": one}, one, torch.ones((), dtype=torch.bool))
    time.sleep(0.3)
    meter.pause(time.perf_counter() - start)
    meter.stepped()
    meter.waited()
    found: dict[str, Any] = meter.close(lambda sums: sums)
    assert found["batch_time"] < 0.1
    assert found["data_time"] < 0.1


def test_what_the_bar_shows() -> None:
    def shown(evaluated: dict[str, float]) -> list[str]:
        return numbers_of(SimpleNamespace(latest={}, evaluated=evaluated))

    assert shown({}) == []
    assert shown({"eval_during/cifar10": 0.5, "eval_during/average/fast": 0.25}) == ["fast 0.250"]
    assert shown({"eval_during/cifar10": 0.5}) == ["cifar10 0.500"]
