"""A small model that is trained beside the learner, on the same samples, and scores in its place.

The idea of ActiveCLIP (arXiv 2312.05328): scoring with a model the size of a small reference costs
a fraction of scoring with the learner.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from siftclip.datamodules.streaming.batches import Batch
from siftclip.trainer.losses import SoftmaxLoss
from siftclip.trainer.online.scoring import resized_images
from siftclip.trainer.optim.gradients import (
    Objective,
    StepContext,
    compute_gradients,
    running_statistics,
)
from siftclip.trainer.optim.optimizer import clamp_logit_scale, make_optimizer
from siftclip.trainer.optim.update import (
    average_over_ranks,
    clip_gradients,
    gradient_norm,
    restore_unless,
    step_if_finite,
)
from siftclip.trainer.settings.optim import OptimSettings


class OnlineScorer:
    """An open_clip model with its optimiser. It is no part of the trained module.

    Every rank holds an equal copy: gradients are averaged over ranks here.
    """

    def __init__(self, model: nn.Module, optim: OptimSettings, *, image_size: int) -> None:
        """Set what is trained.

        Args:
            model: an open_clip model, with the tokenizer of the learner.
            optim: its optimiser, which is the learner's: rate and schedule, decay, clipping, and
                skipped steps. Layer decay and the average of the weights are the learner's alone,
                and so are patterns of `no_decay` that match none of this model's parameters.
            image_size: of its images, to which those of the learner are resized.
        """
        model.output_dict = True  # type: ignore[assignment]  # open_clip's switch of what forward returns
        self.model = model
        self.image_size = image_size
        self._objective = Objective(loss=SoftmaxLoss())
        names = [name for name, _ in model.named_parameters()]
        self._optim = replace(
            optim,
            image_layer_decay=None,
            text_layer_decay=None,
            ema_decay=None,
            no_decay=tuple(
                pattern
                for pattern in optim.no_decay
                if any(fnmatchcase(name, pattern) for name in names)
            ),
        )
        self._optimizer: torch.optim.Optimizer | None = None
        self._restored: dict[str, Any] | None = None

    def on_device(self, device: torch.device) -> nn.Module:
        """Move the model to the device of the images."""
        if self._optimizer is None:
            self.model.to(device)
            self._optimizer = make_optimizer(self.model, self._optim, fused=True)
            for group in self._optimizer.param_groups:
                group["base_lr"] = group["lr"]
            if self._restored is not None:
                self.model.load_state_dict(self._restored["model"])
                self._optimizer.load_state_dict(self._restored["optimizer"])
        return self.model

    def step(
        self,
        batches: Sequence[Batch],
        *,
        lr_factor: float,
        seeds: Sequence[int],
        rank: int,
        world_size: int,
    ) -> Tensor:
        """Train on what the learner trains on, and return the loss, a scalar.

        Args:
            batches: micro-batches of this rank.
            lr_factor: of the learning rate at this step.
            seeds: of dropout, one a micro-batch.
            rank: of this process.
            world_size: number of ranks.
        """
        model = self.on_device(batches[0].images.device).train()
        optimizer = self._optimizer
        if optimizer is None:
            raise RuntimeError("the scorer has no optimiser yet")
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor
        optimizer.zero_grad(set_to_none=True)
        statistics = running_statistics(model)
        before = [buffer.clone() for buffer in statistics]
        resized = [
            replace(batch, images=resized_images(batch.images, self.image_size))
            for batch in map(Batch.finished, batches)  # one at a time
        ]
        # Float16 would need a gradient scaler of its own.
        half = torch.get_autocast_dtype(resized[0].images.device.type) == torch.float16
        exact = torch.autocast(resized[0].images.device.type, enabled=False)
        with torch.enable_grad(), exact if half else nullcontext():
            context = StepContext(rank=rank, world_size=world_size, seeds=seeds)
            terms = compute_gradients(model, self._objective, resized, context)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if world_size > 1:
            average_over_ranks(gradients)
        parameters = list(model.parameters())
        norm = gradient_norm(parameters)
        finite = torch.isfinite(norm)
        if self._optim.grad_clip_norm is not None:
            clip_gradients(parameters, norm, self._optim.grad_clip_norm)
        step_if_finite(optimizer, finite, optimizer.step)
        restore_unless(finite, statistics, before)
        clamp_logit_scale(model)
        return terms["loss"]

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        optimizer = {} if self._optimizer is None else self._optimizer.state_dict()
        return {"model": self.model.state_dict(), "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a checkpoint; the weights move to the device at the next step."""
        self._restored = state
