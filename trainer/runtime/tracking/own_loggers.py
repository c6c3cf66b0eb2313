"""Loggers of the user's, by `trainer.loggers`: the same keys as ours, and faults told by option."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import Logger

from siftclip.errors import InputError, full_name_of
from siftclip.reading import in_one_line
from siftclip.trainer.runtime.tracking.continued import Records
from siftclip.trainer.runtime.tracking.metric_names import Axes, with_open_clip_names

# What Lightning and Siftclip call
_METHODS = (
    "log_metrics",
    "log_hyperparams",
    "log_graph",
    "save",
    "after_save_checkpoint",
    "finalize",
)


def adapted(loggers: Sequence[Logger], records: Records) -> list[Logger]:
    """Have loggers of any class take what our own ones do, and return them.

    They stay what they are, since callbacks ask for their class: methods of the objects change.

    Args:
        loggers: of `trainer.loggers`, in its order.
        records: of the log so far, from where the axes continue.
    """
    for number, logger in enumerate(loggers):
        for name in _METHODS:
            method = getattr(logger, name)
            if name == "log_metrics":
                method = _with_all_keys(method, records)
            setattr(logger, name, _told(method, logger, f"trainer.loggers.{number}"))
    return [*loggers]


def _with_all_keys(log_metrics: Callable[..., None], records: Records) -> Callable[..., None]:
    axes = Axes()
    for record in records:
        axes.at(record, record["step"])

    @functools.wraps(log_metrics)
    def log(metrics: Mapping[str, Any], step: int | None = None, **others: Any) -> None:
        values = with_open_clip_names(metrics)
        if step is not None:
            values |= axes.at(metrics, step)
        log_metrics(values, step=step, **others)

    return log


def _told(method: Callable[..., Any], logger: Logger, option: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return method(*arguments, **named)
        except InputError:
            raise
        except Exception as error:  # a class of somebody else may fail in any way
            raise InputError(
                f"{option}: {full_name_of(type(logger))} cannot log: {type(error).__name__}: "
                f"{in_one_line(error)}. Correct its arguments, or leave it out; the same command "
                "then continues."
            ) from error

    return call
