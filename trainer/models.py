"""The model of a configuration. Apart from the stages without a model, which start faster so."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from siftclip.datamodules.clip_models import ClipModel, holds_weights, load_clip_model
from siftclip.selectors.errors import InputError
from siftclip.trainer.stages import plain


def clip_model_from(node: DictConfig, option: str, *, trained: bool = False) -> ClipModel:
    """Build the open_clip model that a `model` node of the configuration describes.

    Args:
        node: the node.
        option: its name, for messages.
        trained: refuse random weights, where nobody can want them.

    Raises:
        InputError: the model is missing or cannot be built.
    """
    if OmegaConf.is_missing(node, "name"):
        raise InputError(
            f"{option}.name must name a model: one of open_clip's, a run directory, or a folder."
        )
    name = str(node.name)
    has_weights = node.pretrained is not None or holds_weights(name)
    if trained and not has_weights:
        raise InputError(
            f"{option}.pretrained must be an open_clip tag or a checkpoint file, since "
            f"{option}.name={name!r} brings no weights and random ones would be used. Got null."
        )
    return load_clip_model(
        name,
        pretrained=node.pretrained,
        architecture=plain(node.architecture),
        augmentation=plain(node.get("augmentation")),
    )
