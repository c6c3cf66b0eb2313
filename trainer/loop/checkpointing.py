"""Lightning callbacks: checkpoints by step, and an end of training between two steps on a signal.

A checkpoint has its name only once it is whole and on the disk:

    step-300.ckpt                 to continue from
    .step-400.ckpt.HOST-PID.tmp   being written; deleted at the next start if the writer was killed
    step-500.ckpt/                the same in parts, see `trainer.sharded_checkpoints`
    step-200.ckpt.damaged         could not be read at a start, see `siftclip.trainer.loop.resuming`
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint

from siftclip.errors import ParameterError, require_finite, require_int
from siftclip.trainer.loop.atomic_checkpoints import AtomicCheckpointIO
from siftclip.trainer.loop.background_checkpoints import BackgroundCheckpointIO
from siftclip.trainer.runtime.launch import TrainingStopped, stop_signals
from siftclip.trainer.runtime.run_dir import checkpoints_in
from siftclip.writing import delete

AGAIN_SECONDS = 10.0  # between two SIGTERMs, the second of which ends training at once
_UNFINISHED = ".step-*.ckpt.*.tmp"


def kept_steps(steps: Iterable[int], *, keep_last: int, keep_every_n_steps: int | None) -> set[int]:
    """Return the steps whose checkpoints stay: the last, and multiples of `keep_every_n_steps`."""
    ordered = sorted(steps)
    kept = set(ordered[-keep_last:])
    if keep_every_n_steps is not None:
        kept.update(step for step in ordered if step % keep_every_n_steps == 0)
    return kept


class StepCheckpoint(Checkpoint):
    """Writes `step-N.ckpt` every N steps, at the last step, and where training is told to stop.

    By time as well, if asked for. Clocks of ranks differ: one that is late makes all of them write,
    which they agree on every `agree_every_n_steps` steps, with an all-reduce of one number.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every_n_steps: int,
        every_minutes: float | None = None,
        keep_last: int = 1,
        keep_every_n_steps: int | None = None,
        background: bool = False,
        agree_every_n_steps: int = 10,
    ) -> None:
        """Set where, when and how many.

        Args:
            folder: of the checkpoints.
            every_n_steps: optimizer steps between two checkpoints.
            every_minutes: at most so long between two, and the steps until the ranks agree.
            keep_last: how many stay.
            keep_every_n_steps: those at its multiples stay too, a multiple of `every_n_steps`;
                None keeps no more.
            background: whether training continues while one is written, from a copy in memory.
            agree_every_n_steps: of several ranks, where `every_minutes` is set.

        Raises:
            InputError: a number is out of its range.
        """
        self.folder = Path(folder)
        self.every_n_steps = require_int("every_n_steps", every_n_steps, minimum=1, owner=self)
        if every_minutes is not None and require_finite("every_minutes", every_minutes) <= 0:
            raise ParameterError(
                "must be positive", owner=self, parameter="every_minutes", value=every_minutes
            )
        self.every_minutes = every_minutes
        self.keep_last = require_int("keep_last", keep_last, minimum=1, owner=self)
        self.keep_every_n_steps = keep_every_n_steps
        if keep_every_n_steps is not None:
            name = "keep_every_n_steps"
            if require_int(name, keep_every_n_steps, minimum=1, owner=self) % every_n_steps:
                raise ParameterError(
                    f"must be a multiple of every_n_steps={every_n_steps}, or no checkpoint is "
                    "there to be kept",
                    owner=self,
                    parameter=name,
                    value=keep_every_n_steps,
                )
        self.agree_every_n_steps = require_int(
            "agree_every_n_steps", agree_every_n_steps, minimum=1, owner=self
        )
        self._saved_step = self._timed_step = 0
        self._saved_at = 0.0
        self._background = BackgroundCheckpointIO(self._delete_old) if background else None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.strategy.checkpoint_io = self._background or AtomicCheckpointIO()
        if trainer.is_global_zero:
            for path in self.folder.glob(_UNFINISHED):
                delete(path)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # what training continues from is there already
        self._saved_step = self._timed_step = trainer.global_step
        self._saved_at = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        step = trainer.global_step
        due = step % self.every_n_steps == 0 or step == trainer.max_steps or trainer.should_stop
        due = due or self._is_late(trainer)
        # With several batches a step, the step is the same after all but one of them.
        if due and step != self._saved_step:
            self._saved_step = step
            self._saved_at = time.monotonic()
            trainer.save_checkpoint(self.folder / f"step-{step}.ckpt")
            if trainer.is_global_zero and self._background is None:
                self._delete_old()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._background is not None:
            self._background.wait()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if self._background is not None:
            with suppress(Exception):  # the exception that ends training says more
                self._background.wait()

    def _is_late(self, trainer: Trainer) -> bool:
        """Return whether the time is over, once for each step; all ranks get the same answer."""
        step = trainer.global_step
        if self.every_minutes is None or step == self._timed_step:
            return False
        self._timed_step = step
        late = time.monotonic() - self._saved_at >= 60 * self.every_minutes
        if trainer.world_size == 1:
            return late
        if step % self.agree_every_n_steps:
            return False
        return bool(largest_over_ranks(int(late), trainer.strategy.root_device))

    def _delete_old(self) -> None:
        steps = checkpoints_in(self.folder)
        kept = kept_steps(
            steps, keep_last=self.keep_last, keep_every_n_steps=self.keep_every_n_steps
        )
        for step, path in steps.items():
            if step not in kept:
                delete(path)


