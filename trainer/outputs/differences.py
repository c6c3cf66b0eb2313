"""In what two runs differ: samples, losses, weights and results, from their directories alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siftclip.datamodules.selection.algebra import CountedUids, combine
from siftclip.datamodules.selection.selection import Selection
from siftclip.eval.results.files import TaskResult
from siftclip.files import sha256_of
from siftclip.trainer.runtime.environment import Environment

LOSS = "train/loss"


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueDifference:
    """A named value that is another one here."""

    name: str
    there: Any
    here: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionDifference:
    """Two selections."""

    is_same: bool  # samples, repetitions and weights
    samples_there: int
    samples_here: int
    only_there: int  # distinct samples
    only_here: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LossDifference:
    """The losses of two logs, at the steps that both have."""

    steps: int  # that were compared
    first: int | None  # the first step that differs; None: none does
    largest: float  # relative difference
    at_step: int  # of the largest
    unmatched: int  # steps of one log alone


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultDifference:
    """The main metric of a task; None where one run has no value."""

    task: str
    metric: str
    there: float | None
    here: float | None


def environment_differences(there: Environment, here: Environment) -> list[ValueDifference]:
    """Compare what two sessions were computed with, by name."""
    return [
        ValueDifference(name=name, there=there.get(name), here=here.get(name))
        for name in dict.fromkeys([*here, *there])
        if there.get(name) != here.get(name)
    ]


def compare_selections(there: Selection, here: Selection) -> SelectionDifference:
    """Compare the samples of two selections."""
    ours = CountedUids(here.uids, here.multiplicities)
    theirs = CountedUids(there.uids, there.multiplicities)
    return SelectionDifference(
        is_same=there.digest == here.digest,
        samples_there=len(there),
        samples_here=len(here),
        only_there=len(combine("difference", theirs, ours).uids),
        only_here=len(combine("difference", ours, theirs).uids),
    )


def compare_losses(
    there: Sequence[Mapping[str, Any]], here: Sequence[Mapping[str, Any]]
) -> LossDifference:
    """Compare the losses of two logs, step by step; the last record of a step counts."""
    theirs, ours = _losses(there), _losses(here)
    both = sorted(theirs.keys() & ours.keys())
    first, largest, at_step = None, 0.0, 0
    for step in both:
        difference = _relative(theirs[step], ours[step])
        if difference > 0 and first is None:
            first = step
        if difference > largest:
            largest, at_step = difference, step
    return LossDifference(
        steps=len(both),
        first=first,
        largest=largest,
        at_step=at_step,
        unmatched=len(theirs.keys() ^ ours.keys()),
    )


def _losses(records: Sequence[Mapping[str, Any]]) -> dict[int, float | None]:
    return {record["step"]: record[LOSS] for record in records if LOSS in record}


def _relative(one: float | None, other: float | None) -> float:
    """Return the relative difference of two losses; None is one that was infinite or NaN."""
    if one is None or other is None:
        return 0.0 if one is other else float("inf")
    largest = max(abs(one), abs(other))
    return abs(one - other) / largest if largest else 0.0


def compare_files(there: Path, here: Path) -> ValueDifference | None:
    """Compare two files by their SHA-256, None for one that is missing; None if both are equal."""
    digests = [sha256_of(path) if path.is_file() else None for path in (there, here)]
    if digests[0] is not None and digests[0] == digests[1]:
        return None
    return ValueDifference(name=here.name, there=digests[0], here=digests[1])


def compare_results(
    there: Sequence[TaskResult], here: Sequence[TaskResult]
) -> list[ResultDifference]:
    """Compare the main metrics of all tasks that one of two runs has a result of."""
    theirs, ours = ({result.key: result for result in results} for results in (there, here))
    return [
        ResultDifference(
            task=key,
            metric=_name_of(ours.get(key), theirs.get(key)),
            there=theirs[key].main_metric if key in theirs else None,
            here=ours[key].main_metric if key in ours else None,
        )
        for key in dict.fromkeys([*theirs, *ours])
    ]


def _name_of(*results: TaskResult | None) -> str:
    names = (result.main_metric_name for result in results if result is not None)
    return next((name for name in names if name is not None), "")
