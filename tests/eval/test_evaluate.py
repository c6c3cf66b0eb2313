from __future__ import annotations

import copy
import logging
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from siftclip.datamodules.models.load import ClipModel
from siftclip.errors import InputError
from siftclip.eval.evaluate import EvalOptions, Evaluation, ScoredTask, evaluate_tasks
from siftclip.eval.evaluation_mode import evaluation_mode
from siftclip.eval.identities import fingerprint, model_identity
from siftclip.eval.probes.probe_scores import IN_TRAIN
from siftclip.eval.reports.report import summarise
from siftclip.eval.results.files import TaskResult, read_kept, read_results
from siftclip.eval.significance.resampling import point_value
from siftclip.eval.tasks.kinds.values import Task
from siftclip.eval.tasks.preparation import TaskFailure, prepare_tasks
from siftclip.eval.tasks.task import find_tasks
from siftclip.ranks import Ranks

MakeImage = Callable[..., bytes]
MakeTask = Callable[..., Path]
ChangedWeights = Callable[[], AbstractContextManager[None]]
RunOnRanks = Callable[[int, Callable[[Ranks], Any]], list[Any]]
OPTIONS = EvalOptions(progress=False, resamples=0)


def evaluate(
    clip: ClipModel,
    tasks: Sequence[Task],
    *,
    ranks: Ranks | None = None,
    results_path: Path | None = None,
    again: Sequence[str] = (),
    failed: Sequence[TaskFailure] = (),
    on_scored: Callable[[ScoredTask], None] | None = None,
    **options: Any,
) -> Evaluation:
    return evaluate_tasks(
        clip,
        tasks,
        options=replace(OPTIONS, **options),
        ranks=ranks,
        results_path=results_path,
        again=again,
        failed=failed,
        on_scored=on_scored,
    )


def run(clip: ClipModel, tasks: Sequence[Task], **options: Any) -> list[TaskResult]:
    evaluation = evaluate(clip, tasks, **options)
    assert evaluation.failures == ()
    return [*evaluation.results]


def metrics_of(results: Sequence[TaskResult]) -> dict[str, dict[str, float | None]]:
    return {result.key: result.metrics for result in results}


@contextmanager
def counted(clip: ClipModel) -> Iterator[dict[str, int]]:
    """How many images and texts go through the towers."""
    counts = {"images": 0, "texts": 0}

    def count(name: str) -> Callable[..., None]:
        def add(module: Any, given: Any, out: Any) -> None:
            counts[name] += len(given[0])

        return add

    model: Any = clip.model
    hooks = [
        model.visual.register_forward_hook(count("images")),
        model.ln_final.register_forward_hook(count("texts")),
    ]
    yield counts
    for hook in hooks:
        hook.remove()


def test_outcomes_make_the_main_metric(tasks: list[Task], clip: ClipModel) -> None:
    results = run(clip, tasks, resamples=200)
    assert len(results) == 6
    for result in results:
        assert result.outcomes is not None
        assert result.units is not None
        assert result.samples == result.outcomes.units == len(result.units)
        assert point_value(result.outcomes) == pytest.approx(result.main_metric, abs=1e-6)
        assert result.interval is not None
        low, high = result.interval
        assert 0 <= low <= result.main_metric + 1e-6  # outcomes are kept in float32
        assert result.main_metric - 1e-6 <= high <= 1
    assert all(result.interval is None for result in run(clip, tasks))


def test_units_are_images_or_instances(tasks: list[Task], clip: ClipModel) -> None:
    units = {result.key: result.units for result in run(clip, tasks)}
    things, few = units["things"], units["few"]
    assert few.tolist() == things[:7].tolist()  # type: ignore[index] # the same images
    for name in ("pairs", "cues"):  # each instance has other texts
        assert len(np.unique(units[name])) == len(units[name])  # type: ignore[arg-type]
    assert all(array is not None and array.dtype == np.uint64 for array in units.values())


def test_another_main_metric_and_title(task_root: Path, clip: ClipModel) -> None:
    (things,) = find_tasks(task_root, ["things"]).complete()
    other = replace(things, main_metric="mean_per_class_recall", title="The Things")
    (result,) = run(clip, [other])
    assert result.metrics["main_metric"] == result.metrics["mean_per_class_recall"]
    assert result.dataset == "The Things"
    assert result.outcomes is not None
    assert result.outcomes.statistic == "class_mean"
    (result,) = run(clip, [replace(things, main_metric=None)])
    assert (result.main_metric, result.outcomes, result.interval) == (None, None, None)
    scored: list[Any] = []
    found = evaluate(clip, [replace(things, main_metric="f1")], on_scored=scored.append)
    (failure,) = found.failures
    assert scored == []
    assert "main metric of things must be one of ['acc1', " in failure.message