class StopOnSignal(Callback):
    """Ends training after the step in which a signal came, so that a checkpoint can be written.

    `stopped_by` is then that signal. It has to stand beside a StepCheckpoint, which Lightning calls
    after all other callbacks. A second SIGINT interrupts at once, and so does a second SIGTERM some
    seconds later: a step can be long.

    The ranks get a signal at different steps, or only one of them gets it, so they agree every
    `agree_every_n_steps` steps with an all-reduce of one number; one process alone stops at once.
    """

    def __init__(self, *, agree_every_n_steps: int = 10) -> None:
        self.agree_every_n_steps = require_int(
            "agree_every_n_steps", agree_every_n_steps, minimum=1
        )
        self.stopped_by: signal.Signals | None = None
        self._received = 0
        self._received_at = 0.0
        self._previous: dict[signal.Signals, Any] = {}
        self._seen_step = 0
        self._process = 0
        self._speaks = True

    def raise_if_stopped(self, step: int, total_steps: int) -> None:
        """Raise if a signal has ended `Trainer.fit`, which has reached a step. Call it afterwards.

        Raises:
            TrainingStopped: a signal has ended it.
        """
        if self.stopped_by is not None:
            raise TrainingStopped(self.stopped_by, place=f"at step {step} of {total_steps}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not earlier: Lightning puts its own handlers in place just before.
        self.stopped_by = None
        self._received = int(signal.SIGTERM) if trainer.received_sigterm else 0
        self._seen_step = trainer.global_step
        self._process = os.getpid()
        self._speaks = trainer.is_global_zero
        if threading.current_thread() is threading.main_thread():
            for number in stop_signals(os.environ):
                self._previous[number] = signal.signal(number, self._handle)
        _skip_lightnings_broadcast(trainer)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        step = trainer.global_step
        if step == self._seen_step or self.stopped_by is not None:
            return  # in the middle of a step of several batches
        self._seen_step = step
        if trainer.world_size == 1 or step % self.agree_every_n_steps == 0:
            self._decide(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.stopped_by is None:
            self._decide(trainer)
        self._restore()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, KeyboardInterrupt):
            # Lightning ignores SIGINT from here until it puts the handlers of the caller back
            self._previous.pop(signal.SIGINT, None)
        self._restore()

    def _decide(self, trainer: Trainer) -> None:
        received = self._received
        if trainer.world_size > 1:
            received = largest_over_ranks(received, trainer.strategy.root_device)
        if received:
            self.stopped_by = signal.Signals(received)
            trainer.should_stop = True

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            # Lightning's handler of SIGTERM would broadcast to ranks that may have ended by now, as
            # torchrun ends one rank when another has. Its teardown puts the caller's back.
            if number != signal.SIGTERM or self.stopped_by is None:
                signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked loader process has inherited the handler
        if number == signal.SIGINT == self._received:
            raise KeyboardInterrupt
        if number == signal.SIGTERM == self._received:
            if time.monotonic() - self._received_at < AGAIN_SECONDS:
                return  # launchers send it twice
            self._say("SIGTERM again: training ends in the middle of a step.")
            raise SystemExit(128 + number)
        if not self._received and self.stopped_by is None:
            self._received, self._received_at = number, time.monotonic()
            again = " A second one ends it at once." if number == signal.SIGINT else ""
            name = signal.Signals(number).name
            self._say(f"{name}: training stops after this step, with a checkpoint.{again}")

    def _say(self, text: str) -> None:
        if self._speaks:
            with suppress(OSError):  # nobody reads it
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{text}\n".encode())


def largest_over_ranks(number: int, device: torch.device) -> int:
    """Return the largest of the ranks' numbers. All ranks must call it."""
    tensor = torch.tensor(number, dtype=torch.int32, device=device)
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return int(tensor.item())


def _skip_lightnings_broadcast(trainer: Trainer) -> None:
    """Skip what Lightning 2.6 does at every step: broadcast whether rank 0 has got a SIGTERM.

    That is agreed here, and waiting at every step keeps the processor from working ahead.
    """
    loop = trainer.fit_loop.epoch_loop
    if hasattr(loop, "_broadcast_sigterm_tensor"):
        setattr(loop, "_broadcast_sigterm_tensor", lambda: None)  # noqa: B010 - not in all versions
