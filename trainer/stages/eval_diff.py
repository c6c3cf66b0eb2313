"""The diff stage: two models' results on the same test sets."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from siftclip.errors import InputError
from siftclip.eval.reports.comparison import PairedComparison, compare_results
from siftclip.eval.results.files import KeptResults, TaskResult, read_kept, read_results
from siftclip.eval.tasks.task import require_names
from siftclip.tables import write_csv_records
from siftclip.trainer.options.faults import options_of, under
from siftclip.trainer.runtime.run_dir import RESULTS_NAME, RunDir
from siftclip.trainer.runtime.seed_runs import other_seeds, run_of, same_method
from siftclip.trainer.settings.commands import DiffCommand
from siftclip.trainer.settings.evaluation import EvalSettings
from siftclip.trainer.settings.tools import DiffSettings

log = logging.getLogger(__name__)


def diff_stage(settings: DiffCommand) -> PairedComparison:
    """Compare two results: run directories, or files `eval_results.jsonl`.

    Only the tasks of `eval.tasks` are compared, if it is set. Rows are written to `diff.output`,
    if it is set. Other seeds of the two are those that `diff.seeds_a` and `diff.seeds_b` name, or
    else the runs beside them with the same configuration.

    Raises:
        InputError: one is missing or has no results, or an option is wrong.
    """
    diff = settings.diff
    output = _output(diff)
    sides = {"a": diff.a, "b": diff.b}
    files = {name: _results_file(f"diff.{name}", value) for name, value in sides.items()}
    kept = {name: _read(f"diff.{name}={sides[name]!r}", file) for name, file in files.items()}
    a, b = _chosen(settings.eval, *(list(kept[name].results) for name in sides))
    runs = {name: run_of(file) for name, file in files.items()}
    models = {name: _models(of_run.results) for name, of_run in kept.items()}
    of_one_method = (
        runs["a"] is not None
        and runs["b"] is not None
        and models["a"].isdisjoint(models["b"])
        and same_method(runs["a"], runs["b"])
    )
    seeds = _seeds(diff, files, runs, models["a"] | models["b"])
    if of_one_method:
        seeds = {"a": [*seeds["a"], *seeds["b"]], "b": []}
    elif not models["a"].isdisjoint(models["b"]):
        seeds = {"a": [], "b": []}  # one model has one seed
    with options_of(under("eval", "groups")):
        comparison = compare_results(
            a,
            b,
            settings.eval.groups,
            name_a=diff.a,
            name_b=diff.b,
            resamples=diff.resamples,
            seeds_a=seeds["a"],
            seeds_b=seeds["b"],
            same_method=of_one_method,
        )
    comparison = replace(
        comparison,
        failed={
            f"{name}: {failure.key}": failure.message
            for name, of_run in kept.items()
            for failure in of_run.failures
        },
    )
    if output is not None:
        write_csv_records(output, comparison.records())
    return comparison


def _results_file(option: str, value: str) -> Path:
    """Find the results file that an option names."""
    path = Path(value)
    wanted = f"{option} must name a run directory or its {RESULTS_NAME}"
    if not path.exists():
        raise InputError(f"{wanted}. {path} does not exist.")
    file = path / RESULTS_NAME if path.is_dir() else path
    if not file.exists():
        raise InputError(f"{wanted}. {path} has no {RESULTS_NAME}: siftclip eval writes it.")
    if file.suffix != ".jsonl":  # the table beside it lacks what the metrics are made of
        raise InputError(f"{wanted}, which lies beside the other files of a result. Got {path}.")
    return file


def _read(given: str, file: Path) -> KeptResults:
    kept = read_kept(file)
    if not kept.results:
        raise InputError(f"{given} has no results in {file}.")
    return kept


def _models(results: Sequence[TaskResult]) -> set[str]:
    """Return the models that results are of, as far as they say."""
    return {result.model for result in results if result.model is not None}


def _seeds(
    diff: DiffSettings,
    files: Mapping[str, Path],
    runs: Mapping[str, RunDir | None],
    compared: set[str],
) -> dict[str, list[list[TaskResult]]]:
    """Read results of other seeds of each side: of runs that are named, or that lie beside it.

    Each model counts once: a copy of a run is no other seed.

    Args:
        diff: of the command.
        files: of the results, by side.
        runs: that they are of, if they are.
        compared: the models of the two sides.
    """
    seeds: dict[str, list[list[TaskResult]]] = {}
    places = {file.resolve() for file in files.values()}
    models = {*compared}
    named = {"a": diff.seeds_a, "b": diff.seeds_b}
    for name, run in runs.items():
        option, given = f"diff.seeds_{name}", named[name]
        if given is not None:
            names = [given] if isinstance(given, str) else given
            others = [_results_file(option, value) for value in names]
        else:
            others = [] if run is None else [other.results for other in other_seeds(run)]
            others = [file for file in others if file.resolve() not in places]
        seeds[name] = []
        for file in others:
            results = read_results(file)
            known = file.resolve() in places or not models.isdisjoint(_models(results))
            if given is not None and known:
                raise InputError(
                    f"{option} must name other runs than diff.a and diff.b, and each model once. "
                    f"{file.parent} is there already, or is a copy of one that is."
                )
            if given is not None and run is not None:
                _warn_of_another_method(option, run, file)
            if not known:
                seeds[name].append(results)
                places.add(file.resolve())
                models |= _models(results)
    return seeds


def _warn_of_another_method(option: str, run: RunDir, file: Path) -> None:
    other = run_of(file)
    if other is not None and not same_method(run, other):
        log.warning(
            "%s: the configuration of %s differs from that of %s in more than the seed, so that "
            "it may be of another method",
            option,
            other.path,
            run.path,
        )


def _chosen(
    settings: EvalSettings, a: list[TaskResult], b: list[TaskResult]
) -> tuple[list[TaskResult], list[TaskResult]]:
    """Choose the results of the tasks that `eval.tasks` names."""
    if settings.tasks is None:
        return a, b
    names = require_names("eval.tasks", settings.tasks)
    if not names:
        raise InputError("eval.tasks must name at least one task, or be null for all.")
    known = dict.fromkeys(result.key for result in (*a, *b))
    unknown = [name for name in names if name not in known]
    if settings.suite is not None and len(unknown) == len(names):
        raise InputError(
            f"None of the {len(names)} tasks of eval={settings.suite} has a result: the results "
            f"are of {sorted(known)}."
        )
    if unknown and settings.suite is None:  # a suite may be there in part
        close = get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise InputError(
            f"eval.tasks must name tasks that have results: {sorted(known)}. "
            f"Got {unknown[0]!r}.{hint}"
        )
    return [task for task in a if task.key in names], [task for task in b if task.key in names]


def _output(diff: DiffSettings) -> Path | None:
    if diff.output is None:
        return None
    path = Path(diff.output)
    if path.suffix != ".csv" or path.is_dir():
        raise InputError(f"diff.output must be a file that ends with .csv, or null. Got {path}.")
    return path
