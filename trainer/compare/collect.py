"""Reads the runs of a comparison back from their directories.

What a run lacks is a row without a value that says why, so that no mean is of fewer seeds than the
others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from siftclip.datamodules.index.uids import UidTable
from siftclip.datamodules.pool.metadata import read_labels
from siftclip.datamodules.selection.selection import Selection, read_selection
from siftclip.errors import InputError
from siftclip.eval.reports.report import (
    average_chance,
    chance_level,
    interval_note,
    results_by_key,
)
from siftclip.eval.results.aggregates import group_members, result_averages
from siftclip.eval.results.files import MAIN_METRIC, KeptResults, TaskResult, read_kept
from siftclip.eval.significance.resampling import average_interval
from siftclip.tables import listed
from siftclip.trainer.compare.run_notes import ArmRun
from siftclip.trainer.compare.significance import (
    ColumnTests,
    Place,
    compare_columns,
    member_replicates,
)
from siftclip.trainer.options.faults import options_of, under
from siftclip.trainer.runtime.environment import Environment, environments
from siftclip.trainer.runtime.run_dir import RunDir
from siftclip.trainer.settings.commands import CompareCommand
from siftclip.trainer.settings.kept_config import OF_THE_MACHINE


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """What a comparison lacks, and why: the value of a task, or of all tasks of a run."""

    arm: str
    seed: int
    task: str | None  # None: the whole run
    reason: str
    failed: bool  # whether it should be there; else it was not evaluated, or is not defined

    def text(self) -> str:
        """Format in one line."""
        place = f"{self.arm}, seed {self.seed}"
        return (
            f"{place}: {self.reason}"
            if self.task is None
            else (f"{place}: no value of {self.task}: {self.reason}")
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmComparison:
    """All that a report shows.

    `results` has one row per run and metric: arm, seed, task, metric, value, low, high, chance,
    samples, run, note. Averages are tasks called `average/NAME`, main metrics have the metric
    `main_metric`. Each arm has a row for each seed and task, without a value where there is none,
    and with the reason as its note. `runs` has one row per finished run: arm, seed, and what its
    summary says. `truth` has one row per arm and one column per kind of sample: its share of the
    selected samples, mean over seeds, NaN where a run is missing.
    """

    name: str
    arms: tuple[str, ...]
    seeds: Mapping[str, tuple[int, ...]]  # by arm
    baseline: str  # the arm that the others are compared with
    again: str | None  # the arm that is the baseline with other seeds
    columns: tuple[str, ...]  # what the main table shows
    results: pd.DataFrame
    runs: pd.DataFrame
    overlap: pd.DataFrame  # Jaccard index of the arms' selections, of the first seed; NaN: no run
    truth: pd.DataFrame | None
    settings: dict[str, Any]
    environments: dict[str, list[Environment]]  # of the sessions of each run, by arm and seed
    tests: Mapping[str, ColumnTests]  # by task and `average/NAME`
    missing: tuple[Missing, ...] = ()
    logs: Mapping[Place, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    selections: Mapping[str, Selection] = field(default_factory=dict)  # by arm, of the first seed


def collect(settings: CompareCommand, runs: Sequence[ArmRun]) -> ArmComparison:
    """Read results, summaries and selections of runs.

    Args:
        settings: of the comparison; its arms and seeds are those that should be there.
        runs: those that there are, also unfinished and failed ones.

    Raises:
        InputError: no run is finished, or a file of a run is damaged.
    """
    groups, compare = settings.eval.groups, settings.compare
    seeds: dict[str, tuple[int, ...]] = {arm: tuple(compare.seeds) for arm in compare.arms}
    for run in runs:
        seeds[run.arm] = tuple(dict.fromkeys([*seeds.get(run.arm, ()), run.seed]))
    arms = tuple(seeds)
    baseline = next(iter(arms)) if compare.baseline is None else compare.baseline
    finished = [(run, directory) for run in runs if (directory := run.finished) is not None]
    if not finished:
        reasons = [f"{run.arm}, seed {run.seed}: {run.failure}" for run in runs if run.failure]
        why = f" {listed(reasons[:1])}" if reasons else ""
        raise InputError(f"compare.name={compare.name}: none of {len(runs)} runs is finished.{why}")
    kept = {(run.arm, run.seed): read_kept(directory.results) for run, directory in finished}
    by_run = {place: results_by_key(of_run.results) for place, of_run in kept.items()}
    names = [*dict.fromkeys(key for by_key in by_run.values() for key in by_key)]
    names += [
        failure.key
        for of_run in kept.values()
        for failure in of_run.failures
        if failure.key not in names
    ]
    names = [*dict.fromkeys(names)]
    averages = [f"average/{group}" for group in groups]
    columns = _columns([*compare.columns], averages, names)
    with options_of(under("eval", "groups")):
        members = group_members(groups)
        drawn = member_replicates(
            by_run, [*names, *(m for group in members.values() for m in group)]
        )
        tests = compare_columns(by_run, drawn, seeds, baseline, names, members, first=columns[0])
        results, missing = _results(seeds, runs, kept, drawn, names, members)
    selections = {(run.arm, run.seed): read_selection(at.path) for run, at in finished}
    truth = None
    if compare.truth is not None:
        truth = _truth(Path(compare.truth), selections, finished)
        complete = [arm for arm in arms if all((arm, seed) in selections for seed in seeds[arm])]
        truth = truth.reindex(complete).reindex(list(arms))
    first = {arm: selections[arm, of[0]] for arm, of in seeds.items() if (arm, of[0]) in selections}
    return ArmComparison(
        name=compare.name,
        arms=arms,
        seeds=seeds,
        baseline=baseline,
        again=next((arm for arm in arms if arm not in compare.arms), None),
        columns=columns,
        results=results,
        runs=pd.DataFrame([_run_record(run, directory) for run, directory in finished]),
        overlap=_overlap(first).reindex(index=list(arms), columns=list(arms)),
        truth=truth,
        settings={
            group: _of_no_machine(group, settings.composed.values[group])
            for group in ("pool", "features", "model", "optim", "scale", "budget")
        },
        environments={
            f"{run.arm} s{run.seed}": environments(run.run.path)
            for run in runs
            if run.run is not None
        },
        tests=tests,
        missing=missing,
        logs={(run.arm, run.seed): at.records() for run, at in finished},
        selections=first,
    )


def _of_no_machine(group: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what says where something is written, or how this machine works."""
    return {k: v for k, v in values.items() if f"{group}.{k}" not in OF_THE_MACHINE}


