"""The Lightning module: an open_clip model, an objective, a step, metrics every N steps."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from siftclip.datamodules.models.typed import as_clip
from siftclip.datamodules.models.weights import CONFIG_KEY
from siftclip.datamodules.pairs.datamodule import SelectedPairs
from siftclip.datamodules.streaming.batches import StepBatch
from siftclip.datamodules.streaming.datamodule import StreamDataModule
from siftclip.datamodules.streaming.order import derive_generator
from siftclip.errors import InputError, ParameterError, require_finite, require_int
from siftclip.purposes import GeneratorPurpose
from siftclip.ranks import OneRank, ProcessGroup
from siftclip.trainer.loop.gradient_log import gradient_histograms
from siftclip.trainer.loop.meter import WindowMeter, peak_memory_gb
from siftclip.trainer.loop.plain_batches import step_batch_of
from siftclip.trainer.losses import SoftmaxLoss
from siftclip.trainer.models.sharding import (
    is_sharded,
    mixed_precision,
    number_by_model,
    shard_model,
    unsynced_shards,
    whole_gradients,
)
from siftclip.trainer.online.controller import Online
from siftclip.trainer.online.in_loop import Chosen
from siftclip.trainer.optim.ema import ModelEma
from siftclip.trainer.optim.gradients import (
    Objective,
    StepContext,
    compute_gradients,
    running_statistics,
)
from siftclip.trainer.optim.optimizer import clamp_logit_scale, make_optimizer
from siftclip.trainer.optim.schedules import lr_factor
from siftclip.trainer.optim.update import (
    average_over_ranks,
    clip_gradients,
    gradient_norm,
    restore_unless,
    step_if_finite,
)
from siftclip.trainer.runtime.fsdp_strategy import FsdpStrategy
from siftclip.trainer.runtime.loggers import log_histograms
from siftclip.trainer.runtime.rank_agreement import RankAgreement
from siftclip.trainer.runtime.tracking.continued import Histogram
from siftclip.trainer.settings.optim import OptimSettings

log = logging.getLogger(__name__)

# Judged together, as FIRST_SAMPLES of the loader: fp16 skips some steps while its scale settles.
FIRST_STEPS = 2000


class ClipTraining(LightningModule):
    """Trains an open_clip model, in Siftclip's own commands and in any other `Trainer`.

    `ClipTraining(model)` alone trains with open_clip's recipe for CLIP. A batch comes from a
    `StreamDataModule`, from `SelectedPairs`, or from any loader of (images, tokens).

    Optimisation is manual, because micro-batches share their negatives. Learning rates are a
    function of the step and are set before it, as open_clip does.

    Metrics gather on the device and go to the loggers every `log_every_n_steps` steps, under
    open_clip's names: nothing is copied to the host in between.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        objective: Objective | None = None,
        optim: OptimSettings | None = None,
        total_steps: int | None = None,
        global_batch_size: int | None = None,
        seed: int = 0,
        log_every_n_steps: int | None = None,
        max_skipped_fraction: float = 0.01,
        online: Online | None = None,
        model_config: Mapping[str, Any] | None = None,
        log_gradients_every_n_steps: int | None = None,
    ) -> None:
        """Set what is trained.

        Args:
            model: the bare open_clip model.
            objective: what is minimised; None: CLIP's loss. State of it belongs to the checkpoints.
            optim: the optimiser, the schedule and the average of the weights; None: open_clip's.
            total_steps: of the run, which the schedule follows; None: what the trainer is to do.
            global_batch_size: samples per step over all ranks; None: those of the first batch.
            seed: of dropout.
            log_every_n_steps: steps between two records; None: the trainer's number.
            max_skipped_fraction: of the steps may have gradients that are not finite.
            online: selection while training.
            model_config: of the model, kept in its checkpoints: a file of weights alone does not
                say its activation or preprocessing.
            log_gradients_every_n_steps: steps between two histograms of the gradient of each
                weight, before it is clipped; None: none.

        Raises:
            InputError: a number is out of its range.
        """
        super().__init__()
        objective = Objective(loss=SoftmaxLoss()) if objective is None else objective
        optim = OptimSettings() if optim is None else optim
        self.automatic_optimization = False
        model.output_dict = True  # type: ignore[assignment]  # open_clip's switch of what forward returns
        self.model = model
        self.ema = None if optim.ema_decay is None else ModelEma(model, optim.ema_decay)
        self.loss = objective.loss
        self.objective = objective
        self.optim = optim
        self._total_steps, self._global_batch_size = total_steps, global_batch_size
        self.seed = seed
        if log_every_n_steps is not None:
            require_int("log_every_n_steps", log_every_n_steps, minimum=1, owner=self)
        self._log_every_n_steps = log_every_n_steps
        if log_gradients_every_n_steps is not None:
            name = "log_gradients_every_n_steps"
            require_int(name, log_gradients_every_n_steps, minimum=1, owner=self)
        self._log_gradients_every_n_steps = log_gradients_every_n_steps
        if not 0 <= require_finite("max_skipped_fraction", max_skipped_fraction, owner=self) <= 1:
            raise ParameterError(
                "must be in the range [0, 1]",
                owner=self,
                parameter="max_skipped_fraction",
                value=max_skipped_fraction,
            )
        self.max_skipped_fraction = max_skipped_fraction
        self.online = online
        self.model_config = model_config
        self.agreement = RankAgreement()
        self.latest: dict[str, float] = {}  # what the loggers got last; the bar shows its loss
        self.evaluated: dict[str, float] = {}  # what EvaluateDuring found last; the bar shows it
        self._skipped_before = 0.0  # in the processes before this one
        self.meter = WindowMeter(torch.device("cpu"))
        self._statistics: list[Tensor] = []
        self._gradients: dict[str, Histogram] = {}  # of the step, to be logged behind its record
        # In each step DDP would send these from rank 0 to the others, where they are equal anyway.
        self._ddp_params_and_buffers_to_ignore = [
            name for name, _ in self.named_buffers() if name.startswith(("loss.", "ema."))
        ]

    # ---- how long, and of what ------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        """Steps of the whole run; of the trainer if nothing else is said, from its start on.

        Raises:
            InputError: the trainer has no end that is known.
        """
        if self._total_steps is None:
            data, steps = self._data, self.trainer.estimated_stepping_batches
            if data is not None:
                steps = min(steps, data.total_steps)  # its stream ends there
            if not 0 < steps < math.inf:
                raise InputError(
                    "ClipTraining: the learning rate follows the steps of the whole run, and the "
                    f"trainer's are not known. Got {steps}. Give Trainer(max_steps=...), or "
                    "ClipTraining(..., total_steps=...)."
                )
            self._total_steps = int(steps)
        return self._total_steps

    @property
    def global_batch_size(self) -> int:
        """Samples of a step over all ranks; if nothing else is said, known from the first batch."""
        if self._global_batch_size is None:
            raise RuntimeError("the first batch, which says it, has not come yet")
        return self._global_batch_size

    @property
    def _logs_every(self) -> int:
        """Steps between two records; 0: only the last step has one."""
        if self._log_every_n_steps is None:
            return self.trainer.log_every_n_steps  # type: ignore[attr-defined,no-any-return]  # Lightning sets it elsewhere
        return self._log_every_n_steps

    # ---- what Lightning asks for ---------------------------------------------------------------

    def configure_model(self) -> None:
        strategy = self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy):
            policy = mixed_precision(
                str(self.trainer.precision),
                strategy.reduce_dtype if isinstance(strategy, FsdpStrategy) else torch.float32,
            )
            shard_model(self.model, strategy.device_mesh, policy)
            if self.ema is not None:
                shard_model(self.ema.averaged, strategy.device_mesh, policy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = make_optimizer(self.model, self.optim, fused=True)
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
        return optimizer

    def on_train_start(self) -> None:
        # Not on_fit_start: sharded models are restored after it.
        self._statistics = running_statistics(self.model)
        self.meter = WindowMeter(self.device)
        self.meter.skipped += self._skipped_before
        if self.online is not None:
            averaged = None if self.ema is None else self.ema.averaged
            self.online.begin(self.device, model=self.model, averaged=averaged)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self._global_batch_size is None:
            parts = self._step_batch(batch).micro_batches
            self._global_batch_size = self._world_size * sum(len(part.rows) for part in parts)
        if self.global_step == 0 and self.global_rank == 0:
            log.info(
                "chance level of the contrastive loss: ln(%d) = %.3f",
                self.global_batch_size,
                math.log(self.global_batch_size),
            )
        if self.online is None:
            self.meter.waited()
            return
        scoring, selection = self.online.take_reselection_seconds()
        self.meter.waited(scoring_seconds=scoring, selection_seconds=selection)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        batch, data = self._step_batch(batch), self._data
        if data is not None:
            for micro_batch in batch.micro_batches:
                data.account(micro_batch)
        optimizer = self.optimizers()
        bare: torch.optim.Optimizer = optimizer.optimizer  # type: ignore[union-attr]
        factor = lr_factor(self.optim, self.global_step, self.total_steps)
        for group in bare.param_groups:
            group["lr"] = group["base_lr"] * factor
        bare.zero_grad(set_to_none=True)
        chosen = self._choose(batch)
        batch.keep(chosen.batches)
        self.agreement.note(self.global_step, read=batch.digest, trained=chosen.digest)
        before = [buffer.clone() for buffer in self._statistics]
        # Dropout of a step is a function of (seed, step, rank), also after a restart.
        generator = derive_generator(
            self.seed, self.global_step, self.global_rank, GeneratorPurpose.STEP
        )
        terms = compute_gradients(
            self.model,
            self.objective,
            chosen.batches,
            StepContext(
                rank=self.global_rank,
                world_size=self._world_size,
                backward=self.manual_backward,
                unsynced=self._unsynced,
                seeds=generator.integers(2**63, size=len(chosen.batches)).tolist(),
            ),
            features=chosen.learner_features,
        )
        if is_sharded(self):
            average_over_ranks(whole_gradients(self.model))
        if self.online is not None:
            self.online.trained(
                chosen.batches,
                step=self.global_step,
                sample_losses=self.loss.sample_losses,
                lr_factor=factor,
                rank=self.global_rank,
                world_size=self._world_size,
            )
        finite = self._update(optimizer, bare, terms)
        restore_unless(finite, self._statistics, before)
        step = self.global_step
        if self.ema is not None:
            self.ema.update(self.model, step)
        if self.agreement.is_due(step, self.total_steps):
            self.agreement.check(OneRank() if self._world_size == 1 else ProcessGroup(self.device))
        # Here, before the checkpoint of this step: a run that is killed after that would lack it.
        every = self._logs_every
        if (every and step % every == 0) or step == self.total_steps:
            self._log_window(step)
        if self._gradients:
            log_histograms(self.trainer.loggers, self._gradients, step=step)
            self._gradients = {}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.meter.stepped()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["skipped_steps"] = float(self.meter.skipped)
        if "optimizer_states" in checkpoint and self._has_torchs_numbers:  # not of weights alone
            states = zip(checkpoint["optimizer_states"], self.trainer.optimizers, strict=True)
            checkpoint["optimizer_states"] = [
                number_by_model(state, optimizer, self) for state, optimizer in states
            ]
        if self.model_config is not None:
            checkpoint[CONFIG_KEY] = dict(self.model_config)
        if self.online is not None:
            checkpoint["online"] = self.online.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._skipped_before = checkpoint["skipped_steps"]
        if self.online is not None:
            self.online.load_state_dict(checkpoint["online"])

    # ---- the step ------------------------------------------------------------------------------

    def _step_batch(self, batch: Any) -> StepBatch:
        data = self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning types it loosely
        pairs = isinstance(data, SelectedPairs)
        return step_batch_of(batch, data.normalization if pairs else None)

    def _choose(self, batch: StepBatch) -> Chosen:
        """Choose what this rank trains on, of what it has read."""
        if self.online is None:
            return Chosen(batches=batch.micro_batches)
        chosen = self.online.choose(
            batch.micro_batches,
            step=self.global_step,
            rank=self.global_rank,
            world_size=self._world_size,
        )
        if chosen.marks is not None:
            self.meter.chose(*chosen.marks)
        return chosen

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size

    def _update(
        self, optimizer: Any, bare: torch.optim.Optimizer, terms: dict[str, Tensor]
    ) -> Tensor:
        """Take the step if its gradients are finite; whether they are, as a scalar of bool."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            scaler.unscale_(bare)
        parameters = [parameter for group in bare.param_groups for parameter in group["params"]]
        norm = gradient_norm(parameters)
        finite = torch.isfinite(norm)
        every = self._log_gradients_every_n_steps
        if every is not None and (self.global_step + 1) % every == 0 and finite:
            self._gradients = gradient_histograms(self.model.named_parameters())
        if self.optim.grad_clip_norm is not None:
            clip_gradients(parameters, norm, self.optim.grad_clip_norm)
        if scaler is not None:
            optimizer.step()  # the scaler skips by itself
        else:
            step_if_finite(bare, finite, optimizer.step)
        clamp_logit_scale(self.model)
        self.meter.add(terms, norm, finite)
        return finite

    def _unsynced(self) -> AbstractContextManager[Any]:
        """Keep the gradients of backward passes on this rank, inside the block."""
        wrapped = self.trainer.strategy.model
        if isinstance(wrapped, DistributedDataParallel):
            return wrapped.no_sync()
        return unsynced_shards(self.model) if is_sharded(self) else nullcontext()

    @property
    def _has_torchs_numbers(self) -> bool:
        """Whether parameters are numbered by the optimiser in what Lightning saves of it."""
        strategy = self.trainer.strategy
        in_parts = isinstance(strategy, FsdpStrategy) and strategy.sharded_checkpoints
        return in_parts or not is_sharded(self)

    @property
    def _data(self) -> StreamDataModule | None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning types it loosely
        return data if isinstance(data, StreamDataModule) else None

    # ---- what is logged ------------------------------------------------------------------------

    def _log_window(self, step: int) -> None:
        # Every rank takes part in the reduction; only rank 0's loggers write.
        means = self.meter.close(lambda sums: self.trainer.strategy.reduce(sums, reduce_op="mean"))
        rate = self.global_batch_size / means["batch_time"]
        scale = float(as_clip(self.model).logit_scale.detach().exp())
        bias = getattr(self.model, "logit_bias", None)
        self.latest = {
            **{f"train/{name}": value for name, value in means.items()},
            "train/lr": self.optim.lr * lr_factor(self.optim, step - 1, self.total_steps),
            "train/scale": scale,  # its name in open_clip 3, and in 4
            "train/logit_scale": scale,
            **({} if bias is None else {"train/logit_bias": float(bias.detach())}),
            "train/samples_per_second": rate,
            "train/samples_per_second_per_gpu": rate / self.trainer.world_size,
            "train/samples_seen": float(step * self.global_batch_size),
            "train/peak_memory_gb": peak_memory_gb(self.device),
        }
        data = self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning types it loosely
        if isinstance(data, StreamDataModule | SelectedPairs):
            self.latest["data/bad_samples"] = float(data.counts.faults.samples)
            self.latest["data/retries"] = float(data.counts.retries)
            self.latest["data/copies_fraction"] = data.copies_fraction
        if self.online is not None:
            self.latest.update(self.online.metrics(step))
        for logger in self.trainer.loggers:
            logger.log_metrics(self.latest, step=step)
        self._check_skipped(step, int(means["skipped_steps"]))

    def _check_skipped(self, step: int, skipped: int) -> None:
        allowed = self.max_skipped_fraction * max(step, FIRST_STEPS)
        if skipped > allowed:
            raise ParameterError(
                f"is exceeded: {skipped} of {step} steps had gradients that are not finite and "
                f"were skipped, and {self.max_skipped_fraction} allows {allowed:.0f}",
                owner=self,
                parameter="max_skipped_fraction",
                way_out="Lower the learning rate (lr), lengthen its warm-up (warmup_steps), clip "
                "the gradients (grad_clip_norm=1), or train with the precision bf16-mixed or "
                "32-true.",
            )
