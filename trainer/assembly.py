"""The parts of a training run: the module that trains, and the stream that it trains on."""

from __future__ import annotations

import lightning
from omegaconf import DictConfig

from siftclip.datamodules.clip_models import ClipModel
from siftclip.datamodules.streaming import StreamDataModule
from siftclip.datamodules.towers import enable_grad_checkpointing
from siftclip.trainer.budget import Budget
from siftclip.trainer.build.options import options_of, under
from siftclip.trainer.compilation import compile_towers
from siftclip.trainer.lightning_setup import loader_options
from siftclip.trainer.models import clip_model_from
from siftclip.trainer.module import ClipTraining
from siftclip.trainer.objective import LossData, objective_from
from siftclip.trainer.online.online import Online
from siftclip.trainer.optim import OptimConfig
from siftclip.trainer.stages import SelectOutcome, plain


def new_model(config: DictConfig) -> ClipModel:
    """The model of a run as it is trained, with its initial weights: a function of the seed."""
    lightning.seed_everything(config.seed, verbose=False)
    clip = clip_model_from(config.model, "model")
    if config.trainer.grad_checkpointing:  # here, so that what it costs is counted
        with options_of(under("trainer", "grad_checkpointing")):
            enable_grad_checkpointing(clip.model)
    return clip


def training_module(
    config: DictConfig,
    clip: ClipModel,
    selected: SelectOutcome,
    loss_data: LossData,
    budget: Budget,
    online: Online | None = None,
) -> ClipTraining:
    """What a run of this budget trains: a model of `new_model`."""
    if config.trainer.compile:
        compile_towers(clip.model, micro_batches=config.trainer.micro_batch_size is not None)
    return ClipTraining(
        clip.model,
        objective=objective_from(config, clip, loss_data, selected.rows),
        optim=OptimConfig(**plain(config.optim)),
        total_steps=budget.total_steps,
        global_batch_size=budget.global_batch_size,
        seed=config.seed,
        log_every_n_steps=config.trainer.log_every_n_steps,
        max_skipped_fraction=config.trainer.max_skipped_fraction,
        online=online,
        model_config=clip.config,
    )


def data_module_from(
    config: DictConfig,
    clip: ClipModel,
    selected: SelectOutcome,
    loss_data: LossData,
    budget: Budget,
    online: Online | None = None,
) -> StreamDataModule:
    """The stream of a selection into a run of this budget."""
    references = [] if loss_data.references is None else [loss_data.references]
    with options_of(under("data", "max_image_pixels", "resize")):
        data = StreamDataModule(
            pool=selected.pool,
            rows=selected.rows,
            transform=clip.train_transform,
            tokenizer=clip.tokenizer,
            seed=config.seed,
            global_batch_size=budget.global_batch_size,
            total_steps=budget.total_steps,
            loader=loader_options(config),
            max_image_pixels=config.data.max_image_pixels,
            max_bad_fraction=config.pool.max_bad_fraction,
            window_shards=config.data.shuffle_window_shards,
            resize=config.data.resize,
            plan=None if online is None else online.plan,
            first_stage=None if online is None else online.first_stage,
            references=references if online is None else [*references, *online.references],
            weights=loss_data.weights,
            micro_batch_size=config.trainer.micro_batch_size,
        )
    if online is not None and online.reselection is not None:
        data.find_version = online.reselection.find
    return data
