"""The Lightning module: one open_clip model, one contrastive step, metrics every N steps."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor, nn

from siftclip.datamodules.batches import Batch
from siftclip.datamodules.order import derive_generator
from siftclip.datamodules.streaming import StreamDataModule
from siftclip.trainer.contrastive import contrastive_loss
from siftclip.trainer.optim import AdamWConfig, clamp_logit_scale, make_optimizer, warmup_cosine

_PURPOSE_STEP = 4


class ClipTraining(LightningModule):
    """Trains an open_clip model on the batches of a `StreamDataModule`.

    Metrics gather on the device and go to the loggers every `log_every_n_steps` steps, under
    open_clip's names: nothing is copied to the host in between.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optim: AdamWConfig,
        total_steps: int,
        global_batch_size: int,
        seed: int,
        log_every_n_steps: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.optim = optim
        self.total_steps = total_steps
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.log_every_n_steps = log_every_n_steps
        self.latest: dict[str, float] = {}  # what the loggers got last; the bar shows its loss
        self._loss_sum = torch.zeros(())
        self._steps = 0
        self._data_seconds = 0.0
        self._window_start = self._step_end = 0.0

    def on_fit_start(self) -> None:
        self._loss_sum = torch.zeros((), device=self.device)
        self._window_start = self._step_end = time.perf_counter()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self._data_seconds += time.perf_counter() - self._step_end
        # Dropout of a step is a function of (seed, step, rank), also after a restart.
        generator = derive_generator(self.seed, self.global_step, self.global_rank, _PURPOSE_STEP)
        torch.manual_seed(int(generator.integers(2**63)))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        data = self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning types it loosely
        if isinstance(data, StreamDataModule):
            data.account(batch)
        loss = contrastive_loss(
            self.model.encode_image(batch.images, normalize=True),  # type: ignore[operator]
            self.model.encode_text(batch.tokens, normalize=True),  # type: ignore[operator]
            self.model.logit_scale.exp(),  # type: ignore[operator]
            rank=self.global_rank,
            world_size=self.trainer.world_size,
        )
        self._loss_sum += loss.detach()
        self._steps += 1
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        clamp_logit_scale(self.model)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self._step_end = time.perf_counter()
        step = self.global_step
        if step % self.log_every_n_steps == 0 or step == self.total_steps:
            self._log_window(step)

    def _log_window(self, step: int) -> None:
        # Every rank takes part in the reduction; only rank 0's loggers write.
        loss = self.trainer.strategy.reduce(self._loss_sum / self._steps, reduce_op="mean")
        seconds = max(self._step_end - self._window_start, 1e-9)
        rate = self._steps * self.global_batch_size / seconds
        self.latest = {
            "train/loss": float(loss),
            "train/contrastive_loss": float(loss),
            "train/lr": self._last_lr(),
            "train/scale": float(self.model.logit_scale.detach().exp()),  # type: ignore[operator]
            "train/data_time": self._data_seconds / self._steps,
            "train/batch_time": seconds / self._steps,
            "train/data_wait_fraction": min(1.0, self._data_seconds / seconds),
            "train/samples_per_second": rate,
            "train/samples_per_second_per_gpu": rate / self.trainer.world_size,
            "train/samples_seen": float(step * self.global_batch_size),
        }
        data = self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning types it loosely
        if isinstance(data, StreamDataModule):
            self.latest["data/bad_samples"] = float(data.faults.samples)
            self.latest["data/retries"] = float(data.retries)
        for logger in self.trainer.loggers:
            logger.log_metrics(self.latest, step=step)
        self._loss_sum.zero_()
        self._steps, self._data_seconds = 0, 0.0
        self._window_start = self._step_end

    def _last_lr(self) -> float:
        """The learning rate of the step that has just been taken."""
        return self.optim.lr * self._lr_factor(max(0, self.global_step - 1))

    def _lr_factor(self, step: int) -> float:
        return warmup_cosine(
            step, warmup_steps=self.optim.warmup_steps, total_steps=self.total_steps
        )

    def configure_optimizers(self) -> Any:
        fused = self.trainer.precision != "16-mixed"
        optimizer = make_optimizer(self.model, self.optim, fused=fused)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class TrainingBar(TQDMProgressBar):
    """Lightning's bar on standard error, with the loss that was logged last and the sample rate."""

    def init_train_tqdm(self) -> Tqdm:
        return Tqdm(
            desc="train",
            unit="step",
            disable=self.is_disabled,
            leave=False,
            dynamic_ncols=True,
            file=sys.stderr,
        )

    def on_train_epoch_start(self, trainer: Any, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        # There is one pass of `max_steps` batches, so Lightning's "Epoch 0" would say nothing.
        self.train_progress_bar.set_description("train")

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        latest = pl_module.latest
        if not latest:
            return {}
        return {
            "loss": f"{latest['train/loss']:.3f}",
            "samples/s": f"{latest['train/samples_per_second']:.0f}",
            "wait": f"{latest['train/data_wait_fraction']:.0%}",
        }
