"""Callbacks of training that fail, for tests of what becomes of the other runs."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback


class Failing(Callback):
    """Fails at the first batch, as often as is said; `counter` counts the calls."""

    def __init__(self, counter: str, times: int, kill: bool = False) -> None:
        self.counter = Path(counter)
        self.times = times
        self.kill = kill

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        with self.counter.open("a") as file:
            file.write("x")
        if self.counter.stat().st_size <= self.times:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("a callback that fails")
        self.times = -1


class Hanging(Callback):
    """One rank does not come to its second step."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 1 and trainer.global_rank == self.rank:
            time.sleep(600)
