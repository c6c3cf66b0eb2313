"""What loggers of Siftclip's own have in common: their run continues after a restart."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger

from siftclip.trainer.runtime.tracking.metric_names import (
    SELECTION_PREFIX,
    Axes,
    is_of_training,
    with_open_clip_names,
)

Records = Sequence[Mapping[str, Any]]  # rows of a table, all with the same keys

_OF_THE_FILE = ("step", "time")


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """How often values fall into equal parts of their range."""

    counts: Sequence[int]
    low: float
    high: float

    @property
    def edges(self) -> list[float]:
        """The ends of the parts, one more than these."""
        parts = len(self.counts)
        return [self.low + (self.high - self.low) * n / parts for n in range(parts + 1)]


class ContinuedLogger(Logger):
    """A logger that has each value of a step once, over any number of starts of a run.

    A start repeats the steps since its checkpoint, and the process before it may have been killed
    before its last records had left it. So a logger leaves out what it has already, and is given
    the log once at the beginning, `catch_up`.
    """

    @abstractmethod
    def log_metrics(
        self, metrics: Mapping[str, Any], step: int | None = None, *, time: float | None = None
    ) -> None:
        """Log numbers of a step, without those that earlier starts have logged.

        Args:
            metrics: by name, see `siftclip.trainer.runtime.tracking.metric_names`.
            step: of the run.
            time: seconds since 1970; None: now.
        """

    @abstractmethod
    def log_records(self, key: str, records: Records, step: int) -> None:
        """Log a table; values are numbers, texts, None, or images of Pillow."""

    @abstractmethod
    def end(self, status: str) -> None:
        """Close the run, so that another one of this process begins anew.

        Args:
            status: "finished", or "stopped" of one that is to be continued, or "failed".
        """

    def log_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        """Log how values are distributed, where there is a place for that."""

    def catch_up(self, records: Records) -> None:
        """Log what the log of a run has and this logger lacks; in the order of the log.

        What is known of the selection was logged before the first step.
        """
        for record in records:
            values = {
                key: value
                for key, value in record.items()
                if key not in _OF_THE_FILE and not key.startswith(SELECTION_PREFIX)
            }
            self.log_metrics(values, record["step"], time=record.get("time"))


@dataclass(slots=True)
class LastSteps:
    """The last step of each key that a logger has: what it lacks is behind it.

    A logger gets its values in the order of their steps, so that what it has of a key has no gaps.
    """

    of: dict[str, int] = field(default_factory=dict)

    def add(self, key: str, step: int) -> None:
        """Take note of a value."""
        self.of[key] = max(step, self.of.get(key, step))

    def lacks(self, key: str, step: int) -> bool:
        """Return whether there is no value of a key at a step."""
        return step > self.of.get(key, -1)


class ScalarLogger(ContinuedLogger):
    """A logger that keeps a curve for each key, by step."""

    before: LastSteps  # what earlier starts have logged
    axes: Axes

    @rank_zero_only
    def log_metrics(
        self, metrics: Mapping[str, Any], step: int | None = None, *, time: float | None = None
    ) -> None:
        step = 0 if step is None else step
        axes = self.axes.at(metrics, step)
        values = with_open_clip_names(metrics) | (axes if is_of_training(metrics) else {})
        new = {
            key: float("nan") if value is None else value
            for key, value in values.items()
            if self.before.lacks(key, step)
        }
        if new:
            self.write_scalars(new, step, time)

    @abstractmethod
    def write_scalars(self, values: Mapping[str, float], step: int, time: float | None) -> None:
        """Write values of a step, at least one; the parameters are those of `log_metrics`."""
