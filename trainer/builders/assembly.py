"""The parts of a training run: the module that trains, and the stream that it trains on."""

from __future__ import annotations

import lightning

from siftclip.datamodules.models.load import ClipModel
from siftclip.datamodules.streaming.datamodule import StreamDataModule
from siftclip.trainer.builders.models import clip_model_from
from siftclip.trainer.builders.objective import objective_from
from siftclip.trainer.builders.run_parts import RunParts
from siftclip.trainer.loop.module import ClipTraining
from siftclip.trainer.models.compilation import compile_towers
from siftclip.trainer.models.towers import enable_grad_checkpointing
from siftclip.trainer.online.controller import Online
from siftclip.trainer.options.faults import options_of, under
from siftclip.trainer.runtime.lightning_setup import loader_options
from siftclip.trainer.settings.budget import Budget
from siftclip.trainer.settings.model import ModelSettings


def new_model(model: ModelSettings, *, seed: int, grad_checkpointing: bool) -> ClipModel:
    """Build the model of a run as it is trained; its initial weights are a function of the seed."""
    lightning.seed_everything(seed, verbose=False)
    clip = clip_model_from(model)
    if grad_checkpointing:  # here, so that what it costs is counted
        with options_of(under("trainer", "grad_checkpointing")):
            enable_grad_checkpointing(clip.model)
    return clip


def training_module(
    parts: RunParts,
    budget: Budget,
    online: Online | None = None,
    *,
    log_gradients_every_n_steps: int | None = None,
) -> ClipTraining:
    """Build what a run of this budget trains: a model of `new_model`."""
    clip, trainer = parts.clip, parts.trainer
    if trainer.compile:
        compile_towers(clip.model, micro_batches=parts.micro_batch_size is not None)
    return ClipTraining(
        clip.model,
        objective=objective_from(parts.loss, clip, parts.loss_data, parts.selected.rows),
        optim=parts.optim,
        total_steps=budget.total_steps,
        global_batch_size=budget.global_batch_size,
        seed=parts.common.seed,
        log_every_n_steps=trainer.log_every_n_steps,
        max_skipped_fraction=trainer.max_skipped_fraction,
        online=online,
        model_config=clip.config,
        log_gradients_every_n_steps=log_gradients_every_n_steps,
    )


def data_module_from(
    parts: RunParts, budget: Budget, online: Online | None = None
) -> StreamDataModule:
    """Build the stream of a selection into a run of this budget."""
    selected, loss_data, settings = parts.selected, parts.loss_data, parts.data
    references = [] if loss_data.references is None else [loss_data.references]
    with options_of(under("data", "max_image_pixels", "resize")):
        data = StreamDataModule(
            pool=selected.pool,
            rows=selected.rows,
            transform=parts.clip.train_transform,
            tokenizer=parts.clip.tokenizer,
            seed=parts.common.seed,
            global_batch_size=budget.global_batch_size,
            total_steps=budget.total_steps,
            loader=loader_options(settings, parts.trainer),
            max_image_pixels=settings.max_image_pixels,
            max_bad_fraction=parts.pool.max_bad_fraction,
            window_shards=settings.shuffle_window_shards,
            resize=settings.resize,
            channels_last=parts.trainer.channels_last,
            plan=None if online is None else online.plan,
            first_stage=None if online is None else online.first_stage,
            references=references if online is None else [*references, *online.references],
            weights=loss_data.weights,
            micro_batch_size=parts.micro_batch_size,
        )
    if online is not None and online.reselection is not None:
        data.find_version = online.reselection.find
    return data
