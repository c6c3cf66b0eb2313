"""A run is repeated from its directory: what differs is said before, what came out afterwards."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from siftclip.datamodules.pool.pool import Pool
from siftclip.datamodules.selection.selection import make_selection
from siftclip.errors import InputError
from siftclip.eval.results.files import TaskResult
from siftclip.trainer.demo.pool import DemoData
from siftclip.trainer.outputs.differences import (
    compare_files,
    compare_losses,
    compare_results,
    compare_selections,
)
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.settings.commands import ReproduceCommand
from siftclip.trainer.stages.reproduce import (
    Reproduced,
    Reproduction,
    Selected,
    begin,
    read_kept,
    select_again,
    train_again,
)
from siftclip.trainer.stages.reproduce_summary import (
    describe_begin,
    describe_reproduced,
    describe_selected,
)
from siftclip.trainer.stages.train import train_stage

Steps = tuple[Reproduction, Selected, Reproduced]
Reproduce = Callable[..., Steps]
# Of this machine, and of no run: typed by whoever repeats one
HERE = ["logger=csv", "progress=false"]


@pytest.fixture(scope="module")
def trained(
    demo_data: DemoData,
    base_of: Callable[[Path], list[str]],
    composing: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run with results of two tasks, which no test may change."""
    folder = tmp_path_factory.mktemp("original")
    words = [*base_of(folder), f"eval.root={demo_data.tasks}", "eval.tasks=[colour,count]"]
    with composing() as compose:
        more = ["selector.fraction=0.5", "eval.resamples=10", "trainer.checkpoint_every_n_steps=3"]
        return Path(train_stage(compose("train", [*words, *more])).path)


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, as from a colleague."""
    return Path(shutil.copytree(trained, tmp_path / "from" / "colleague"))


@pytest.fixture
def settings_of(
    compose: Callable[..., Any], tmp_path: Path, demo_data: DemoData
) -> Callable[..., ReproduceCommand]:
    """`settings_of(run, *typed)`: as the command composes them."""

    def composed(run: Path, *typed: str) -> ReproduceCommand:
        cache = f"pool.cache_dir={demo_data.root / 'cache'}"
        words = [*HERE, cache, f"output_dir={tmp_path / 'out'}", *typed, f"reproduce.run={run}"]
        kept = read_kept(run)[1]
        kept.register()
        settings: ReproduceCommand = compose("reproduce", [*kept.words(words), *words])
        return settings

    return composed


@pytest.fixture
def reproduce(settings_of: Callable[..., ReproduceCommand]) -> Reproduce:
    """`reproduce(run, *typed)`: all steps of it."""

    def run(run: Path, *typed: str) -> Steps:
        reproduction = begin(settings_of(run, *typed))
        selected = select_again(reproduction)
        return reproduction, selected, train_again(reproduction, selected)

    return run


def names(differences: Sequence[Any] | None) -> list[str]:
    return [difference.name for difference in differences or ()]


def test_a_run_from_elsewhere_comes_out_the_same(
    copied: Path, reproduce: Reproduce, tmp_path: Path
) -> None:
    begun, selected, done = reproduce(copied)
    assert (begun.options, begun.missing) == ((), ())
    assert selected.environment == ()
    assert selected.pool is None
    assert selected.identity == ()
    assert selected.selection is not None
    assert selected.selection.is_same
    assert done.run.path.parent == tmp_path / "out" / "train"
    assert done.losses.steps == 6
    assert done.losses.first is None
    assert done.weights is None
    assert [(result.task, result.there == result.here) for result in done.results] == [
        ("colour", True),
        ("count", True),
    ]
    printed = describe_reproduced(done)
    assert "same       losses of 6 logged steps, to the bit" in printed
    assert "same       weights, to the bit" in printed
    assert "same       results of 2 tasks" in printed
    assert "same       code, versions, machine, threads and ranks" in describe_selected(selected)
    assert not done.was_there
    again = reproduce(copied)[2]
    assert again.was_there
    assert "reuse=false trains it again" in describe_reproduced(again)
    assert again.weights is None


def test_ones_own_run_is_repeated_apart(
    trained: Path, settings_of: Callable[..., Any], tmp_path: Path
) -> None:
    """Nothing of it is reused: neither its scores and selection, nor the run itself."""
    outputs = trained.parents[1]
    copy = Path(shutil.copytree(outputs, tmp_path / "outputs"))
    run = copy / "train" / trained.name
    places = []
    for original in (run, copy / "reproduced" / "train" / trained.name):
        if original != run:
            shutil.copytree(run, original)
        settings = begin(settings_of(original, f"output_dir={copy}")).settings
        places.append(settings.common.output_root)
        assert settings.composed.values["output_dir"] == str(places[-1])
    assert places == [copy / "reproduced", copy / "reproduced" / "reproduced"]
    selected = select_again(begin(settings_of(run, f"output_dir={copy}")))
    assert selected.run.path == copy / "reproduced" / "train" / trained.name
    assert selected.selected.folder.parent == copy / "reproduced" / "selections"
    with pytest.raises(InputError, match=r"run_dir=.* is the run that is repeated"):
        begin(settings_of(run, f"run_dir={run}"))


def test_other_options_are_told_and_what_follows_from_them(
    copied: Path, reproduce: Reproduce
) -> None:
    typed = ["seed=1", "selector.fraction=0.4", "trainer.log_every_n_steps=2", "eval.root=null"]
    begun, selected, done = reproduce(copied, *typed)
    assert {
        (each.name, each.there, each.here) for each in begun.options if "eval" not in each.name
    } == {
        ("seed", 0, 1),
        ("selector.fraction", 0.5, 0.4),
        ("trainer.log_every_n_steps", 1, 2),
    }
    assert selected.identity == ("the selection", "the seed")
    assert selected.selection is not None
    assert (selected.selection.samples_there, selected.selection.samples_here) == (120, 96)
    assert (selected.selection.only_there, selected.selection.only_here) == (24, 0)
    assert done.weights is not None
    assert done.weights.there != done.weights.here
    assert (done.losses.steps, done.losses.first, done.losses.unmatched) == (3, 2, 3)
    assert 0 < done.losses.largest < 1
    printed = describe_reproduced(done)
    assert (
        "differs    selection: 120 samples there, 96 here; 24 distinct ones only there" in printed
    )
    assert "differs    losses: from step 2 on, by 0." in printed
    assert "unknown    results: not evaluated here; eval.root=FOLDER evaluates it" in printed


def test_what_is_missing_is_named_with_the_option(
    copied: Path, settings_of: Callable[..., Any], demo_data: DemoData
) -> None:
    config = copied / "config.yaml"
    text = config.read_text().replace(str(demo_data.root), "/mnt/colleague")
    config.write_text(text)
    begun = begin(settings_of(copied))
    assert {each.name: each.there for each in begun.missing} == {
        "pool.root": "/mnt/colleague/pool",
        "features.root": "/mnt/colleague/features",
        "eval.root": "/mnt/colleague/eval",
    }
    assert "missing    pool.root: /mnt/colleague/pool is not there; type pool.root=PATH" in (
        describe_begin(begun)
    )
    with pytest.raises(InputError, match=r"eval\.root must be a folder of tasks"):
        select_again(begun)
    with pytest.raises(InputError, match=r"pool\.root must be an existing folder"):
        select_again(begin(settings_of(copied, "eval.root=null")))
    places = {"pool": demo_data.pool, "features": demo_data.root / "features"}
    words = [f"{name}.root={place}" for name, place in places.items()]
    selected = select_again(begin(settings_of(copied, "eval.root=null", *words)))
    assert selected.identity == ()  # a place is no difference


def test_files_that_have_changed_are_told(
    base: list[str], compose: Callable[..., Any], settings_of: Any, tmp_path: Path
) -> None:
    root = next(word for word in base if word.startswith("pool.root=")).partition("=")[2]
    cache = next(word for word in base if word.startswith("pool.cache_dir=")).partition("=")[2]
    pool = Pool(root, cache_dir=cache, progress=False)
    subset = tmp_path / "subset.npy"
    uids = np.sort(pool.uids.view(np.dtype("u8,u8")).reshape(-1)[:100])
    np.save(subset, uids)
    words = [*base, "selector=external", f"selector.path={subset}", "scale.samples_seen=16"]
    run = Path(train_stage(compose("train", words)).path)
    copied = Path(shutil.copytree(run, tmp_path / "colleague"))
    assert begin(settings_of(copied)).missing == ()
    np.save(subset, uids[:90])
    (changed,) = begin(settings_of(copied)).missing
    assert changed.name == str(subset)
    assert changed.there != changed.here is not None
    selected = select_again(begin(settings_of(copied)))
    assert selected.selection is not None
    assert (selected.selection.only_there, selected.selection.only_here) == (10, 0)
    subset.unlink()
    (missing,) = begin(settings_of(copied)).missing
    assert (missing.name, missing.here) == ("selector.path", None)


def test_code_and_machine_are_compared(copied: Path, settings_of: Callable[..., Any]) -> None:
    path = copied / "versions.json"
    versions = json.loads(path.read_text())
    path.write_text(json.dumps({**versions, "torch": "1.0", "threads": 64, "python": "2.7"}))
    selected = select_again(begin(settings_of(copied)))
    assert {*names(selected.environment)} == {"torch", "threads", "python"}
    printed = describe_selected(selected)
    assert "differs    torch: 1.0 there" in printed
    assert "(other code may give other results)" in printed
    assert (
        "differs    threads: 64 there, 1 here (as another seed after some hundred steps)" in printed
    )
    (copied / "sessions.jsonl").write_text(json.dumps({"step": 3, "environment": versions}) + "\n")
    later = select_again(begin(settings_of(copied)))
    assert (later.sessions, later.environment) == (2, ())
    assert "was continued 1 times on something else" in describe_selected(later)


def test_a_run_of_which_little_is_left_is_repeated(copied: Path, reproduce: Reproduce) -> None:
    config = (copied / "config.yaml").read_text()
    shutil.rmtree(copied)
    copied.mkdir()
    (copied / "config.yaml").write_text(config)
    begun, selected, done = reproduce(copied, "eval.tasks=[colour]")
    assert selected.environment is None
    assert selected.selection is None
    assert not selected.is_known
    text = "\n".join(
        (describe_begin(begun), describe_selected(selected), describe_reproduced(done))
    )
    assert text.count("unknown") == 6
    assert "(no checkpoint)" in text
    assert "losses: no step is in both logs" in text
    assert "open_clip_model.safetensors is not there" in text
    assert done.run.is_finished


def test_another_pool_is_told(
    copied: Path, settings_of: Callable[..., Any], copy_pool: Path, tmp_path: Path
) -> None:
    words = [f"pool.root={copy_pool}", f"pool.cache_dir={tmp_path / 'cache'}"]
    (tar,) = copy_pool.glob("shards/*.tar")
    os.utime(tar, (0, 0))  # a copy has other times
    same = select_again(begin(settings_of(copied, *words)))
    assert same.pool is None
    assert names(same.environment) == ["tars"]
    shutil.copy(tar, tar.with_name("more.tar"))
    other = select_again(begin(settings_of(copied, *words)))
    assert other.pool is not None
    assert "the pool" in other.identity


@pytest.mark.slow
def test_a_measured_budget_is_taken_from_the_run(
    base: list[str], compose: Callable[..., Any], settings_of: Any, tmp_path: Path
) -> None:
    """Measuring here would find another number of steps."""
    words = [*base, "budget.seconds=2", "optim.warmup_steps=1"]
    run = train_stage(compose("train", words))
    copied = Path(shutil.copytree(run.path, tmp_path / "colleague"))
    (copied / "budget.json").write_text('{"samples_seen": 64, "global_batch_size": 16}')
    begun = begin(settings_of(copied))
    selected = select_again(begun)
    assert selected.steps == 4
    assert "budget     4 steps, as the run's budget lasted there" in describe_selected(selected)
    done = train_again(begun, selected)
    assert done.run.summary is not None
    assert done.run.summary["steps"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("online", ["every_step", "every_n_steps"])
def test_selections_in_the_loop_are_repeated(
    online: str, base: list[str], compose: Callable[..., Any], reproduce: Any, tmp_path: Path
) -> None:
    """What their record calls the pool's features are the learner's."""
    more = {
        "every_step": ["selector@online.selector=jest", "online.selector.fraction=0.5"],
        "every_n_steps": ["online.every_n_steps=2"],
    }
    words = [*base, f"online={online}", *more[online], "selector=random", "selector.fraction=1"]
    run = train_stage(compose("train", words))
    copied = Path(shutil.copytree(run.path, tmp_path / "colleague"))
    _, selected, done = reproduce(copied)
    assert selected.identity == ()
    assert done.weights is None
    assert done.losses.first is None


# ---- comparisons --------------------------------------------------------------------------------
def log_of(*losses: float | None) -> list[dict[str, Any]]:
    return [{"step": step, "train/loss": loss} for step, loss in enumerate(losses, start=1)]


def test_losses() -> None:
    assert compare_losses(log_of(1, 2, 3), log_of(1, 2, 3)).first is None
    different = compare_losses(log_of(4, 2.0, 3.0, 8), log_of(4, 2.2, 3.0, 9, 1))
    assert (different.steps, different.first, different.at_step) == (4, 2, 4)
    assert different.largest == pytest.approx(1 / 9)
    assert different.unmatched == 1
    assert compare_losses(log_of(None, 1), log_of(None, 1)).first is None
    assert math.isinf(compare_losses(log_of(None), log_of(1)).largest)
    assert compare_losses(log_of(0), log_of(0)).largest == 0
    assert compare_losses([], log_of(1)).steps == 0
    repeated = [*log_of(5, 6), {"step": 2, "train/loss": 7}, {"step": 2, "eval/a": 1}]
    assert compare_losses(repeated, log_of(5, 7)).first is None  # the last record of a step


def test_selections() -> None:
    uids = np.array([[0, 1], [0, 2], [0, 3]], dtype=np.uint64)

    def selection(*counts: int, weights: Any = None) -> Any:
        return make_selection(uids, np.array(counts), {}, weights=weights)

    assert compare_selections(selection(1, 2, 0), selection(1, 2, 0)).is_same
    other = compare_selections(selection(1, 2, 0), selection(0, 2, 3))
    assert (other.samples_there, other.samples_here, other.only_there, other.only_here) == (
        3,
        5,
        1,
        1,
    )
    repeats = compare_selections(selection(1, 2, 0), selection(2, 1, 0))
    assert (repeats.is_same, repeats.only_there, repeats.only_here) == (False, 0, 0)
    weighed = selection(1, 2, 0, weights=np.array([1, 2, 3], dtype=np.float32))
    assert not compare_selections(selection(1, 2, 0), weighed).is_same


def test_files_and_results(tmp_path: Path) -> None:
    for name, text in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).write_text(text)
    assert compare_files(tmp_path / "a", tmp_path / "b") is None
    changed = compare_files(tmp_path / "a", tmp_path / "c")
    assert changed is not None
    assert changed.there != changed.here
    for pair in (("a", "no"), ("no", "a"), ("no", "no")):
        missing = compare_files(*(tmp_path / name for name in pair))
        assert missing is not None
        assert None in (missing.there, missing.here)

    def result(key: str, value: float | None) -> TaskResult:
        return TaskResult(
            key=key,
            dataset=key,
            metrics={"main_metric": value},
            main_metric_name="acc1",
            samples=1,
            interval=None,
            seconds=0,
            model=None,
        )

    there, here = [result("a", 0.5), result("b", None)], [result("a", 0.6), result("c", 0.1)]
    assert [(r.task, r.there, r.here) for r in compare_results(there, here)] == [
        ("a", 0.5, 0.6),
        ("b", None, None),
        ("c", None, 0.1),
    ]
    assert RunDir(path=tmp_path).records() == []
