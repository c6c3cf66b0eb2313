"""Other seeds of a run: runs beside it with the same configuration, but for the seed."""

from __future__ import annotations

import logging
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from siftclip.errors import InputError
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.runtime.run_records import read_config

# What makes a method, see `training.run_identity`; the rest says where and how it is computed.
_METHOD = (
    *("pool.root", "features", "selector", "online", "data.shuffle_window_shards", "data.resize"),
    *("model", "loss", "optim", "scale", "budget", "trainer.precision"),
)
_SEED = "seed"
_RUN_NAME = re.compile(r"(.*)-s\d+-[0-9a-f]{8}")  # as training names its folders

log = logging.getLogger(__name__)


def run_of(results: Path) -> RunDir | None:
    """Find the finished run whose own model a results file is of, if it is of one."""
    run = RunDir(path=results.parent)
    is_run = results == run.results and run.config.is_file()
    return run if is_run and run.summary is not None else None


def same_method(first: RunDir, second: RunDir) -> bool:
    """Return whether two runs differ by the seed at most.

    Raises:
        InputError: a run's configuration or summary is damaged.
    """
    pools = [(run.summary or {}).get("pool") for run in (first, second)]
    configs = [read_config(run.config) for run in (first, second)]
    methods = [{name: _part(config, name) for name in _METHOD} for config in configs]
    return pools[0] == pools[1] and _equal(*methods, *(config.get(_SEED) for config in configs))


def other_seeds(run: RunDir) -> list[RunDir]:
    """Find the finished runs beside a run that differ from it by the seed alone, by seed.

    One of each seed, the first by name. What cannot be read is left out with a warning.
    """
    pattern = _RUN_NAME.fullmatch(run.path.resolve().name)
    runs: dict[int, RunDir] = {_seed_of(run): run}
    for folder in sorted(run.path.resolve().parent.iterdir()):
        name = _RUN_NAME.fullmatch(folder.name)
        if pattern is not None and (name is None or name[1] != pattern[1]):
            continue  # another selector, by its name
        try:
            other = run_of(RunDir(path=folder).results)
            if other is None or not other.results.is_file() or not same_method(run, other):
                continue
            runs.setdefault(_seed_of(other), other)
        except (InputError, OSError) as error:
            log.warning("%s is not looked at as another seed of %s: %s", folder, run.path, error)
    return [runs[seed] for seed in sorted(runs) if runs[seed] is not run]


def _seed_of(run: RunDir) -> int:
    """Return the seed of a run.

    Raises:
        InputError: its configuration is damaged, or has none.
    """
    path = run.config
    seed = read_config(path).get(_SEED)
    if not isinstance(seed, int):
        rule = "is not the configuration of a run: seed must be a whole number"
        raise InputError(f"{path} {rule}. Got {reprlib.repr(seed)}.")
    return seed


def _part(config: Mapping[str, Any], name: str) -> Any:
    node: Any = config
    for key in name.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _equal(first: Any, second: Any, seed: Any, other_seed: Any) -> bool:
    """Return whether two values are equal, where a `seed` may be the one of either run."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(
            (name == _SEED and (first[name], second[name]) == (seed, other_seed))
            or _equal(first[name], second[name], seed, other_seed)
            for name in first
        )
    if isinstance(first, Sequence) and isinstance(second, Sequence) and not isinstance(first, str):
        return len(first) == len(second) and all(
            _equal(x, y, seed, other_seed) for x, y in zip(first, second, strict=True)
        )
    return bool(first == second)
