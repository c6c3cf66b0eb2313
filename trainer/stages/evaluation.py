"""The eval stage: a model, a run directory or a checkpoint on tasks."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist

from siftclip.datamodules.models.load import ClipModel, load_clip_model
from siftclip.datamodules.models.record import model_record
from siftclip.errors import InputError
from siftclip.eval.evaluate import EvalOptions, ScoredTask, evaluate_tasks
from siftclip.eval.probes.linear_probe import ProbeOptions
from siftclip.eval.probes.probe_scores import ProbeSettings
from siftclip.eval.reports.error_analysis import (
    ENDINGS,
    details_path,
    may_have,
    write_details,
    write_predictions,
)
from siftclip.eval.reports.report import Summary, summarise, write_csv
from siftclip.eval.results.aggregates import check_groups
from siftclip.eval.results.files import TaskResult, read_kept, read_results
from siftclip.eval.tasks.kinds.registry import find_kind
from siftclip.eval.tasks.kinds.values import Protocol, Task
from siftclip.eval.tasks.preparation import TaskFailure
from siftclip.eval.tasks.task import (
    FoundTasks,
    find_tasks,
    require_names,
    with_texts,
)
from siftclip.files import identity_hash, write_json
from siftclip.ranks import OneRank, ProcessGroup, Ranks
from siftclip.reading import read_text
from siftclip.trainer.options.faults import options_of, under
from siftclip.trainer.runtime.cores import share_cores, worker_count
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.runtime.selection_ranks import selection_ranks
from siftclip.trainer.settings.commands import EvalCommand, EvalSections
from siftclip.trainer.settings.evaluation import EvalSettings
from siftclip.trainer.settings.lightning import TrainerSettings
from siftclip.writing import delete_file

log = logging.getLogger(__name__)


def tasks_from(settings: EvalSettings, *, during: bool = False) -> FoundTasks:
    """Find the tasks that the settings name, under all of their protocols.

    Args:
        settings: of the evaluation.
        during: those of `eval.during`, which are zero-shot alone.

    Raises:
        InputError: an option is wrong, or there is no task at all.
    """
    if settings.root is None:
        raise InputError(
            "eval.root must name a folder of tasks in clip_benchmark's webdataset layout, "
            "for example eval.root=/data/tasks. siftclip eval download gets DataComp's."
        )
    wanted, option = settings.tasks, "eval.tasks"
    if during and settings.during.tasks is not None:
        wanted, option = settings.during.tasks, "eval.during.tasks"
    with options_of({"root": "eval.root", "names": option}):
        found_tasks = find_tasks(
            Path(settings.root),
            wanted,
            key_split=settings.key_split,
            may_miss=settings.suite is not None,
        )
    if not found_tasks.tasks and not found_tasks.damaged:
        raise InputError(
            f"eval.root={settings.root!r} has none of the {len(found_tasks.missing)} tasks of "
            f"eval={settings.suite}. siftclip eval download gets them."
        )
    if not during:
        names = [*found_tasks.available, *found_tasks.missing]
        with options_of(under("eval", "groups")):
            check_groups(settings.groups, names, suite=settings.suite is not None)
    texts = {"classnames": settings.classnames, "templates": settings.templates}
    _check_texts(texts, found_tasks, others_may_be=during)
    tasks = []
    for task in found_tasks.tasks:
        files = {option: Path(by[task.name]) for option, by in texts.items() if task.name in by}
        with options_of(under("eval", "classnames", "templates")):
            tasks.append(with_texts(task, **files) if files else task)
    return replace(found_tasks, tasks=tuple(tasks if during else _under_protocols(settings, tasks)))


def _check_texts(
    texts: Mapping[str, Mapping[str, str]], found_tasks: FoundTasks, *, others_may_be: bool
) -> None:
    known = {*(task.name for task in found_tasks.tasks), *found_tasks.missing, *found_tasks.damaged}
    for option, files in texts.items():
        for name, file in files.items():
            if name not in known and not others_may_be:
                raise InputError(
                    f"eval.{option} must name tasks that are evaluated: {sorted(known)}. "
                    f"Got {name!r}."
                )
            if not Path(file).is_file():
                raise InputError(f"eval.{option}.{name} must be a text file. Got {file!r}.")


def _under_protocols(settings: EvalSettings, tasks: list[Task]) -> list[Task]:
    """Add to the tasks those that a probe can be fitted on, once more for each probe."""
    chosen = require_names("eval.protocols", settings.protocols)
    unknown = [name for name in chosen if name not in get_args(Protocol)]
    if unknown or not chosen:
        raise InputError(
            f"eval.protocols must be some of {list(get_args(Protocol))}. Got {chosen!r}."
        )
    split = settings.probe.train_split
    if set(chosen) != {"zero_shot"} and any(split == task.split for task in tasks):
        raise InputError(
            f"eval.probe.train_split must not be the split that tasks are tested on. Got {split!r}."
        )
    probed = [
        task
        for task in tasks
        if find_kind(task.kind).one_class and task.has_labels and (task.root / split).is_dir()
    ]
    if not probed and set(chosen) != {"zero_shot"}:
        raise InputError(
            f"eval.protocols={chosen} fits classifiers, but no classification task in "
            f"{settings.root} has the split {split!r} (eval.probe.train_split)."
        )
    asked = list(tasks) if "zero_shot" in chosen else []
    if "linear_probe" in chosen:
        asked += [_probe(task, None) for task in probed]
    if "few_shot" in chosen:
        for shots in settings.probe.shots:
            asked += [_probe(task, shots) for task in probed]
    return asked


def _probe(task: Task, shots: int | None) -> Task:
    """Return the task with a classifier fitted on its train split, or on some shots per class."""
    protocol: Protocol = "linear_probe" if shots is None else "few_shot"
    prefix = protocol if shots is None else f"{protocol}_{shots}"
    words = "linear probe" if shots is None else f"{shots}-shot"
    main = task.main_metric if task.special is None else "acc1"
    return replace(
        task,
        name=f"{prefix}/{task.name}",
        title=f"{task.title} ({words})",
        protocol=protocol,
        shots=shots,
        main_metric=main,
        special=None,
        family=protocol,
    )


def eval_options(settings: EvalSections, *, ranks: int) -> EvalOptions:
    """Return how the settings want tasks to be evaluated.

    Args:
        settings: of the command.
        ranks: that evaluate on this machine, where no launcher tells.
    """
    evaluation, data, common = settings.eval, settings.data, settings.common
    return EvalOptions(
        batch_size=evaluation.batch_size,
        num_workers=worker_count(data.num_workers, ranks),
        precision=evaluation.precision,
        max_image_pixels=data.max_image_pixels,
        resamples=evaluation.resamples,
        cache=evaluation.cache if common.reuse else None,
        probe=ProbeSettings(
            train_split=evaluation.probe.train_split,
            few_shot_seeds=evaluation.probe.seeds,
            options=ProbeOptions(l2=evaluation.probe.l2),
        ),
        progress=common.progress,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalShare:
    """The part of this process in an evaluation."""

    ranks: Ranks
    device: torch.device


def eval_share(trainer: TrainerSettings, *, may_launch: bool) -> EvalShare:
    """Return who evaluates: the ranks that train, or those that the settings ask for.

    Args:
        trainer: the devices.
        may_launch: whether ranks may be started here, see `selection_ranks`.
    """
    if dist.is_available() and dist.is_initialized():
        on_gpu = dist.get_backend() == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else "cpu"
        return EvalShare(ranks=ProcessGroup(torch.device(device)), device=torch.device(device))
    ranks, device = selection_ranks(trainer, may_launch=may_launch)
    return EvalShare(ranks=ranks, device=device)


def eval_stage(
    settings: EvalSections,
    model: Path | ClipModel,
    *,
    results_path: Path | None,
    share: EvalShare | None = None,
    wait: bool = False,
) -> Summary:
    """Evaluate a model on the configured tasks; tasks with a result are not run again.

    Args:
        settings: which tasks, and how.
        model: a model, or a run directory or model folder to load it from.
        results_path: the JSONL file of the results, beside which a table as CSV, a record of the
            model and what else is asked for is written; None keeps them in memory.
        share: of this process; None means that it is alone. All ranks make this call.
        wait: for another evaluation that writes the same results, instead of raising.

    Returns:
        The results, with intervals on the first rank only. Tasks that failed are listed.
    """
    device = torch.device(evaluation_device(settings.trainer))
    share = share or EvalShare(ranks=OneRank(), device=device)
    found_tasks = tasks_from(settings.eval)
    options = eval_options(settings, ranks=share.ranks.size)
    clip = load_clip_model(str(model)) if isinstance(model, Path) else model
    share_cores(options.num_workers, share.ranks.size)
    details = None if results_path is None else details_folder(results_path)
    damaged = [TaskFailure(key=name, message=text) for name, text in found_tasks.damaged.items()]
    evaluation = evaluate_tasks(
        clip,
        found_tasks.tasks,
        device=share.device,
        options=options,
        ranks=share.ranks,
        results_path=results_path,
        again=_to_do_again(settings, found_tasks.tasks, details),
        failed=damaged,
        on_scored=None if details is None else _write_details(settings.eval, details),
        wait=wait,
    )
    summary = _summary(
        settings.eval,
        evaluation.results,
        missing=found_tasks.missing,
        failures=evaluation.failures,
        resamples=options.resamples if share.ranks.rank == 0 else 0,
    )
    if results_path is not None and share.ranks.rank == 0:
        write_json(results_path.with_name(f"{results_path.stem}_model.json"), model_record(clip))
        write_csv(results_path.with_suffix(".csv"), _whole(settings.eval, results_path, summary))
    return summary


def _to_do_again(settings: EvalSections, tasks: Sequence[Task], details: Path | None) -> list[str]:
    """List the tasks whose results shall not be reused."""
    if not settings.common.reuse:
        return [task.name for task in tasks]
    return [] if details is None else _without_details(settings.eval, tasks, details)


def details_folder(results_path: Path) -> Path:
    """Return where predictions and tables by class are, beside the results."""
    return results_path.with_name(f"{results_path.stem}_details")


def _write_details(settings: EvalSettings, folder: Path) -> Callable[[ScoredTask], None]:
    """Return what writes the wanted details of a task, in place of those of an earlier model."""

    def write(scored: ScoredTask) -> None:
        for ending in ENDINGS:
            delete_file(details_path(folder, scored.samples.task, ending))
        if settings.details:
            write_details(folder, scored)
        if settings.predictions:
            write_predictions(folder, scored)

    return write


def _whole(settings: EvalSettings, path: Path, summary: Summary) -> Summary:
    """Summarise all lines of a results file, where this was a part of its tasks."""
    kept = read_kept(path)
    if _keys(kept.results, kept.failures) == _keys(summary.results, summary.failures):
        return summary
    return _summary(settings, kept.results, missing=summary.missing, failures=kept.failures)


def _keys(results: Sequence[TaskResult], failures: Sequence[TaskFailure]) -> tuple[set[str], ...]:
    return {result.key for result in results}, {failure.key for failure in failures}


def run_summary(settings: EvalSettings, run: RunDir) -> Summary:
    """Summarise what the results file of a run holds."""
    kept = read_kept(run.results)
    return _summary(settings, kept.results, failures=kept.failures)


def _summary(
    settings: EvalSettings,
    results: Sequence[TaskResult],
    *,
    failures: Sequence[TaskFailure],
    missing: Sequence[str] = (),
    resamples: int | None = None,
) -> Summary:
    """Return `summarise` with what the settings say; `resamples` in place of their own."""
    with options_of(under("eval", "groups", "resamples")):
        return summarise(
            results,
            settings.groups,
            missing=missing,
            failures=failures,
            resamples=settings.resamples if resamples is None else resamples,
        )


def failed_tasks(settings: EvalSettings, run: RunDir) -> list[str]:
    """List the settings' tasks that are there, and of which a finished run has no result."""
    found_tasks = tasks_from(settings)
    done = {result.key for result in read_results(run.results)}
    return [
        *(task.name for task in found_tasks.tasks if task.name not in done),
        *found_tasks.damaged,
    ]