def _results(
    seeds: Mapping[str, Sequence[int]],
    runs: Sequence[ArmRun],
    kept: Mapping[Place, KeptResults],
    drawn: Mapping[Place, Mapping[str, np.ndarray]],
    names: Sequence[str],
    groups: Mapping[str, Sequence[str]],
) -> tuple[pd.DataFrame, tuple[Missing, ...]]:
    """Collect the rows of all arms with all seeds, see `ArmComparison`, and what they lack."""
    by_place = {(run.arm, run.seed): run for run in runs}
    rows: list[dict[str, Any]] = []
    missing: list[Missing] = []
    longest = max(map(len, seeds.values()))
    places = [
        (arm, of_arm[number])
        for number in range(longest)
        for arm, of_arm in seeds.items()
        if number < len(of_arm)
    ]
    for arm, seed in places:
        run = by_place.get((arm, seed))
        at = None if run is None or run.run is None else str(run.run.path)
        base = {"arm": arm, "seed": seed, "run": at}
        if (arm, seed) in kept:
            task_rows, lacking = _rows_of_run(kept[arm, seed], names, groups, drawn[arm, seed])
            missing += [
                Missing(arm=arm, seed=seed, task=task, reason=reason, failed=failed)
                for task, reason, failed in lacking
            ]
        else:
            reason = _why_not(run)
            tasks = [*names, *(f"average/{group}" for group in groups)]
            task_rows = [_empty_row(task, reason) for task in tasks]
            missing.append(Missing(arm=arm, seed=seed, task=None, reason=reason, failed=True))
        rows += [{**base, **row} for row in task_rows]
    order = [
        *("arm", "seed", "task", "metric", "value", "low", "high", "chance", "samples", "run"),
        "note",
    ]
    return pd.DataFrame(rows, columns=order), tuple(missing)


def _why_not(run: ArmRun | None) -> str:
    """Say why a run has no results."""
    if run is not None and run.failure:
        return f"failed: {run.failure}"
    return "there is no run" if run is None or run.run is None else "the run is not finished"


