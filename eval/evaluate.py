"""Run zero-shot tasks on a model in memory, with clip_benchmark's metrics, in fp32."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from siftclip.datamodules.clip_models import ClipModel
from siftclip.eval.clip_benchmark_fixes import none_for_nan, repaired
from siftclip.eval.metrics import EVALUATORS
from siftclip.eval.results import (
    MAIN_METRIC,
    TaskResult,
    append_result,
    read_results,
    wilson_interval,
    write_lines,
)
from siftclip.eval.task_dataset import TaskDataset, collate_captions
from siftclip.eval.tasks import Task
from siftclip.selectors.errors import InputError, require_int

SAMPLE_SHARES = ("acc1",)  # metrics that are a share of independent samples

log = logging.getLogger(__name__)


def fingerprint(clip: ClipModel) -> str:
    """SHA-256 over what decides a model's answers: its configuration and its weights.

    The configuration counts because two models with equal weights differ by activation function
    (`quick_gelu`) or by preprocessing.
    """
    digest = hashlib.sha256(json.dumps(clip.config, sort_keys=True, default=str).encode())
    for name, tensor in clip.model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def evaluate_tasks(
    clip: ClipModel,
    tasks: Sequence[Task],
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 256,
    num_workers: int = 0,
    results_path: Path | None = None,
    progress: bool = True,
) -> list[TaskResult]:
    """Evaluate a model on tasks, in eval mode and fp32 also where autocast is on.

    The model's modes and device are restored afterwards, and the global random state is left
    alone, so that this can be called in the middle of a training.

    Args:
        clip: the model with its transform and tokenizer.
        tasks: each name at most once.
        device: where to run.
        batch_size: images in a batch; for retrieval all captions of these images are one batch.
        num_workers: processes that decode images.
        results_path: a JSONL file to which each result is added at once. Tasks whose result for
            this very model is there already are not run again; results of another model are
            removed from it.
        progress: whether to show a bar over the tasks.

    Returns:
        The results in the order of `tasks`.

    Raises:
        InputError: an option is wrong, a task is damaged, or `results_path` was not written by us.
    """
    require_int("eval.batch_size", batch_size, minimum=1)
    require_int("eval.num_workers", num_workers, minimum=0)
    twice = [name for name, count in Counter(task.name for task in tasks).items() if count > 1]
    if twice:
        raise InputError(f"eval.tasks must name each task once. Got {twice} more than once.")
    model_hash = fingerprint(clip)
    done = {} if results_path is None else _resume(results_path, model_hash)
    results = []
    bar = tqdm(tasks, desc="evaluate", unit="task", disable=not progress, leave=False)
    with evaluation_mode(clip, torch.device(device)) as ready, repaired():
        for task in bar:
            bar.set_postfix_str(task.name)
            result = done.get(task.name)
            if result is None:
                result = _evaluate_task(task, ready, batch_size, num_workers, model_hash)
                if results_path is not None:
                    append_result(results_path, result)
            results.append(result)
    return results


def _resume(path: Path, model_hash: str) -> dict[str, TaskResult]:
    """The results in a file that are this model's, after the others have been removed from it."""
    if not path.exists():
        return {}
    results = read_results(path)
    foreign = [result.key for result in results if result.model is None]
    if foreign:
        raise InputError(
            f"{path} holds a result for {foreign[0]!r} that does not say which model it is of, so "
            "Siftclip has not written it. Name another file for the results."
        )
    kept = [result for result in results if result.model == model_hash]
    if len(kept) < len(results):
        log.warning("%s: %d results of another model are removed", path, len(results) - len(kept))
    write_lines(path, kept)  # also when all are kept: without a last line that was cut off
    return {result.key: result for result in kept}


@contextmanager
def evaluation_mode(clip: ClipModel, device: torch.device) -> Iterator[ClipModel]:
    """The model on `device` in fp32 and eval mode, without gradients and without autocast."""
    model = clip.model
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters()):
        model = copy.deepcopy(model).float()  # there and back in place would round master weights
    home = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}  # parts may be frozen
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            # clip_benchmark can be told only "cuda", which is the current device
            stack.enter_context(torch.cuda.device(device))
        try:
            yield replace(clip, model=model.to(device).eval())
        finally:
            model.to(home)
            for module, training in modes.items():
                module.training = training


def _evaluate_task(
    task: Task, clip: ClipModel, batch_size: int, num_workers: int, model_hash: str
) -> TaskResult:
    start = time.perf_counter()
    dataset = TaskDataset(task, clip.eval_transform)
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate_captions if task.kind == "retrieval" else None,
        generator=torch.Generator(),  # without one it takes a number from the global generator
    )
    device_type = next(clip.model.parameters()).device.type
    raw_metrics, correct = EVALUATORS[task.kind](clip.model, clip.tokenizer, loader, device_type)
    metrics = none_for_nan(raw_metrics)
    if task.main_metric not in metrics:
        raise InputError(
            f"The main metric of {task.name} must be one of {sorted(metrics)}. "
            f"Got {task.main_metric!r}."
        )
    main = metrics[task.main_metric]
    return TaskResult(
        key=task.name,
        dataset=task.title,
        metrics={**metrics, MAIN_METRIC: main},
        main_metric_name=task.main_metric,
        samples=len(dataset),
        interval=(
            wilson_interval(main, len(dataset))
            if main is not None and task.main_metric in SAMPLE_SHARES
            else None
        ),
        seconds=time.perf_counter() - start,
        model=model_hash,
        correct=correct,
    )