def results_path_for(settings: EvalCommand) -> Path:
    """Return where `siftclip eval` keeps results: a file for each model, and each way to ask it.

    A run's own model has `eval_results.jsonl` in the run's directory, its checkpoints and other
    ways to ask it a folder each in `eval/` there. Other models have one in `eval/` in `output_dir`.
    Another way is another precision, or other class names or templates.
    """
    model = settings.model
    way = [*([] if model.weights == "auto" else [model.weights]), *_way(settings.eval)]
    run, file = RunDir(path=Path(model.name)), model.pretrained
    if run.has_model:
        if file is None and not way:
            return run.results
        parts = ["model" if file is None else Path(file).stem, *way]
        return run.path / "eval" / "-".join(parts) / run.results.name
    spec = [model.name, *([] if file is None else [file])]
    parts = [Path(part).name for part in spec] + way
    places = [str(Path(part).resolve()) for part in spec if Path(part).exists()]
    if places:  # of equal names in other folders, each has its own
        parts.append(identity_hash({"places": places})[:8])
    label = re.sub(r"[^\w.-]+", "-", "-".join(parts))
    return settings.common.output_root / "eval" / label / run.results.name


def _way(settings: EvalSettings) -> list[str]:
    """Describe how this differs from the standard way to ask a model, for a folder's name."""
    way = [] if settings.precision == "fp32" else [str(settings.precision)]
    texts = {"classnames": settings.classnames, "templates": settings.templates}
    if any(texts.values()):
        contents = {
            f"{option} {task}": read_text(file)
            for option, files in texts.items()
            for task, file in files.items()
        }
        way.append(f"prompts-{identity_hash(contents)[:8]}")
    return way


def _without_details(settings: EvalSettings, tasks: Sequence[Task], folder: Path) -> list[str]:
    """Find the tasks of which details are wanted that an earlier run has not written."""
    wanted = {"predictions.parquet": settings.predictions, "classes.csv": settings.details}
    return [
        task.name
        for task in tasks
        if any(
            is_wanted and may_have(task, ending) and not details_path(folder, task, ending).exists()
            for ending, is_wanted in wanted.items()
        )
    ]


def evaluation_device(trainer: TrainerSettings) -> str:
    """Return the GPU where there is one, unless the settings ask for the CPU."""
    wants_cpu = trainer.accelerator == "cpu"
    return "cuda" if torch.cuda.is_available() and not wants_cpu else "cpu"


def log_records(summary: Summary) -> dict[str, list[dict[str, Any]]]:
    """Return the tables of an evaluation, for loggers."""
    return {"eval/tasks": summary.records()}