def _rows_of_run(
    kept: KeptResults,
    names: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    drawn: Mapping[str, np.ndarray],
) -> tuple[list[dict[str, Any]], list[tuple[str, str, bool]]]:
    """Build rows for all tasks and averages, and list tasks with no value: name, reason, failed."""
    by_key = results_by_key(kept.results)
    failed = {failure.key: f"failed: {failure.message}" for failure in kept.failures}
    rows: list[dict[str, Any]] = []
    lacking = []
    for name in names:
        result = by_key.get(name)
        if result is None:
            reason = failed.get(name, "not evaluated")
            rows.append(_empty_row(name, reason))
            lacking.append((name, reason, name in failed))
            continue
        reason = ""
        if result.main_metric is None and result.main_metric_name is not None:
            reason = result.note or "not defined on these samples"
            lacking.append((name, reason, bool(result.note)))
        rows += _result_rows(result, reason)
    for group, average in result_averages(by_key.values(), groups).items():
        row = _empty_row(f"average/{group}", "")
        if average.complete:  # a part cannot be compared
            row["value"], row["chance"] = average.value, average_chance(groups[group], by_key)
            row["low"], row["high"] = average_interval(drawn, groups[group]) or (None, None)
            row["note"] = interval_note(groups[group], by_key) or None
        else:
            row["note"] = f"without {', '.join(average.missing)}"
        rows.append(row)
    return rows, lacking


def _empty_row(task: str, note: str) -> dict[str, Any]:
    empty = dict.fromkeys(("value", "low", "high", "chance", "samples"))
    return {"task": task, "metric": MAIN_METRIC, **empty, "note": note or None}


def _result_rows(result: TaskResult, note: str) -> list[dict[str, Any]]:
    rows = []
    for metric, value in result.metrics.items():
        is_main = metric == MAIN_METRIC
        row = _empty_row(result.key, note if is_main else "")
        if is_main and result.interval is not None:
            row["low"], row["high"] = result.interval
        chance = chance_level(result, metric)
        rows.append(
            {**row, "metric": metric, "value": value, "chance": chance, "samples": result.samples}
        )
    return rows


def _columns(wanted: list[str], averages: list[str], tasks: list[str]) -> tuple[str, ...]:
    known = [*averages, *tasks]
    chosen = [f"average/{name}" if f"average/{name}" in averages else name for name in wanted]
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise InputError(f"compare.columns must be among {known}. Got {unknown[0]!r}.")
    return tuple(chosen or known)


def _run_record(run: ArmRun, at: RunDir) -> dict[str, Any]:
    return {"run": str(at.path), **at.shown_summary, "arm": run.arm, "seed": run.seed}


def _overlap(selections: dict[str, Selection]) -> pd.DataFrame:
    """Compute the Jaccard index of each pair of selections, over distinct uids."""
    table = pd.DataFrame(index=list(selections), columns=list(selections), dtype=np.float64)
    for name, selection in selections.items():
        index = UidTable.build(selection.uids)
        for other_name, other in selections.items():
            common = int((index.find(other.uids) >= 0).sum())
            union = len(selection.uids) + len(other.uids) - common
            table.loc[name, other_name] = common / union
    return table


def _truth(
    path: Path,
    selections: dict[tuple[str, int], Selection],
    finished: Sequence[tuple[ArmRun, RunDir]],
) -> pd.DataFrame:
    """Compute the share of each kind among the selected samples, by arm, mean over its runs.

    Of a run that selects at every step, among those that it was trained on at the steps that its
    log describes.
    """
    uids, kinds = read_labels(path, "kind")
    table = UidTable.build(uids)
    rows = {}
    for (arm, seed), selection in selections.items():
        places = table.find(selection.uids)
        kept = kinds.iloc[places[places >= 0]]
        weights = pd.Series(selection.multiplicities[places >= 0], index=kept.index)
        rows[arm, seed] = weights.groupby(kept).sum() / len(selection)
    for run, directory in finished:
        chosen = directory.shares_chosen()
        if chosen:
            rows[run.arm, run.seed] = pd.Series(chosen)
    shares = pd.DataFrame(rows).T.fillna(0.0)
    shares.index.names = ["arm", "seed"]
    order = list(dict.fromkeys(arm for arm, _ in selections))
    return shares.groupby("arm").mean().loc[order]
