"""The model of the settings. Apart from the stages without a model, which start faster so."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from siftclip.datamodules.identity.identities import named_files
from siftclip.datamodules.models.batch_norms import may_have_batch_norms
from siftclip.datamodules.models.load import (
    MODEL_FOLDER,
    ClipModel,
    holds_weights,
    load_clip_model,
    resolve_name,
)
from siftclip.datamodules.models.weight_needs import activation_name, needs_of_tag, wrong_activation
from siftclip.errors import InputError
from siftclip.files import content_digests
from siftclip.selectors.core.description import Behind, describe
from siftclip.trainer.models.towers import LockConfig, lock_towers
from siftclip.trainer.options.faults import options_of, under
from siftclip.trainer.runtime.lightning_setup import expected_world_size
from siftclip.trainer.settings.commands import TrainCommand
from siftclip.trainer.settings.fields.section import to_plain
from siftclip.trainer.settings.model import ModelSettings, OtherModel
from siftclip.trainer.settings.online import EveryStepSettings

AnyModel = ModelSettings | OtherModel

log = logging.getLogger(__name__)


def model_files(model: AnyModel) -> dict[str, dict[str, str]]:
    """Hash the files that a model's settings name, by option.

    A tag or a name of a hub stands for itself.
    """
    files = {}
    for option in ("name", "pretrained", "pretrained_image", "pretrained_text"):
        place = Path(str(getattr(model, option)).removeprefix("local-dir:"))
        inside = place / MODEL_FOLDER  # of a run directory
        files[option] = content_digests(inside if inside.is_dir() else place)
    behind = Behind()
    describe(to_plain(model.architecture), behind)
    files["architecture"] = named_files(behind.texts)  # towers and tokenizers in local folders
    return {option: digests for option, digests in files.items() if digests}


def clip_model_from(model: AnyModel, *, trained: bool = False) -> ClipModel:
    """Build the open_clip model that settings describe.

    Weights come in this order: random, `pretrained` or what the name brings along, single towers.
    Locks are set last.

    Args:
        model: its settings, with a name.
        trained: refuse random weights, where nobody can want them.

    Raises:
        InputError: the model is missing or cannot be built.
    """
    name, option = str(model.name), model.PLACE
    lock = LockConfig()
    if isinstance(model, ModelSettings):
        lock = LockConfig(**to_plain(model.lock))
    has_weights = model.pretrained is not None or (
        holds_weights(name) and model.architecture is None
    )
    towers = {"image": model.pretrained_image, "text": model.pretrained_text}
    if trained and not has_weights and None in towers.values():
        if model.architecture is None:  # what is no model has no weights either
            with options_of(under(option, "name")):
                resolve_name(name, None)
        raise InputError(
            f"No weights given: {option}.name={name!r} has none of its own, and "
            f"{option}.pretrained is not set. Set it to an open_clip tag or a checkpoint file."
        )
    with options_of(under(option, "name", "pretrained", "options", "weights")):
        clip = load_clip_model(
            name,
            pretrained=model.pretrained,
            architecture=to_plain(model.architecture),
            augmentation=to_plain(model.augmentation),
            options=to_plain(model.options),
            pretrained_image=model.pretrained_image,
            pretrained_text=model.pretrained_text,
            weights=model.weights or "auto",
        )
    for tower, locked in (("image", lock.image), ("text", lock.text)):
        if locked and not has_weights and towers[tower] is None:
            log.warning("%s.lock.%s keeps the random weights of that tower", option, tower)
    with options_of(lock_options(option)):
        lock_towers(clip.model, lock)
    return clip


def lock_options(option: str) -> dict[str, str]:
    """Return the options of `LockConfig` below a model."""
    return under(f"{option}.lock", *(field.name for field in fields(LockConfig)))


def checkpoint_options(model: ModelSettings) -> dict[str, Any]:
    """Return the options with which a checkpoint of a run is loaded, from the run's model.

    Checkpoints say what model they are of. Those of earlier versions do not: their run took the
    preprocessing from its tag, and the activation from the model's name.
    """
    options: dict[str, Any] = to_plain(model.options)
    name, tag = model.name, model.pretrained
    if tag is None or model.architecture is not None:
        return options
    import open_clip

    if not open_clip.is_pretrained_cfg(name, tag):
        return options
    image = needs_of_tag(name, tag).image
    return {**image, **{key: value for key, value in options.items() if value is not None}}


def models_of(settings: TrainCommand) -> list[AnyModel]:
    """Return the models of a training that have a name."""
    models: list[AnyModel] = [settings.model]
    if settings.loss.live_teacher is not None:
        models.append(settings.loss.live_teacher)
    if isinstance(settings.online, EveryStepSettings):
        models += [settings.online.reference.model, settings.online.scorer]
    return [model for model in models if model.name]


def activations_of_weights(models: Sequence[AnyModel]) -> dict[str, str]:
    """Find activations that a run's models get from their tags, against what their names say.

    Earlier versions of siftclip took those of the names, so this belongs to what a run is known by.

    Returns:
        By the option that holds the model; nothing where names and tags agree.
    """
    activations = {}
    for model in models:
        if model.architecture is not None:
            continue
        built = wrong_activation(str(model.name), model.pretrained, to_plain(model.options))
        if built is not None:
            activations[model.PLACE] = activation_name(not built)
    return activations


def batch_norm_identity(settings: TrainCommand) -> dict[str, Any]:
    """Return what the weights of models with batch norms depend on beside the batch.

    That is how a batch is cut into the samples that are normalised together, and whose running
    statistics are kept. Towers without batch norms give the same for any cut.

    Returns:
        Empty for models without batch norms, and where a batch is normalised as a whole.
    """
    trainer, batch = settings.trainer, settings.scale.global_batch_size
    online = settings.online
    scorer = online.scorer if isinstance(online, EveryStepSettings) else None
    learner_has = _may_have(settings.model)
    scorer_has = scorer is not None and _may_have(scorer)
    if not (learner_has or scorer_has):
        return {}
    ranks = expected_world_size(trainer)
    micro_batch = trainer.micro_batch_size
    says: dict[str, Any] = {}
    if micro_batch == "auto":
        raise InputError(
            "trainer.micro_batch_size=auto does not go with models that have batch norms, or may "
            "have some: they normalise the samples of a part together, so that the run would be "
            "another one on another device. Set a number."
        )
    if micro_batch is not None and micro_batch < batch // ranks:
        says["micro_batch_size"] = micro_batch
    # A scorer's are never joined over ranks
    if ranks > 1 and (says or scorer_has or not trainer.sync_batchnorm):
        says |= {"ranks": ranks, "sync_batchnorm": trainer.sync_batchnorm}
    if learner_has and trainer.grad_checkpointing:
        says["grad_checkpointing"] = True  # running statistics move in the second forward, too
    return {"batch_norms": says} if says else {}


def _may_have(model: AnyModel) -> bool:
    return bool(model.name) and may_have_batch_norms(str(model.name), model.architecture)