def test_a_training_run_is_not_disturbed(tasks: list[Task], clip: ClipModel) -> None:
    """Modes of all modules, gradients, weights, statistics, precision and global random states."""
    model: Any = clip.model
    model.visual.eval()  # a frozen tower
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random_states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    torch.set_float32_matmul_precision("medium")
    inside: set[str] = set()
    hook = model.visual.register_forward_hook(
        lambda *_: inside.add(torch.get_float32_matmul_precision())
    )
    try:
        run(clip, tasks, num_workers=1)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        hook.remove()
        torch.set_float32_matmul_precision("highest")
    assert inside == {"highest"}
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert (random.getstate(), str(np.random.get_state())) == random_states[1:]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_the_mode_is_restored_after_an_error(tasks: list[Task], clip: ClipModel) -> None:
    model: Any = clip.model

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.visual.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        run(clip, tasks)
    hook.remove()
    assert model.training
    assert torch.is_grad_enabled()


def test_fp32_whatever_is_around(tasks: list[Task], clip: ClipModel) -> None:
    """Number 4 of clip_benchmark's faults: bf16 made results move with the batch size."""
    model: Any = clip.model
    seen: set[tuple[torch.dtype, bool]] = set()
    hooks = [
        module.register_forward_hook(lambda m, _, out: seen.add((out.dtype, m.training)))
        for module in (model.visual, model.ln_final)
    ]
    expected = run(clip, tasks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(clip, tasks)
    for hook in hooks:
        hook.remove()
    assert seen == {(torch.float32, False)}
    assert metrics_of(inside) == metrics_of(expected)


def test_there_is_no_autocast_inside(clip: ClipModel) -> None:
    """Also for what is done there without an `Encoder`."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with evaluation_mode(clip, torch.device("cpu")) as ready:
            assert not torch.is_autocast_enabled("cpu")
            assert not torch.is_grad_enabled()
            assert not ready.model.training
        assert torch.is_autocast_enabled("cpu")
    assert clip.model.training


def test_a_model_in_bf16_is_copied_to_fp32(task_root: Path, clip: ClipModel) -> None:
    things = find_tasks(task_root, ["things"]).complete()
    low = replace(clip, model=copy.deepcopy(clip.model).bfloat16())
    (result,) = run(low, things)
    (expected,) = run(replace(clip, model=copy.deepcopy(low.model).float()), things)
    assert result.metrics == expected.metrics
    assert {parameter.dtype for parameter in low.model.parameters()} == {torch.bfloat16}


def test_precision_is_part_of_the_identity(
    task_root: Path, clip: ClipModel, tmp_path: Path
) -> None:
    path = tmp_path / "r.jsonl"
    things = find_tasks(task_root, ["things"]).complete()
    (full,) = run(clip, things, results_path=path)
    (low,) = run(clip, things, results_path=path, precision="bf16")
    assert full.model == fingerprint(clip) == model_identity(clip, "fp32")
    assert low.model == model_identity(clip, "bf16") != full.model
    assert [result.model for result in read_results(path)] == [low.model]


def test_workers_and_batches_change_nothing(tasks: list[Task], clip: ClipModel) -> None:
    alone = metrics_of(run(clip, tasks))
    assert metrics_of(run(clip, tasks, num_workers=2)) == alone
    for key, metrics in metrics_of(run(clip, tasks, batch_size=3)).items():
        assert metrics == pytest.approx(alone[key], abs=1e-6)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_change_nothing(
    tasks: list[Task], clip: ClipModel, tmp_path: Path, run_on_ranks: RunOnRanks, size: int
) -> None:
    options: dict[str, Any] = {"batch_size": 4, "resamples": 20}
    alone = run(clip, tasks, **options)
    path = tmp_path / "r.jsonl"

    def on_rank(ranks: Ranks) -> list[TaskResult]:
        own = replace(clip, model=copy.deepcopy(clip.model))
        return run(own, tasks, ranks=ranks, results_path=path, **options)

    first, *others = run_on_ranks(size, on_rank)
    assert [replace(one, seconds=0) for one in first] == [replace(one, seconds=0) for one in alone]
    for other in others:
        assert metrics_of(other) == metrics_of(alone)
    assert [result.key for result in read_results(path)] == [task.name for task in tasks]
    assert metrics_of(run_on_ranks(size, on_rank)[1]) == metrics_of(alone)  # all are there


def test_the_first_ranks_statistics_are_evaluated(
    task_root: Path, clip: ClipModel, run_on_ranks: RunOnRanks
) -> None:
    """In a training on several ranks each has its own running means, and the first's are saved."""
    things = find_tasks(task_root, ["things"]).complete()
    (alone,) = run(clip, things, batch_size=4)

    def on_rank(ranks: Ranks) -> tuple[TaskResult, bool]:
        model: Any = copy.deepcopy(clip.model)
        model.visual.bn1.running_mean += ranks.rank
        mean = model.visual.bn1.running_mean.clone()
        (result,) = run(replace(clip, model=model), things, ranks=ranks, batch_size=4)
        return result, torch.equal(model.visual.bn1.running_mean, mean)

    for result, restored in run_on_ranks(2, on_rank):
        assert (result.metrics, result.model) == (alone.metrics, alone.model)
        assert restored


def test_ranks_that_differ_do_not_wait_for_each_other(
    tasks: list[Task], clip: ClipModel, tmp_path: Path, run_on_ranks: RunOnRanks
) -> None:
    def message(ranks: Ranks, chosen: list[Task], weight: float) -> str:
        own = replace(clip, model=copy.deepcopy(clip.model))
        with torch.no_grad():
            next(own.model.parameters()).add_(weight)
        with pytest.raises(InputError) as caught:
            evaluate(own, chosen, ranks=ranks)
        return str(caught.value)

    of_tasks = run_on_ranks(3, lambda ranks: message(ranks, tasks[ranks.rank == 2 :], 0))
    of_weights = run_on_ranks(2, lambda ranks: message(ranks, tasks, ranks.rank))
    assert all("The ranks [2] differ from the first" in text for text in of_tasks)
    assert all("The ranks [1] differ from the first" in text for text in of_weights)


def test_shared_images_and_texts_are_encoded_once(tasks: list[Task], clip: ClipModel) -> None:
    prepared = prepare_tasks(tasks)
    assert prepared.table is not None
    with counted(clip) as counts:
        evaluate_tasks(clip, prepared, options=OPTIONS)
    assert counts["images"] == len(prepared.table) < sum(len(one.images) for one in prepared.data)
    classes = {"few": 3, "many_labels": 6, "things": 6}
    with counted(clip) as counts:
        run(clip, [task for task in tasks if task.name in classes])
    assert counts["texts"] == 2 * 3 + 2 * 6  # many_labels and things have the same prompts


def test_a_cache_of_features(
    tasks: list[Task],
    clip: ClipModel,
    changed_weights: ChangedWeights,
    tmp_path: Path,
    run_on_ranks: RunOnRanks,
) -> None:
    cache = tmp_path / "cache"
    plain = metrics_of(run(clip, tasks))
    with counted(clip) as counts:
        assert metrics_of(run(clip, tasks[:2], cache=cache)).items() <= plain.items()
    some = counts["images"]
    with counted(clip) as counts:
        assert metrics_of(run(clip, tasks, cache=cache)) == plain
    table = prepare_tasks(tasks).table
    assert table is not None
    assert 0 < some < len(table)
    assert counts["images"] == len(table) - some
    with counted(clip) as counts:
        assert metrics_of(run(clip, tasks, cache=cache)) == plain
    assert counts["images"] == 0
    with counted(clip) as others:
        run(clip, [task for task in tasks if not task.has_classes])
    assert counts["texts"] == others["texts"]  # classes are kept, captions are not

    def on_rank(ranks: Ranks) -> tuple[dict[str, Any], int]:
        own = replace(clip, model=copy.deepcopy(clip.model))
        with counted(own) as counts:
            return metrics_of(run(own, tasks, cache=cache, ranks=ranks)), counts["images"]

    assert run_on_ranks(2, on_rank) == [(plain, 0)] * 2
    with changed_weights(), counted(clip) as counts:
        run(clip, tasks[:2], cache=cache)
    assert counts["images"] == some


def test_a_cache_on_ranks_that_knows_a_part(
    tasks: list[Task], clip: ClipModel, tmp_path: Path, run_on_ranks: RunOnRanks
) -> None:
    plain = metrics_of(run(clip, tasks, batch_size=4))
    run(clip, tasks[:2], batch_size=4, cache=tmp_path)

    def on_rank(ranks: Ranks) -> dict[str, Any]:
        own = replace(clip, model=copy.deepcopy(clip.model))
        return metrics_of(run(own, tasks, batch_size=4, cache=tmp_path, ranks=ranks))

    for found in run_on_ranks(3, on_rank):
        for key, metrics in found.items():
            assert metrics == pytest.approx(plain[key], abs=1e-6)


@pytest.fixture
def bad_tasks(tmp_path: Path, make_task: MakeTask, make_image: Any) -> list[Task]:
    """One of each kind whose last image is no image, and one whose tar cannot be indexed."""
    root = tmp_path / "bad"
    labels: dict[str, list[tuple[str, bytes]]] = {
        "classification": [("cls", b"0")],
        "retrieval": [("txt", b"a picture")],
        "image_caption_selection": [("txt", b"a\nb")],
        "association": [("json", b'{"cue": "a", "associations": [0]}')],
    }
    for kind, label in labels.items():
        suffix = "0.png" if kind == "association" else "png"
        good = [[(suffix, make_image(i)), *label] for i in range(3)]
        members = [*good, [(suffix, f"no picture for {kind}".encode()), *label]]
        make_task(root / kind, kind, members=members, shards=1)
    make_task(root / "label", members=[[("png", make_image(0)), ("cls", b"77")]], shards=1)
    return find_tasks(root).complete()


def test_one_bad_task_of_each_kind_leaves_the_others_alone(
    tasks: list[Task],
    bad_tasks: list[Task],
    clip: ClipModel,
    changed_weights: ChangedWeights,
    tmp_path: Path,
    run_on_ranks: RunOnRanks,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The images of the bad tasks before the last are also in the good ones."""
    good = run(clip, tasks, batch_size=4)
    path = tmp_path / "r.jsonl"
    mixed = [*bad_tasks[:3], *tasks, *bad_tasks[3:]]
    with caplog.at_level(logging.WARNING):
        found = evaluate(clip, mixed, batch_size=4, results_path=path)
    assert sorted(failure.key for failure in found.failures) == [task.name for task in bad_tasks]
    for failure in found.failures:
        assert str(tmp_path / "bad" / failure.key) in failure.message
        assert failure.key in caplog.text
        wanted = "the label must be" if failure.key == "label" else "s0003: a sample whose image"
        assert wanted in failure.message
    for key, metrics in metrics_of(found.results).items():
        assert metrics == pytest.approx(metrics_of(good)[key], abs=1e-6)
    assert len(found.results) == len(good)
    assert sorted(r.key for r in read_results(path)) == sorted(r.key for r in good)
    kept = read_kept(path).failures
    assert [(one.key, one.message) for one in kept] == [
        (one.key, one.message) for one in found.failures
    ]
    mended = [task for task in bad_tasks if task.name != "label"]
    evaluate(clip, mended, results_path=path, failed=[TaskFailure(key="label", message="gone")])
    kept = read_kept(path).failures  # those of tasks that are tried again stand there once
    assert sorted(one.key for one in kept) == [task.name for task in bad_tasks]
    assert [one.message for one in kept if one.key == "label"] == ["gone"]
    with changed_weights():
        evaluate(clip, mended[:1], results_path=path)
    assert [one.key for one in read_kept(path).failures] == [mended[0].name]  # of this model

    def on_rank(ranks: Ranks) -> Evaluation:
        own = replace(clip, model=copy.deepcopy(clip.model))
        return evaluate(own, mixed, batch_size=4, ranks=ranks)

    for other in run_on_ranks(2, on_rank):
        assert other.failures == found.failures
        assert metrics_of(other.results) == metrics_of(found.results)


def test_a_fault_is_not_kept_in_the_cache(
    bad_tasks: list[Task], clip: ClipModel, tmp_path: Path
) -> None:
    first = evaluate(clip, bad_tasks, cache=tmp_path / "cache")
    with counted(clip) as counts:
        second = evaluate(clip, bad_tasks, cache=tmp_path / "cache")
    assert second.failures == first.failures
    assert len(second.failures) == len(bad_tasks)
    assert counts["images"] == 4  # the four that are no images


def test_a_model_that_gives_no_numbers_fails_all(tasks: list[Task], clip: ClipModel) -> None:
    own = replace(clip, model=copy.deepcopy(clip.model))
    with torch.no_grad():
        next(own.model.visual.parameters()).fill_(math.nan)  # type: ignore[operator, union-attr]
    found = evaluate(own, tasks)
    assert found.results == ()
    assert len(found.failures) == len(tasks)
    assert all("NaN or infinite" in failure.message for failure in found.failures)


def test_fingerprint(clip: ClipModel, changed_weights: ChangedWeights) -> None:
    before = fingerprint(clip)
    assert len(before) == 64
    clip.model.eval()
    assert fingerprint(clip) == before
    with changed_weights():
        assert fingerprint(clip) != before
    assert fingerprint(clip) == before
    assert fingerprint(replace(clip, config={**clip.config, "quick_gelu": True})) != before


def write_splits(root: Path, make_task: MakeTask, make_image: MakeImage, shared: int) -> list[Task]:
    """A task x of 14 test images, `shared` of them among its 60 of train, and its probes."""

    def members(first: int, count: int) -> list[Any]:
        return [
            [("png", make_image(first + i)), ("cls", str(i % 6).encode())] for i in range(count)
        ]

    make_task(root / "x", members=members(0, 14), shards=1)
    train = [*members(0, shared), *members(100, 60 - shared)]
    made = make_task(root / "made", members=train, shards=1, split="train")
    (made / "train").rename(root / "x" / "train")
    (task,) = find_tasks(root, ["x"]).complete()
    probe = replace(task, name="linear_probe/x", protocol="linear_probe", family="linear_probe")
    return [task, probe, replace(task, name="few_shot_2/x", protocol="few_shot", shots=2)]


def test_protocols_of_one_task(
    tmp_path: Path, make_task: MakeTask, make_image: MakeImage, clip: ClipModel
) -> None:
    tasks = write_splits(tmp_path, make_task, make_image, shared=5)
    with counted(clip) as counts:
        results = run(clip, tasks)
    assert counts["images"] == 69  # five are in both splits
    alone = [run(clip, [one])[0] for one in tasks]
    assert [r.main_metric for r in results] == [r.main_metric for r in alone]
    zero_shot, linear, shots = results
    assert linear.metrics["l2"] is not None
    assert "acc1_sd" in shots.metrics
    assert linear.units.tolist() == zero_shot.units.tolist()  # type: ignore[union-attr]
    assert len({result.task for result in results}) == 3


@pytest.mark.parametrize("cached", [True, False])
def test_images_of_both_splits_are_counted(
    tmp_path: Path, make_task: MakeTask, make_image: MakeImage, clip: ClipModel, cached: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    tasks = write_splits(tmp_path, make_task, make_image, shared=5)
    path = tmp_path / "r.jsonl"
    options = {"cache": tmp_path / "cache"} if cached else {}
    with caplog.at_level(logging.WARNING):
        zero_shot, *probes = run(clip, tasks, results_path=path, **options)
    assert IN_TRAIN not in zero_shot.metrics
    assert [result.metrics[IN_TRAIN] for result in probes] == [5.0, 5.0]
    assert "few_shot_2/x: 5 of 14 test images are in the train split, too" in caplog.text
    summary = summarise(read_results(path), {})
    assert "linear_probe/x: 5 of 14 test images are in the train split, too" in summary.table()
    assert [bool(record["note"]) for record in summary.records()] == [False, True, True]


def test_a_probe_is_not_fitted_on_what_it_is_tested_on(
    tmp_path: Path, make_task: MakeTask, make_image: MakeImage, clip: ClipModel
) -> None:
    """The same tars by another name, and copies of the images in other tars."""
    same = write_splits(tmp_path / "same", make_task, make_image, shared=0)
    for tar in (tmp_path / "same" / "x" / "train").glob("*.tar"):
        tar.unlink()
        tar.symlink_to(tmp_path / "same" / "x" / "test" / tar.name)
    copies = write_splits(tmp_path / "copies", make_task, make_image, shared=14)
    for tasks, message in (
        (same, r"0\.tar is in the split 'test', too \(1 of 1 tars are\)"),
        (copies, r"All 14 images of 'test' are in the train split, too"),
    ):
        found = evaluate(clip, tasks)
        assert [result.key for result in found.results] == ["x"]
        assert [failure.key for failure in found.failures] == ["linear_probe/x", "few_shot_2/x"]
        assert all(re.search(message, failure.message) for failure in found.failures)


def test_wrong_options(tasks: list[Task], clip: ClipModel) -> None:
    with pytest.raises(InputError, match=r"\['few'\] are there more than once"):
        run(clip, [tasks[2], tasks[2]])
    with pytest.raises(InputError, match=r"EvalOptions: batch_size must be"):
        EvalOptions(batch_size=0)
    with pytest.raises(InputError, match=r"num_workers must be"):
        EvalOptions(num_workers=-1)
    with pytest.raises(InputError, match=r"resamples must be"):
        EvalOptions(resamples=-1)
    with pytest.raises(InputError, match=r"precision must be one of \['fp32', .*Got 'tf32'"):
        EvalOptions(precision="tf32")
    assert evaluate(clip, []).results == ()
