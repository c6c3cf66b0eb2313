"""Run tasks on a model in memory: every image and every text once, and each task by itself.

Tasks that share images are a group. A group's images are encoded, by all ranks; then its tasks are
scored one after the other, and their results written. A task that fails leaves the others alone.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from siftclip.agreement import agreed
from siftclip.datamodules.identity.identities import say_reused
from siftclip.datamodules.models.load import ClipModel
from siftclip.errors import InputError, ParameterError, require_int
from siftclip.eval.encoding.encoder import EncodeOptions, Encoder, ImageFeatures
from siftclip.eval.encoding.feature_cache import SharedCache
from siftclip.eval.encoding.task_scores import TaskTexts, score_task
from siftclip.eval.evaluation_mode import buffers_of_first_rank, evaluation_mode
from siftclip.eval.identities import model_identity, tars_stamp, task_identity, unit_ids
from siftclip.eval.metrics.outcomes import Outcomes
from siftclip.eval.probes.probe_scores import IN_TRAIN, ProbeSettings, count_in_train, score_probe
from siftclip.eval.results.files import (
    MAIN_METRIC,
    KeptResults,
    TaskResult,
    append_failure,
    append_result,
    outcomes_path,
    read_kept,
    write_lines,
)
from siftclip.eval.significance.resampling import replicates, task_interval
from siftclip.eval.tasks.images import ImageTable, content_id, image_ids
from siftclip.eval.tasks.kinds.registry import find_kind
from siftclip.eval.tasks.kinds.values import Task, TaskSamples, TaskScores
from siftclip.eval.tasks.preparation import PreparedTasks, TaskData, TaskFailure, prepare_tasks
from siftclip.locks import lock_beside, locked
from siftclip.ranks import OneRank, Ranks, sum_arrays

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: dict[Precision, torch.dtype | None] = {
    "fp32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """How tasks are evaluated. Batches, workers and ranks do not move the metrics."""

    batch_size: int = 256  # images, and texts, that a tower takes at once
    num_workers: int = 0  # processes that decode images
    precision: Precision = "fp32"  # of the towers; similarities always have full precision
    max_image_pixels: int = 178_956_970  # larger images are errors; Pillow's own limit
    resamples: int = 1000  # for intervals; 0: none
    seed: int = 0  # of the resamples
    cache: Path | None = None  # a folder where features are kept for later runs
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    progress: bool = True

    def __post_init__(self) -> None:
        require_int("batch_size", self.batch_size, minimum=1, owner=self)
        require_int("num_workers", self.num_workers, minimum=0, owner=self)
        require_int("resamples", self.resamples, minimum=0, owner=self)
        if self.precision not in PRECISIONS:
            rule = f"must be one of {[*PRECISIONS]}"
            raise ParameterError(rule, owner=self, parameter="precision", value=self.precision)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Results of one model, and what failed; equal on all ranks but for intervals and outcomes."""

    results: tuple[TaskResult, ...]  # in the order of the tasks
    failures: tuple[TaskFailure, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredTask:
    """A task with the details of its scores, for error analysis."""

    samples: TaskSamples
    scores: TaskScores


def evaluate_tasks(
    clip: ClipModel,
    tasks: Sequence[Task] | PreparedTasks,
    *,
    device: str | torch.device = "cpu",
    options: EvalOptions | None = None,
    ranks: Ranks | None = None,
    results_path: Path | None = None,
    again: Collection[str] = (),
    failed: Sequence[TaskFailure] = (),
    on_scored: Callable[[ScoredTask], None] | None = None,
    wait: bool = False,
) -> Evaluation:
    """Evaluate a model on tasks, in eval mode, whatever mode and autocast it is in.

    The model's modes and device are restored afterwards, and the global random state is left
    alone, so that this can be called in the middle of a training.

    Args:
        clip: the model with its transform and tokenizer.
        tasks: each name at most once; prepared ones are not indexed again.
        device: where to run.
        options: how; None means the defaults.
        ranks: with whom. All ranks make this call, with equal arguments but for the device.
        results_path: a JSONL file to which each result is added at once. Tasks whose result for
            this very model is there already are not run again, unless their samples, texts or
            metrics have changed since; results of another model are removed from it. Tasks that
            fail have a line with the reason, and no result.
        again: names of tasks that are run although there is a result.
        failed: tasks that cannot even be indexed, with the reason; they are among the failures.
        on_scored: is given each task that is run, on the first rank, before its result is written.
        wait: for another evaluation that writes `results_path`, instead of raising.

    Raises:
        InputError: an option is wrong, `results_path` was not written by us, cannot be written or
            is another evaluation's, or the ranks see another model or other tasks. What is wrong
            with a task or its images is a failure in what is returned.
    """
    options = options or EvalOptions()
    ranks = ranks or OneRank()
    if not isinstance(tasks, PreparedTasks):
        wanted_tasks, split = tasks, options.probe.train_split
        tasks = agreed(ranks, lambda: prepare_tasks(wanted_tasks, train_split=split))
    identities = {data.task.name: task_identity(data, options.probe) for data in tasks.data}
    stamps = {data.task.name: tars_stamp(data) for data in tasks.data}
    with ExitStack() as stack:
        stack.enter_context(buffers_of_first_rank(clip.model, ranks))
        if results_path is not None:
            lock = lock_beside(results_path)
            stack.enter_context(locked(lock, owner=str(results_path), ranks=ranks, wait=wait))
        identity = model_identity(clip, options.precision)
        done: dict[str, TaskResult] = {}
        if results_path is not None:
            broken = {failure.key for failure in (*failed, *tasks.failures)}
            done = _resume(
                results_path, identity, identities, stamps, ranks, {*again, *broken}, options
            )
        wanted = tasks.without(set(done))
        reused = done.keys() & identities.keys()  # the file may hold those of other tasks, too
        if reused and results_path is not None and ranks.rank == 0:
            # the file of the lines is written again each time, those of the outcomes are not
            files = [outcomes_path(results_path, key) for key in reused]
            files = [file for file in files if file.exists()] or [results_path]
            oldest = min(files, key=lambda file: file.stat().st_mtime)
            say_reused(f"the results of {len(reused)} of {len(identities)} tasks", oldest)
        _require_agreement(ranks, [identity, *(identities[data.task.name] for data in wanted.data)])
        evaluator = _Evaluator(
            clip,
            options,
            ranks,
            torch.device(device),
            identity,
            identities,
            stamps,
            results_path,
            on_scored,
        )
        new_results = evaluator.run(wanted) if wanted.data else {}
        failures = (*failed, *tasks.failures, *evaluator.failures)
        if results_path is not None:
            agreed(ranks, lambda: _keep_failures(results_path, failures, identity, ranks))
    names = [data.task.name for data in tasks.data]
    results = {**done, **new_results}
    for failure in failures:
        if ranks.rank == 0:
            log.warning("%s failed: %s", failure.key, failure.message)
    return Evaluation(
        results=tuple(results[name] for name in names if name in results),
        failures=failures,
    )


def _keep_failures(path: Path, failures: Sequence[TaskFailure], model: str, ranks: Ranks) -> None:
    if ranks.rank == 0:
        for failure in failures:
            append_failure(path, replace(failure, model=model))


def _require_agreement(ranks: Ranks, identities: Sequence[str]) -> None:
    """Raise InputError on all ranks unless all want the same; they would wait for ever."""
    board = np.zeros(ranks.size, dtype=np.int64)
    board[ranks.rank] = content_id("\n".join(identities).encode()) >> 1  # not negative
    board = sum_arrays(ranks, board)
    other = np.flatnonzero(board != board[0]).tolist()
    if other:
        raise InputError(
            f"All ranks must evaluate the same model on the same tasks and see the same results "
            f"so far. The ranks {other} differ from the first: are the tasks and the file of the "
            "results on a disk that all machines share?"
        )


def _resume(
    path: Path,
    model: str,
    tasks: Mapping[str, str],
    stamps: Mapping[str, str],
    ranks: Ranks,
    again: Collection[str],
    options: EvalOptions,
) -> dict[str, TaskResult]:
    """Read the results in a file that are still valid, after the others were removed from it.

    Args:
        path: of the file.
        model: `model_identity`.
        tasks: `task_identity` by name, of those that are asked for.
        stamps: `tars_stamp` likewise; the first rank's count.
        ranks: who asks.
        again: names of tasks whose results shall go.
        options: of the intervals, for results that were made without.
    """
    before = agreed(ranks, lambda: _read_own(path))  # all, before the first replaces the file
    results = before.results
    of_model = [result for result in results if result.model == model]
    valid = [result for result in of_model if tasks.get(result.key, result.task) == result.task]
    same_tars = np.zeros(len(valid), dtype=np.int64)
    if ranks.rank == 0:
        same_tars[:] = [stamps.get(result.key, result.tars) == result.tars for result in valid]
    unchanged = sum_arrays(ranks, same_tars).astype(np.bool_).tolist()
    others = [result.key for result, same in zip(valid, unchanged, strict=True) if not same]
    again = {*again, *others}
    kept = [result for result in valid if result.key not in again and not result.note]
    kept = [_with_interval(result, options, ranks) for result in kept]
    if ranks.rank == 0 and path.exists():
        if len(of_model) < len(results):
            gone = len(results) - len(of_model)
            differs = "its weights, activation, preprocessing or tokenizer differ"
            log.warning("%s: %d results of another model are removed (%s)", path, gone, differs)
        if len(valid) < len(of_model):
            changed = ", ".join(sorted({r.key for r in of_model} - {r.key for r in valid}))
            log.warning("%s: results of tasks that have changed are removed: %s", path, changed)
        if others:
            log.warning(
                "%s: the tars of tasks were written after their results, or an earlier version "
                "did not note which they were; evaluated again: %s",
                path,
                ", ".join(sorted(others)),
            )
        failures = [failure for failure in before.failures if failure.model == model]
        tried = {*tasks, *again}  # which have a new result or failure soon
        untried = tuple(failure for failure in failures if failure.key not in tried)
        # also when all are kept: without a last line that was cut off
        write_lines(path, KeptResults(results=tuple(kept), failures=untried))
    return {result.key: result for result in kept}


def _read_own(path: Path) -> KeptResults:
    """Read what a file holds that we have written; of two results of a task, the last."""
    kept = read_kept(path, latest=True)
    foreign = [result.key for result in kept.results if result.model is None]
    if foreign:
        raise InputError(
            f"{path} holds a result for {foreign[0]!r} that does not say which model it is of, so "
            "Siftclip has not written it. Name another file for the results."
        )
    return kept


def _with_interval(result: TaskResult, options: EvalOptions, ranks: Ranks) -> TaskResult:
    """Add an interval, if one can be had and there is none. The first rank's result matters."""
    if result.interval is not None or result.outcomes is None or result.units is None:
        return result
    return replace(result, interval=_interval(result.outcomes, result.units, options, ranks))


def _interval(
    outcomes: Outcomes | None, units: np.ndarray, options: EvalOptions, ranks: Ranks
) -> tuple[float, float] | None:
    if outcomes is None or not options.resamples or ranks.rank > 0:
        return None
    drawn = replicates(outcomes, units, resamples=options.resamples, seed=options.seed)
    return task_interval(outcomes, units, drawn)


class _Evaluator:
    """One run over tasks."""

    def __init__(
        self,
        clip: ClipModel,
        options: EvalOptions,
        ranks: Ranks,
        device: torch.device,
        identity: str,
        identities: Mapping[str, str],
        stamps: Mapping[str, str],
        results_path: Path | None,
        on_scored: Callable[[ScoredTask], None] | None,
    ) -> None:
        self.clip = clip
        self.options = options
        self.ranks = ranks
        self.device = device
        self.identity = identity
        self.identities = identities
        self.stamps = stamps
        self.results_path = results_path
        self.on_scored = on_scored
        self.failures: list[TaskFailure] = []
        self.images, self.classes = (
            None if options.cache is None else SharedCache(options.cache, identity, kind, ranks)
            for kind in ("images", "classes")
        )

    def run(self, tasks: PreparedTasks) -> dict[str, TaskResult]:
        """Evaluate the tasks: results by name; failures are gathered."""
        table = tasks.table
        if table is None:
            raise RuntimeError("tasks come with their images")
        groups = tasks.groups()
        results: dict[str, TaskResult] = {}
        with evaluation_mode(self.clip, self.device) as ready:
            encoder = Encoder(ready, self._encode_options(), self.ranks)
            texts = TaskTexts(encoder.texts, self.classes, self.device)
            sets = [np.unique(np.concatenate([data.rows() for data in group])) for group in groups]
            features_of_sets = self._features(encoder, table, sets)
            for group, rows, features in zip(groups, sets, features_of_sets, strict=True):
                for data in group:
                    try:
                        result, scored = self._evaluate(data, rows, features, texts)
                    except InputError as error:
                        self.failures.append(TaskFailure(key=data.task.name, message=str(error)))
                        continue
                    agreed(self.ranks, functools.partial(self._keep, result, scored))
                    results[data.task.name] = result
        return results

    def _keep(self, result: TaskResult, scored: ScoredTask) -> None:
        if self.ranks.rank > 0:
            return
        if self.on_scored is not None:
            self.on_scored(scored)
        if self.results_path is not None:
            append_result(self.results_path, result)

    def _encode_options(self) -> EncodeOptions:
        options = self.options
        return EncodeOptions(
            device=self.device,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            max_image_pixels=options.max_image_pixels,
            autocast=PRECISIONS[options.precision],
            progress=options.progress,
        )

    def _features(
        self, encoder: Encoder, table: ImageTable, sets: list[np.ndarray]
    ) -> Iterator[ImageFeatures]:
        cache = self.images
        if cache is None:
            yield from encoder.image_sets(table, sets)
            return
        wanted = np.unique(np.concatenate(sets))
        ids = self._image_ids(table, wanted)
        known = cache.known(ids)
        count = int(known[wanted].sum())
        if count and self.ranks.rank == 0:
            log.info("reused the kept features of %d images", count)
        fresh = encoder.image_sets(table, [rows[~known[rows]] for rows in sets])
        for rows, new in zip(sets, fresh, strict=True):
            sound = np.asarray([row not in new.faults for row in range(len(new.ids))], bool)
            cache.add(new.ids[sound], new.features[sound])
            yield _merged(ids[rows], known[rows], cache.features(ids[rows[known[rows]]]), new)

    def _image_ids(self, table: ImageTable, wanted: np.ndarray) -> np.ndarray:
        """Hash the wanted images to ids, uint64 [U], on all ranks, which share the reading.

        0 for the others, and for one that cannot be read, of which the loader will tell.
        """
        ids = np.zeros(len(table), dtype=np.int64)
        mine = np.array_split(wanted, self.ranks.size)[self.ranks.rank]
        try:
            ids[mine] = image_ids(table.take(mine)).view(np.int64)
        except InputError:
            for row in mine:
                with suppress(InputError):
                    ids[row] = image_ids(table.take(np.asarray([row]))).view(np.int64)[0]
        return sum_arrays(self.ranks, ids).view(np.uint64)

    def _evaluate(
        self, data: TaskData, rows: np.ndarray, features: ImageFeatures, texts: TaskTexts
    ) -> tuple[TaskResult, ScoredTask]:
        start = time.perf_counter()
        task = data.task
        at = np.searchsorted(rows, data.rows())
        for place in at.tolist():
            if place in features.faults:
                raise InputError(features.faults[place])
        images = self._take(features, rows, data.images)
        ids = features.ids[np.searchsorted(rows, data.images)]
        if task.protocol == "zero_shot":
            scores = score_task(data.samples, images, texts)
        else:
            if data.train is None or data.train_images is None:
                raise RuntimeError("probes are fitted on a train split")
            train_ids = features.ids[np.searchsorted(rows, data.train_images)]
            in_train = count_in_train(ids, train_ids, task)
            train = self._take(features, rows, data.train_images)
            scores = score_probe(data.samples, images, data.train, train, self.options.probe)
            scores = replace(scores, metrics={**scores.metrics, IN_TRAIN: float(in_train)})
            if in_train and self.ranks.rank == 0:
                text = "%s: %d of %d test images are in the train split, too: its value is too high"
                log.warning(text, task.name, in_train, len(ids))
        result = self._result(data.samples, scores, unit_ids(data.samples, ids), start)
        return result, ScoredTask(samples=data.samples, scores=scores)

    def _take(self, features: ImageFeatures, rows: np.ndarray, wanted: np.ndarray) -> Tensor:
        chosen = features.features[np.searchsorted(rows, wanted)]
        return torch.from_numpy(chosen).to(self.device)

    def _result(
        self, samples: TaskSamples, scores: TaskScores, units: np.ndarray, start: float
    ) -> TaskResult:
        task = samples.task
        metrics = {
            name: None if math.isnan(value) else float(value)
            for name, value in scores.metrics.items()
        }
        if task.main_metric is not None and task.main_metric not in metrics:
            raise InputError(
                f"The main metric of {task.name} must be one of {sorted(metrics)}. "
                f"Got {task.main_metric!r}."
            )
        main = None if task.main_metric is None else metrics[task.main_metric]
        outcomes = None if main is None else scores.outcomes.get(str(task.main_metric))
        return TaskResult(
            key=task.name,
            dataset=task.title,
            metrics={**metrics, MAIN_METRIC: main},
            main_metric_name=task.main_metric,
            samples=len(units),
            interval=_interval(outcomes, units, self.options, self.ranks),
            seconds=time.perf_counter() - start,
            model=self.identity,
            task=self.identities[task.name],
            tars=self.stamps[task.name],
            family=task.family,
            chances=find_kind(task.kind).chances(samples),
            outcomes=outcomes,
            units=units,
            other_outcomes={
                name: of_metric
                for name, of_metric in scores.outcomes.items()
                if outcomes is not None and metrics[name] is not None and name != task.main_metric
            },
        )


def _merged(
    ids: np.ndarray, known: np.ndarray, kept: np.ndarray, new: ImageFeatures
) -> ImageFeatures:
    """Merge the features of a set of images from those that were known and those that are new."""
    width = max(new.features.shape[1], kept.shape[1])
    features = np.empty((len(ids), width), dtype=np.float32)
    places = np.flatnonzero(~known)
    if len(kept):
        features[known] = kept
    if len(places):
        features[places] = new.features
    faults = {int(places[row]): message for row, message in new.faults.items()}
    return ImageFeatures(features=features, ids=ids, faults=faults)
