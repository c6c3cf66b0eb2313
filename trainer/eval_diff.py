"""The diff stage: two models' results on the same test sets."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from siftclip.eval.comparison import Comparison, compare_results
from siftclip.eval.results import TaskResult, read_results
from siftclip.selectors.errors import InputError, require_int
from siftclip.trainer.stages import plain

RESULTS_NAME = "eval_results.jsonl"


def diff_stage(config: DictConfig) -> Comparison:
    """Compare two results: run directories, or files `eval_results.jsonl`.

    Raises:
        InputError: one is missing or has no results.
    """
    a, b = (_read(config, name) for name in ("a", "b"))
    resamples = require_int("diff.resamples", config.diff.resamples, minimum=1)
    return compare_results(
        a,
        b,
        plain(config.eval.groups),
        name_a=str(config.diff.a),
        name_b=str(config.diff.b),
        resamples=resamples,
    )


def _read(config: DictConfig, name: str) -> list[TaskResult]:
    if OmegaConf.is_missing(config.diff, name):
        raise InputError(
            f"diff.{name} must name a run directory or its {RESULTS_NAME}: siftclip eval diff A B."
        )
    path = Path(config.diff[name])
    file = path / RESULTS_NAME if path.is_dir() else path
    results = read_results(file)
    if not results:
        raise InputError(f"diff.{name}={config.diff[name]!r} has no results in {file}.")
    return results
