"""clip_benchmark with the repairs of benchmarks/tools/clip_benchmark_fixed.py. The numbers are
those of its faults in docs/conformance.md."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import linear_probe, zeroshot_classification, zeroshot_retrieval
from numpy.lib import NumpyVersion

from siftclip.datamodules.models.load import ClipModel, save_model_folder
from siftclip.eval.evaluate import evaluate_tasks
from siftclip.eval.tasks.task import find_tasks

NAMES = [
    (zeroshot_classification, "accuracy"),
    (linear_probe, "accuracy"),
    (zeroshot_retrieval, "recall_at_k"),
]


def test_accuracy_equals_a_loop(fixed_clip_benchmark: ModuleType) -> None:
    """Number 1."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 7, generator=generator)
    target = torch.randint(0, 7, (40,), generator=generator)
    expected = []
    for k in (1, 3, 5):
        hits = 0
        for row, label in zip(logits.tolist(), target.tolist(), strict=True):
            best = sorted(range(7), key=lambda c: -row[c])[:k]
            hits += label in best
        expected.append(hits / 40)
    assert fixed_clip_benchmark.accuracy(logits, target, topk=(1, 3, 5)) == expected
    with fixed_clip_benchmark.repaired():
        assert zeroshot_classification.accuracy(logits, target) == expected[:1]


@pytest.mark.skipif(NumpyVersion(np.__version__) < "2.4.0", reason="an error since numpy 2.4")
def test_accuracy_is_still_broken_without_us() -> None:
    """Number 1. When this fails, the replacement can go."""
    with pytest.raises(TypeError):
        zeroshot_classification.accuracy(torch.eye(5), torch.arange(5))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_recall_equals_clip_benchmark(fixed_clip_benchmark: ModuleType, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    scores = torch.randn(30, 12, generator=generator)
    pairs = torch.rand(30, 12, generator=generator) < 0.3
    pairs[:, 0] = True
    expected = zeroshot_retrieval.recall_at_k(scores, pairs, k)
    assert torch.equal(fixed_clip_benchmark.recall_at_k(scores, pairs, k), expected)


def test_recall_with_fewer_candidates_than_k(fixed_clip_benchmark: ModuleType) -> None:
    """Number 9."""
    pairs = torch.eye(3, dtype=torch.bool)
    with pytest.raises(RuntimeError):
        zeroshot_retrieval.recall_at_k(torch.zeros(3, 3), pairs, 5)
    assert fixed_clip_benchmark.recall_at_k(torch.zeros(3, 3), pairs, 5).tolist() == [1, 1, 1]


def test_everything_is_put_back(fixed_clip_benchmark: ModuleType) -> None:
    before = [getattr(module, name) for module, name in NAMES]
    inside = []

    def fail() -> None:
        with fixed_clip_benchmark.repaired():
            inside.extend(getattr(module, name) for module, name in NAMES)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [getattr(module, name) for module, name in NAMES] == before
    assert all(new is not old for new, old in zip(inside, before, strict=True))


@pytest.mark.filterwarnings("ignore:.*shardshuffle")  # number 14
@pytest.mark.filterwarnings("ignore:Precision is ill-defined")  # of a report that it prints
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its tars open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the same, later
def test_its_command_line_gives_our_metrics(
    fixed_clip_benchmark: ModuleType,
    task_root: Path,
    clip: ClipModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_model_folder(clip, tmp_path / "model")
    words = (
        f"eval --dataset wds/things --dataset_root {task_root}/wds_things --num_workers 0 "
        f"--task zeroshot_classification --no_amp --model local-dir:{tmp_path}/model --pretrained"
    )
    output = tmp_path / "result.json"
    arguments = [*words.split(), "", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["clip_benchmark", *arguments])
    fixed_clip_benchmark.main()
    theirs = json.loads(output.read_text())["metrics"]
    tasks = find_tasks(task_root, ["things"]).complete()
    (ours,) = evaluate_tasks(clip, tasks).results
    assert {name: ours.metrics[name] for name in theirs} == pytest.approx(theirs, abs=1e-12)


def test_every_fault_has_a_row_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text()
    part = text.partition("## clip_benchmark")[2].partition("\n## ")[0]
    numbers = [line.split("|")[1].strip() for line in part.splitlines() if line.startswith("| ")]
    assert numbers[1:] == [str(number) for number in range(1, len(numbers))]
    assert len(numbers) > 15
