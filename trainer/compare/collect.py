"""Reads the runs of a comparison back from their directories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from omegaconf import DictConfig

from siftclip.datamodules.pool import read_metadata_uids
from siftclip.datamodules.selection import Selection, read_selection
from siftclip.datamodules.uids import UidTable
from siftclip.eval.aggregates import result_averages
from siftclip.eval.results import read_results
from siftclip.selectors.errors import InputError
from siftclip.trainer.environment import Environment, environments
from siftclip.trainer.run_dir import RunDir
from siftclip.trainer.stages import plain


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmRun:
    """One run of a comparison."""

    arm: str
    seed: int
    run: RunDir


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All that a report shows.

    `results` has a row a run and metric: arm, seed, task, metric, value, low, high, samples, run.
    Averages are tasks called `average/NAME`, main metrics have the metric `main_metric`.
    `runs` has a row a run: arm, seed, and what its summary says. `truth` has a row an arm and a
    column a kind of sample: the share of the selected samples, mean over seeds.
    """

    name: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    columns: tuple[str, ...]  # what the main table shows
    results: pd.DataFrame
    runs: pd.DataFrame
    overlap: pd.DataFrame  # Jaccard index of the arms' selections, of the first seed
    truth: pd.DataFrame | None
    settings: dict[str, Any]
    environments: dict[str, list[Environment]]  # of the sessions of each run, by arm and seed


def collect(config: DictConfig, runs: Sequence[ArmRun]) -> Comparison:
    """Read results, summaries and selections of finished runs."""
    groups: dict[str, list[str]] = plain(config.eval.groups)
    results = pd.DataFrame([record for run in runs for record in _result_records(run, groups)])
    averages = [f"average/{group}" for group in groups]
    tasks = [task for task in dict.fromkeys(results["task"]) if not task.startswith("average/")]
    columns = _columns(plain(config.compare.columns), averages, tasks)
    selections = {(run.arm, run.seed): read_selection(run.run.path) for run in runs}
    first = [run for run in runs if run.seed == runs[0].seed]
    truth_path = config.compare.truth
    return Comparison(
        name=str(config.compare.name),
        arms=tuple(dict.fromkeys(run.arm for run in runs)),
        seeds=tuple(dict.fromkeys(run.seed for run in runs)),
        columns=columns,
        results=results,
        runs=pd.DataFrame([_run_record(run) for run in runs]),
        overlap=_overlap({run.arm: selections[run.arm, run.seed] for run in first}),
        truth=None if truth_path is None else _truth(Path(truth_path), selections, runs),
        settings={
            key: plain(config[key])
            for key in ("pool", "features", "model", "optim", "scale", "budget")
        },
        environments={f"{run.arm} s{run.seed}": environments(run.run.path) for run in runs},
    )


def _columns(wanted: list[str], averages: list[str], tasks: list[str]) -> tuple[str, ...]:
    known = [*averages, *tasks]
    chosen = [f"average/{name}" if f"average/{name}" in averages else name for name in wanted]
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise InputError(f"compare.columns must be among {known}. Got {unknown[0]!r}.")
    return tuple(chosen or known)


def _result_records(run: ArmRun, groups: dict[str, list[str]]) -> list[dict[str, Any]]:
    results = read_results(run.run.results)
    base = {"arm": run.arm, "seed": run.seed}
    records = []
    for result in results:
        for metric, value in result.metrics.items():
            is_main = metric == "main_metric" and result.interval is not None
            low, high = result.interval if is_main and result.interval else (None, None)
            records.append(
                {
                    **base,
                    "task": result.key,
                    "metric": metric,
                    "value": value,
                    "low": low,
                    "high": high,
                    "samples": result.samples,
                    "run": str(run.run.path),
                }
            )
    for group, average in result_averages(results, groups).items():
        records.append(
            {
                **base,
                "task": f"average/{group}",
                "metric": "main_metric",
                "value": average.value if average.complete else None,  # a part cannot be compared
                "low": None,
                "high": None,
                "samples": None,
                "run": str(run.run.path),
            }
        )
    return records


def _run_record(run: ArmRun) -> dict[str, Any]:
    summary = run.run.summary
    if summary is None:
        raise RuntimeError(f"{run.run.path} is not finished")
    return {"arm": run.arm, "run": str(run.run.path), **summary}


def _overlap(selections: dict[str, Selection]) -> pd.DataFrame:
    """The Jaccard index of each pair of selections, over distinct uids."""
    table = pd.DataFrame(index=list(selections), columns=list(selections), dtype=np.float64)
    for name, selection in selections.items():
        index = UidTable.build(selection.uids)
        for other_name, other in selections.items():
            common = int((index.find(other.uids) >= 0).sum())
            union = len(selection.uids) + len(other.uids) - common
            table.loc[name, other_name] = common / union
    return table


def _truth(
    path: Path, selections: dict[tuple[str, int], Selection], runs: Sequence[ArmRun]
) -> pd.DataFrame:
    """The share of each kind of sample among the selected ones, by arm, mean over seeds.

    Of a run that selects at every step, among those that it was trained on at the steps that its
    log describes.
    """
    uids, valid, _ = read_metadata_uids(path)
    names = pq.read_schema(path).names
    if "kind" not in names:
        raise InputError(f"compare.truth={str(path)!r} must have a column 'kind'. It has {names}.")
    kinds = pq.read_table(path, columns=["kind"])["kind"].to_pandas()[valid].reset_index(drop=True)
    table = UidTable.build(uids[valid])
    rows = {}
    for (arm, seed), selection in selections.items():
        found = table.find(selection.uids)
        kept = kinds.iloc[found[found >= 0]]
        weights = pd.Series(selection.multiplicities[found >= 0], index=kept.index)
        rows[arm, seed] = weights.groupby(kept).sum() / len(selection)
    for run in runs:
        chosen = run.run.shares_chosen()
        if chosen:
            rows[run.arm, run.seed] = pd.Series(chosen)
    shares = pd.DataFrame(rows).T.fillna(0.0)
    shares.index.names = ["arm", "seed"]
    order = list(dict.fromkeys(arm for arm, _ in selections))
    return shares.groupby("arm").mean().loc[order]
