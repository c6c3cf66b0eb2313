"""The progress bar of training: in samples, with the loss that was logged last and the rate."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm


class TrainingBar(ProgressBar):
    """A bar on standard error that counts samples. It also replaces Lightning's own."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: tqdm[Any] | None = None

    def disable(self) -> None:
        """Show nothing; Lightning calls it on all ranks but the first."""
        self._enabled = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not self._enabled:
            return
        self._bar = tqdm(
            desc="train",
            total=pl_module.total_steps * pl_module.global_batch_size,
            initial=trainer.global_step * pl_module.global_batch_size,
            unit="sample",
            unit_scale=True,
            leave=False,
            dynamic_ncols=True,
            file=sys.stderr,
        )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if self._bar is None:
            return
        latest = pl_module.latest
        if "train/loss" in latest:
            shown = {
                "loss": f"{latest['train/loss']:.3f}",
                "wait": f"{latest['train/data_wait_fraction']:.0%}",
            }
            shown.update(_headline(pl_module.evaluated))
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(pl_module.global_batch_size)

    def on_train_end(self, *args: Any) -> None:
        self._close()

    def on_exception(self, *args: Any) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _headline(evaluated: dict[str, float]) -> dict[str, str]:
    """Return the first average of the last evaluation, or its first task."""
    names = sorted(evaluated, key=lambda name: "/average/" not in name)  # stable
    return {names[0].rpartition("/")[2]: f"{evaluated[names[0]]:.3f}"} if names else {}
