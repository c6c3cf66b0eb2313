"""The model of a configuration. Apart from the stages without a model, which start faster so."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from siftclip.datamodules.clip_models import (
    MODEL_FOLDER,
    ClipModel,
    holds_weights,
    load_clip_model,
)
from siftclip.datamodules.files import content_digests
from siftclip.datamodules.identities import named_files
from siftclip.datamodules.model_weights import require_weights_choice
from siftclip.datamodules.towers import LockConfig, lock_towers
from siftclip.datamodules.weight_needs import activation_name, needs_of_tag, wrong_activation
from siftclip.selectors.description import Behind, describe
from siftclip.selectors.errors import InputError
from siftclip.trainer.build.options import options_of, under
from siftclip.trainer.stages import plain

# Where the configuration of a training has models.
MODEL_NODES = ("model", "loss.teacher.model", "online.reference.model", "online.scorer")

log = logging.getLogger(__name__)


def model_files(node: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The digests of the files that a `model` node of the configuration names, by option.

    A tag or a name of a hub stands for itself.
    """
    files = {}
    for option in ("name", "pretrained", "pretrained_image", "pretrained_text"):
        place = Path(str(node.get(option)).removeprefix("local-dir:"))
        inside = place / MODEL_FOLDER  # of a run directory
        files[option] = content_digests(inside if inside.is_dir() else place)
    behind = Behind()
    describe(plain(node.get("architecture")), behind)
    files["architecture"] = named_files(behind.texts)  # towers and tokenizers in local folders
    return {option: digests for option, digests in files.items() if digests}


def clip_model_from(node: DictConfig, option: str, *, trained: bool = False) -> ClipModel:
    """Build the open_clip model that a `model` node of the configuration describes.

    Weights come in this order: random, `pretrained` or what the name brings along, single towers.
    Locks are set last.

    Args:
        node: the node; all but `name` may be absent.
        option: its name, for messages.
        trained: refuse random weights, where nobody can want them.

    Raises:
        InputError: the model is missing or cannot be built.
    """
    if OmegaConf.is_missing(node, "name"):
        raise InputError(
            f"{option}.name must name a model: one of open_clip's, a run directory, or a folder."
        )
    with options_of(lock_options(option)):  # checked before a model is read
        lock = LockConfig(**(plain(node.get("lock")) or {}))
    name = str(node.name)
    pretrained = node.get("pretrained")
    has_weights = pretrained is not None or (
        holds_weights(name) and node.get("architecture") is None
    )
    towers = {tower: node.get(f"pretrained_{tower}") for tower in ("image", "text")}
    if trained and not has_weights and None in towers.values():
        raise InputError(
            f"{option}.pretrained must be an open_clip tag or a checkpoint file, since "
            f"{option}.name={name!r} brings no weights and random ones would be used. Got null."
        )
    weights = require_weights_choice(f"{option}.weights", node.get("weights", "auto"))
    with options_of(under(option, "name", "pretrained", "options", "weights")):
        clip = load_clip_model(
            name,
            pretrained=pretrained,
            architecture=plain(node.get("architecture")),
            augmentation=plain(node.get("augmentation")),
            options=plain(node.get("options")),
            pretrained_image=towers["image"],
            pretrained_text=towers["text"],
            weights=weights,
        )
    for tower, locked in (("image", lock.image), ("text", lock.text)):
        if locked and not has_weights and towers[tower] is None:
            log.warning("%s.lock.%s keeps the random weights of that tower", option, tower)
    with options_of(lock_options(option)):
        lock_towers(clip.model, lock)
    return clip


def lock_options(option: str) -> dict[str, str]:
    """Return the options of `LockConfig` in a `model` node of the configuration."""
    return under(f"{option}.lock", *(field.name for field in fields(LockConfig)))


def checkpoint_options(node: DictConfig) -> dict[str, Any]:
    """The options with which a checkpoint of a run is loaded, from the run's `model` node.

    Checkpoints say what model they are of. Those of earlier versions do not: their run took the
    preprocessing from its tag, and the activation from the model's name.
    """
    options: dict[str, Any] = plain(node.get("options")) or {}
    name, tag = str(node.name), node.get("pretrained")
    if tag is None or node.get("architecture") is not None:
        return options
    import open_clip

    if not open_clip.is_pretrained_cfg(name, str(tag)):
        return options
    image = needs_of_tag(name, str(tag)).image
    return {**image, **{key: value for key, value in options.items() if value is not None}}


def activations_of_weights(config: DictConfig) -> dict[str, str]:
    """The activations that the models of a run get from their tags, against what their names say.

    Earlier versions of siftclip took those of the names, so this belongs to what a run is known by.

    Returns:
        By the option that holds the model; nothing where names and tags agree.
    """
    found = {}
    for option in MODEL_NODES:
        node = plain(OmegaConf.select(config, option))
        if not node or not node.get("name") or node.get("architecture") is not None:
            continue
        built = wrong_activation(node["name"], node.get("pretrained"), node.get("options"))
        if built is not None:
            found[option] = activation_name(not built)
    return found
