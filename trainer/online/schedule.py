"""Filter ratio, temperature and uniform share over a run, and the sizes of its super-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np

from siftclip.errors import InputError, require_finite, require_int

# A number, or [[share of training, value], ...] with ascending shares.
Course: TypeAlias = float | Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """What holds at one optimiser step."""

    filter_ratio: float  # the share of the super-batch that is not trained on; 0: plain training
    temperature: float | None  # of the draws; None: the selector's own
    uniform_fraction: float  # the share of the sub-batch that is drawn uniformly


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How in-loop selection runs over training. The share of training at step s is s/total_steps.

    During the warm-up, and outside the window from `start` to `stop`, the filter ratio is 0: what
    is loaded is trained on. A uniform draw from a super-batch would give samples of the same
    distribution, but load and decode samples that nobody looks at.

    Raises:
        InputError: a value is out of range.

    Example:
        >>> from siftclip.trainer import Schedule
        >>> schedule = Schedule(filter_ratio=[[0.0, 0.0], [0.5, 0.8]], warmup_steps=10)
        >>> [schedule.at(step, total_steps=100).filter_ratio for step in (5, 25, 75)]
        [0.0, 0.4, 0.8]
        >>> schedule.super_batch_samples(100, sub_batch=64, multiple_of=64)[[5, 25, 75]]
        array([ 64, 128, 320])
    """

    filter_ratio: Course  # in [0, 1)
    temperature: Course | None = None  # at least 0
    uniform_fraction: Course = 0.0  # in [0, 1]
    start: float = 0.0  # share of training before which selection is off
    stop: float = 1.0  # share of training from which on selection is off
    warmup_steps: int = 0  # steps without selection at the beginning of the run

    def __post_init__(self) -> None:
        _check_course("filter_ratio", self.filter_ratio, "in the range [0, 1)", below=1.0)
        if self.temperature is not None:
            _check_course("temperature", self.temperature, "at least 0, or null")
        _check_course("uniform_fraction", self.uniform_fraction, "in the range [0, 1]", most=1.0)
        for name in ("start", "stop"):
            _check_share(f"online.schedule.{name}", getattr(self, name))
        if self.start >= self.stop:
            raise InputError(
                "online.schedule.start must be below online.schedule.stop. Got "
                f"{self.start!r} and {self.stop!r}."
            )
        require_int("online.schedule.warmup_steps", self.warmup_steps, minimum=0)

    def at(self, step: int, total_steps: int) -> StepSettings:
        """Return what holds at optimiser step `step` (0, 1, ...) of a run of `total_steps`."""
        steps = np.asarray([step])
        shares = steps / total_steps
        temperature = self.temperature
        return StepSettings(
            filter_ratio=float(self._filter_ratios(steps, total_steps)[0]),
            temperature=(
                None if temperature is None else float(course_values(temperature, shares)[0])
            ),
            uniform_fraction=float(course_values(self.uniform_fraction, shares)[0]),
        )

    def super_batch_samples(
        self, total_steps: int, sub_batch: int, multiple_of: int, steps: range | None = None
    ) -> np.ndarray:
        """Compute the size of the super-batch of every step: int64 [total_steps], or [len(steps)].

        It is sub_batch / (1 - filter ratio), rounded to the nearest multiple (up from the middle),
        which is never below the sub-batch.

        Args:
            total_steps: of the run, at least 1.
            sub_batch: samples of a step that are trained on, over all ranks.
            multiple_of: what a super-batch is made of: the number of groups times the samples that
                the loader gives at once. The sub-batch is a multiple of it, too.
            steps: of the run, consecutive, if not all are wanted.

        Raises:
            ValueError: the sub-batch is no such multiple.
        """
        if sub_batch % multiple_of:
            raise ValueError(f"sub_batch={sub_batch} is not a multiple of {multiple_of}")
        wanted = self.exact_super_batches(total_steps, sub_batch, steps)
        parts = np.floor(wanted / multiple_of + 0.5).astype(np.int64)
        return parts * multiple_of

    def exact_super_batches(
        self, total_steps: int, sub_batch: int, steps: range | None = None
    ) -> np.ndarray:
        """Compute `super_batch_samples` before they are rounded: float64."""
        steps = range(total_steps) if steps is None else steps
        wanted = np.arange(steps.start, steps.stop)
        return sub_batch / (1.0 - self._filter_ratios(wanted, total_steps))

    def largest_uniform_fraction(self) -> float:
        """Return the largest uniform share of a sub-batch at any time."""
        return _largest(self.uniform_fraction)

    def largest_filter_ratio(self) -> float:
        """Return the largest share of a super-batch that is not trained on, at any time."""
        return _largest(self.filter_ratio)

    def check_length(self, total_steps: int) -> None:
        """Check that a run of `total_steps` steps selects at one of them.

        Raises:
            InputError: selection is off at every step.
        """
        if not self._is_on(np.arange(total_steps), total_steps).any():
            raise InputError(
                f"online.schedule.warmup_steps={self.warmup_steps} with the window from "
                f"start={self.start!r} to stop={self.stop!r} leaves none of the {total_steps} "
                "steps of the run to select at. Lower warmup_steps, or widen the window."
            )

    def _filter_ratios(self, steps: np.ndarray, total_steps: int) -> np.ndarray:
        values = course_values(self.filter_ratio, steps / total_steps)
        return np.where(self._is_on(steps, total_steps), values, 0.0)

    def _is_on(self, steps: np.ndarray, total_steps: int) -> np.ndarray:
        shares = steps / total_steps
        return (shares >= self.start) & (shares < self.stop) & (steps >= self.warmup_steps)


def course_values(course: Course, shares: np.ndarray) -> np.ndarray:
    """Compute the values of a course at `shares` of training, float [n]: float64 [n].

    Between two knots the value is on the straight line between theirs; before the first and after
    the last it is theirs.
    """
    if isinstance(course, (int, float)):
        return np.full(len(shares), float(course))
    knots = np.asarray(course, dtype=np.float64)
    values: np.ndarray = np.interp(shares, knots[:, 0], knots[:, 1])
    return values


def _largest(course: Course) -> float:
    if isinstance(course, (int, float)):
        return float(course)
    return max(value for _, value in course)


def _check_share(option: str, value: object) -> float:
    share = require_finite(option, value)
    if not 0.0 <= share <= 1.0:
        raise InputError(f"{option} must be a share of training in [0, 1]. Got {value!r}.")
    return share


def _check_course(
    name: str, course: object, rule: str, *, below: float = np.inf, most: float = np.inf
) -> None:
    """Refuse a course whose values are negative, at least `below`, or more than `most`."""
    option = f"online.schedule.{name}"
    if isinstance(course, (int, float)):
        values: list[object] = [course]
    else:
        values = _knot_values(option, course)
    for value in values:
        number = require_finite(option, value)
        if not (0.0 <= number < below and number <= most):
            raise InputError(f"{option} must be {rule}. Got {value!r}.")


def _knot_values(option: str, course: object) -> list[object]:
    if (
        not isinstance(course, Sequence)
        or isinstance(course, str)
        or not course
        or not all(isinstance(knot, (list, tuple)) and len(knot) == 2 for knot in course)
    ):
        raise InputError(
            f"{option} must be a number, or knots [[share of training, value], ...] such as "
            f"[[0.0, 0.0], [0.5, 0.8]]. Got {course!r}."
        )
    shares = [_check_share(option, knot[0]) for knot in course]
    if any(later <= earlier for earlier, later in pairwise(shares)):
        raise InputError(f"{option} must have knots with ascending shares. Got {shares}.")
    return [knot[1] for knot in course]
