"""What fails on one rank fails on all, and two evaluations do not write to one file."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from siftclip.agreement import agreed
from siftclip.datamodules.models.load import ClipModel
from siftclip.errors import InputError
from siftclip.eval import evaluate
from siftclip.eval.evaluate import EvalOptions, evaluate_tasks
from siftclip.eval.results.files import TaskResult, append_result, read_results
from siftclip.eval.tasks.task import find_tasks
from siftclip.locks import HeldError, lock_beside, locked
from siftclip.ranks import OneRank, Ranks

RunOnRanks = Callable[[int, Callable[[Ranks], Any]], list[Any]]
QUIET = EvalOptions(progress=False, resamples=0)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_go_on_or_none(size: int, run_on_ranks: RunOnRanks) -> None:
    assert run_on_ranks(size, lambda ranks: agreed(ranks, lambda: ranks.rank)) == [*range(size)]

    def fail(ranks: Ranks) -> str:
        def work() -> None:
            if ranks.rank == size - 1:
                raise OSError("größer than the disk")

        with pytest.raises(InputError) as caught:
            agreed(ranks, work)
        return str(caught.value)

    assert run_on_ranks(size, fail) == ["größer than the disk"] * size


def test_an_error_without_words_is_an_error() -> None:
    with pytest.raises(InputError, match="MemoryError"):
        agreed(OneRank(), _run_out_of_memory)


def _run_out_of_memory() -> None:
    raise MemoryError


def test_other_errors_are_faults_of_ours() -> None:
    with pytest.raises(ZeroDivisionError):
        agreed(OneRank(), lambda: 1 / 0)


def test_a_full_disk_ends_all_ranks(
    task_root: Path,
    clip: ClipModel,
    tmp_path: Path,
    run_on_ranks: RunOnRanks,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(path: Path, result: TaskResult) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluate, "append_result", fail)
    tasks = find_tasks(task_root, ["few"]).complete()

    def on_rank(ranks: Ranks) -> str:
        own = replace(clip, model=copy.deepcopy(clip.model))
        with pytest.raises(InputError) as caught:
            evaluate_tasks(own, tasks, options=QUIET, ranks=ranks, results_path=tmp_path / "r")
        return str(caught.value)

    for message in run_on_ranks(2, on_rank):
        assert "No space left on device" in message


def test_a_file_is_written_by_one_evaluation(
    task_root: Path, clip: ClipModel, tmp_path: Path
) -> None:
    path = tmp_path / "eval_results.jsonl"
    tasks = find_tasks(task_root, ["few"]).complete()
    with (
        locked(lock_beside(path), owner="another"),
        pytest.raises(HeldError, match=rf"eval_results.jsonl is being written by .* {os.getpid()}"),
    ):
        evaluate_tasks(clip, tasks, options=QUIET, results_path=path)
    (result,) = evaluate_tasks(clip, tasks, options=QUIET, results_path=path).results
    append_result(path, result)  # as two writers at once left it
    again = evaluate_tasks(clip, tasks, options=QUIET, results_path=path)
    assert len(again.results) == len(read_results(path)) == 1
    assert again.results[0].metrics == result.metrics


def test_an_interval_is_made_up_for(task_root: Path, clip: ClipModel, tmp_path: Path) -> None:
    path = tmp_path / "eval_results.jsonl"
    tasks = find_tasks(task_root).complete()
    without = evaluate_tasks(clip, tasks, options=QUIET, results_path=path).results
    assert all(result.interval is None for result in without)
    options = replace(QUIET, resamples=50)
    with_ = evaluate_tasks(clip, tasks, options=options, results_path=path).results
    fresh = evaluate_tasks(clip, tasks, options=options).results
    assert [result.interval for result in with_] == [result.interval for result in fresh]
    assert [r.interval for r in read_results(path)] == [r.interval for r in fresh]
