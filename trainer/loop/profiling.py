"""What some steps of a run spend their time on, by torch's profiler."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile

from siftclip.errors import require_int
from siftclip.files import write_text
from siftclip.writing import make_folder, move, temporary_folder

log = logging.getLogger(__name__)

TRACE_NAME, TABLE_NAME = "trace.json.gz", "operators.txt"
_ROWS = 40  # of the table


class ProfileSteps(Callback):
    """Writes a trace of some steps and a table of their operators, on the first rank.

        profile/trace.json.gz   for Perfetto (ui.perfetto.dev) or chrome://tracing
        profile/operators.txt   operators by the time that they took themselves

    Steps are counted from where this process begins, so that a run that continues is profiled
    again.
    """

    def __init__(self, folder: Path, *, skip: int = 10, steps: int = 10) -> None:
        """Set where and when.

        Args:
            folder: of both files.
            skip: steps before, in which things warm up.
            steps: that are profiled.

        Raises:
            InputError: a number is out of its range.
        """
        self.folder = folder
        self.skip = require_int("skip", skip, minimum=0, owner=self)
        self.steps = require_int("steps", steps, minimum=1, owner=self)
        self._first = 0
        self._profiler: profile | None = None
        self._is_done = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first = trainer.global_step + self.skip
        self._is_done = not trainer.is_global_zero

    def on_train_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if self._is_done or self._profiler is not None or trainer.global_step < self._first:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities)
        self._profiler.start()

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if self._profiler is not None and trainer.global_step >= self._first + self.steps:
            self._write()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._profiler is not None:
            self._write()
        elif not self._is_done:
            log.warning("nothing was profiled: training ended before step %d", self._first + 1)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _write(self) -> None:
        assert self._profiler is not None
        profiler, self._profiler, self._is_done = self._profiler, None, True
        profiler.stop()
        make_folder(self.folder)
        with temporary_folder(".trace-", self.folder) as folder:
            profiler.export_chrome_trace(str(folder / TRACE_NAME))
            move(folder / TRACE_NAME, self.folder / TRACE_NAME)
        by_time = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by_time, row_limit=_ROWS)
        write_text(self.folder / TABLE_NAME, f"{table}\n")
        log.info("profiled steps are in %s", self.folder)
