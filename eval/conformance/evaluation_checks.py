"""Checks of a kind of task by tiny models: evaluations, probes and targets of selectors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from siftclip.datamodules.models.load import ClipModel, load_clip_model
from siftclip.eval.conformance.example import KindExample, image_features, named_check
from siftclip.eval.encoding.encoder import EncodeOptions
from siftclip.eval.evaluate import EvalOptions, ScoredTask, evaluate_tasks
from siftclip.eval.probes.linear_probe import ProbeOptions
from siftclip.eval.probes.probe_scores import ProbeSettings, score_probe
from siftclip.eval.reports.comparison import compare_results
from siftclip.eval.results.files import TaskResult, read_results
from siftclip.eval.target_features import embed_tasks
from siftclip.eval.tasks.kinds.registry import find_kind
from siftclip.eval.tasks.kinds.values import Task
from siftclip.files import read_npz_all

_RESAMPLES = 50
_TINY_CLIP: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "image_size": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 1},
}


@named_check
def check_evaluation(example: KindExample) -> None:
    """Check a whole evaluation by tiny models: results are kept, read back, reused and compared."""
    with example.task() as task:
        results = []
        for seed in (0, 1):
            clip, path = _tiny_clip(seed), task.root / f"results-{seed}.jsonl"
            result, runs = _evaluate(clip, task, path)
            assert runs == 1, "the task was not run"
            again, runs = _evaluate(clip, task, path)
            assert runs == 0, "a kept result is not used again: is the task the same each time?"
            assert again.metrics == result.metrics, "the kept result is another"
            results.append(again)
        first, second = results
        compared = compare_results([first], [second], {}, resamples=_RESAMPLES)
        (difference,) = compared.tasks
        assert difference.comparable, f"two models cannot be compared: {difference.note}"


@named_check
def check_probes(example: KindExample) -> None:
    """Check that probes fit where a kind says that labels are classes, and give its main metric."""
    if not example.kind.one_class:
        return
    samples, kind = example.read(), find_kind(example.kind.name)
    images, settings = image_features(samples), ProbeSettings(options=ProbeOptions(l2=0.1))
    probe = replace(samples.task, protocol="linear_probe")
    for task in (probe, replace(probe, protocol="few_shot", shots=1)):
        probed = replace(samples, task=task)
        scores = score_probe(probed, images, probed, images, settings)
        known = sorted(scores.metrics)
        assert kind.main_metric in known, f"{kind.main_metric!r} must be one of {known}"
        assert kind.columns(probed, scores) is not None, f"{task.protocol} must have columns"


@named_check
def check_targets(example: KindExample) -> None:
    """Check that a task of a kind that can be a target of selectors can be embedded as one."""
    if not example.kind.is_target:
        return
    options = EncodeOptions(device=torch.device("cpu"), batch_size=4, progress=False)
    with example.task() as task:
        (path,) = embed_tasks(_tiny_clip(0), [task], task.root / "targets", options)
        arrays = read_npz_all(path)
    samples = len(example.samples)
    assert len(arrays["img"]) == samples, "a target has one image in each sample"
    name, count = ("class_txt", len(task.classnames)) if task.has_classes else ("txt", samples)
    assert len(arrays[name]) == count, f"a target has {count} texts. This has {len(arrays[name])}"


def _tiny_clip(seed: int) -> ClipModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return load_clip_model("tiny", architecture=_TINY_CLIP)


def _evaluate(clip: ClipModel, task: Task, path: Path) -> tuple[TaskResult, int]:
    """Evaluate, and return what was kept in the file, and how often the task was run."""
    scored: list[ScoredTask] = []
    options = EvalOptions(batch_size=4, resamples=_RESAMPLES, progress=False)
    evaluation = evaluate_tasks(
        clip, [task], options=options, results_path=path, on_scored=scored.append
    )
    for failure in evaluation.failures:
        raise AssertionError(failure.message)
    (kept,) = read_results(path)
    return kept, len(scored)
