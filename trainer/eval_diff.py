"""The diff stage: two models' results on the same test sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from siftclip.eval.comparison import Comparison, compare_results
from siftclip.eval.results import KeptResults, TaskResult, read_kept, read_results
from siftclip.eval.safe_tables import write_csv_records
from siftclip.eval.tasks import require_names
from siftclip.selectors.errors import InputError, require_int
from siftclip.trainer.run_dir import RESULTS_NAME, RunDir
from siftclip.trainer.seed_runs import other_seeds, run_of, same_method
from siftclip.trainer.stages import plain


def diff_stage(config: DictConfig) -> Comparison:
    """Compare two results: run directories, or files `eval_results.jsonl`.

    Only the tasks of `eval.tasks` are compared, if it is set. Rows are written to `diff.output`,
    if it is set. Other seeds of the two are those that `diff.seeds_a` and `diff.seeds_b` name, or
    else the runs beside them with the same configuration.

    Raises:
        InputError: one is missing or has no results, or an option is wrong.
    """
    resamples = require_int("diff.resamples", config.diff.resamples, minimum=1)
    output = _output(config)
    files = {name: _results_file(f"diff.{name}", config.diff[name]) for name in _sides(config)}
    kept = {name: _read(config, name, file) for name, file in files.items()}
    a, b = _chosen(config, *(list(kept[name].results) for name in ("a", "b")))
    runs = {name: run_of(file) for name, file in files.items()}
    of_one_method = (
        runs["a"] is not None
        and runs["b"] is not None
        and runs["a"].path.resolve() != runs["b"].path.resolve()
        and same_method(runs["a"], runs["b"])
    )
    seeds = {name: _seeds(config, name, files, runs[name]) for name in files}
    comparison = replace(
        compare_results(
            a,
            b,
            plain(config.eval.groups),
            name_a=str(config.diff.a),
            name_b=str(config.diff.b),
            resamples=resamples,
            seeds_a=seeds["a"],
            seeds_b=[] if of_one_method else seeds["b"],  # those of a, once more
            same_method=of_one_method,
        ),
        failed={
            f"{name}: {failure.key}": failure.message
            for name, one in kept.items()
            for failure in one.failures
        },
    )
    if output is not None:
        write_csv_records(output, comparison.records())
    return comparison


def _sides(config: DictConfig) -> tuple[str, str]:
    for name in ("a", "b"):
        if OmegaConf.is_missing(config.diff, name):
            raise InputError(
                f"diff.{name} must name a run directory or its {RESULTS_NAME}: siftclip eval diff "
                "A B."
            )
    return "a", "b"


def _results_file(option: str, value: object) -> Path:
    """The results file that an option names."""
    path = Path(str(value))
    wanted = f"{option} must name a run directory or its {RESULTS_NAME}"
    if not path.exists():
        raise InputError(f"{wanted}. {path} does not exist.")
    file = path / RESULTS_NAME if path.is_dir() else path
    if not file.exists():
        raise InputError(f"{wanted}. {path} has no {RESULTS_NAME}: siftclip eval writes it.")
    if file.suffix != ".jsonl":  # the table beside it lacks what the metrics are made of
        raise InputError(f"{wanted}, which lies beside the other files of a result. Got {path}.")
    return file


def _read(config: DictConfig, name: str, file: Path) -> KeptResults:
    kept = read_kept(file)
    if not kept.results:
        raise InputError(f"diff.{name}={config.diff[name]!r} has no results in {file}.")
    return kept


def _seeds(
    config: DictConfig, name: str, files: Mapping[str, Path], run: RunDir | None
) -> list[list[TaskResult]]:
    """Results of other seeds of a side: of runs that are named, or that lie beside it."""
    option = f"diff.seeds_{name}"
    given = plain(config.diff[f"seeds_{name}"])
    compared = {file.resolve() for file in files.values()}
    if given is None:
        others = [] if run is None else [other.results for other in other_seeds(run)]
        return [read_results(file) for file in others if file.resolve() not in compared]
    named = [
        _results_file(option, value) for value in ([given] if isinstance(given, str) else given)
    ]
    places = [file.resolve() for file in named]
    if len({*places}) < len(places) or not compared.isdisjoint(places):
        raise InputError(
            f"{option} must name other runs than diff.a and diff.b, each once. Got {given}."
        )
    return [read_results(file) for file in named]


def _chosen(
    config: DictConfig, a: list[TaskResult], b: list[TaskResult]
) -> tuple[list[TaskResult], list[TaskResult]]:
    """The results of the tasks that `eval.tasks` names."""
    if config.eval.tasks is None:
        return a, b
    names = require_names("eval.tasks", plain(config.eval.tasks))
    if not names:
        raise InputError("eval.tasks must name at least one task, or be null for all.")
    known = dict.fromkeys(result.key for result in (*a, *b))
    unknown = [name for name in names if name not in known]
    if config.eval.suite is not None and len(unknown) == len(names):
        raise InputError(
            f"None of the {len(names)} tasks of eval={config.eval.suite} has a result: the results "
            f"are of {sorted(known)}."
        )
    if unknown and config.eval.suite is None:  # a suite may be there in part
        close = get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise InputError(
            f"eval.tasks must name tasks that have results: {sorted(known)}. "
            f"Got {unknown[0]!r}.{hint}"
        )
    return [one for one in a if one.key in names], [one for one in b if one.key in names]


def _output(config: DictConfig) -> Path | None:
    if config.diff.output is None:
        return None
    path = Path(str(config.diff.output))
    if path.suffix != ".csv" or path.is_dir():
        raise InputError(f"diff.output must be a file that ends with .csv, or null. Got {path}.")
    return path
