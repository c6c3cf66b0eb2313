"""What can be switched on a built model: locked towers, and gradient checkpointing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from siftclip.errors import InputError, ParameterError, require_bool, require_int


@dataclass(frozen=True, slots=True, kw_only=True)
class LockConfig:
    """Which weights keep their values in training: open_clip's `--lock-*` options."""

    image: bool = False
    image_unlocked_groups: int = 0  # so many of the last groups of layers are trained
    image_freeze_bn_stats: bool = False  # running mean and variance of the locked part, too
    text: bool = False
    text_unlocked_layers: int = 0
    text_freeze_layer_norm: bool = True  # False: Hugging Face's layer norms are trained

    def __post_init__(self) -> None:
        for name in ("image", "image_freeze_bn_stats", "text", "text_freeze_layer_norm"):
            require_bool(name, getattr(self, name), owner=self)
        for name in ("image_unlocked_groups", "text_unlocked_layers"):
            require_int(name, getattr(self, name), minimum=0, owner=self)
        if not self.image and (self.image_unlocked_groups or self.image_freeze_bn_stats):
            raise self._without_effect("image", "image_unlocked_groups and image_freeze_bn_stats")
        if not self.text and (self.text_unlocked_layers or not self.text_freeze_layer_norm):
            raise self._without_effect("text", "text_unlocked_layers and text_freeze_layer_norm")

    def _without_effect(self, tower: str, parameters: str) -> ParameterError:
        rule = f"must be true, or {parameters} have no effect"
        return ParameterError(rule, owner=self, parameter=tower, value=False)


def lock_towers(model: nn.Module, config: LockConfig) -> None:
    """Take gradients from the weights of a tower, in place, as open_clip does it.

    LiT (arXiv 2111.07991) locks a pretrained image tower and trains the text tower. What stays
    trainable beside the towers: the logit scale and bias, and of a timm image tower the projection.
    Both towers may be locked, which fits scale and bias alone to them. Call it when the weights are
    loaded: frozen batch norms become buffers.

    Raises:
        InputError: open_clip cannot lock this model so, or the options would lock nothing.
    """
    if not config.image and not config.text:
        return
    if not hasattr(model, "lock_image_tower"):
        raise InputError(f"open_clip cannot lock the towers of {type(model).__name__} models.")
    clip: Any = model
    with warnings.catch_warnings():
        # open_clip 3.3 imports timm's helpers from where they used to be.
        warnings.filterwarnings("ignore", "Importing from timm", FutureWarning)
        if config.image:
            if config.image_freeze_bn_stats and not _has_batch_norm(clip.visual):
                raise ParameterError(
                    "has no effect: the image tower of this model has no batch norm",
                    owner=config,
                    parameter="image_freeze_bn_stats",
                )
            _lock(
                lambda: clip.lock_image_tower(
                    unlocked_groups=config.image_unlocked_groups,
                    freeze_bn_stats=config.image_freeze_bn_stats,
                ),
                config,
                "image_unlocked_groups",
                config.image_unlocked_groups,
                list(clip.visual.parameters()),
            )
        if config.text:
            _check_layer_norms(clip, config)
            _lock(
                lambda: clip.lock_text_tower(
                    unlocked_layers=config.text_unlocked_layers,
                    freeze_layer_norm=config.text_freeze_layer_norm,
                ),
                config,
                "text_unlocked_layers",
                config.text_unlocked_layers,
                list(text_parameters(clip)),
            )


def text_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of the text tower, also where it has no module of its own."""
    if hasattr(model, "text"):
        yield from model.text.parameters()  # type: ignore[union-attr]
        return
    for name, parameter in model.named_parameters():
        if not name.startswith(("visual.", "logit_")):
            yield parameter


def enable_grad_checkpointing(model: nn.Module) -> None:
    """Recompute activations in the backward pass, in both towers: less memory, more time.

    Raises:
        ParameterError: a tower cannot; the parameter is called `grad_checkpointing`. open_clip
            (3.3) silently leaves such a tower as it is.
    """
    from open_clip.hf_model import HFTextEncoder
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel

    clip: Any = model
    if isinstance(clip.visual, ModifiedResNet):
        raise _no_checkpointing("the image tower", "open_clip's ModifiedResNet")
    try:
        if isinstance(clip.visual, TimmModel):  # open_clip would only warn
            clip.visual.trunk.set_grad_checkpointing(True)
        clip.set_grad_checkpointing(True)
        if isinstance(getattr(clip, "text", None), HFTextEncoder):
            # Older transformers' default loses the gradients behind locked embeddings.
            clip.text.transformer.gradient_checkpointing_enable({"use_reentrant": False})
    except Exception as error:  # timm asserts, Hugging Face raises ValueError
        raise _no_checkpointing("a tower", str(error)) from error


def _no_checkpointing(tower: str, reason: str) -> ParameterError:
    return ParameterError(
        f"cannot be true: {tower} of this model has no gradient checkpointing ({reason})",
        parameter="grad_checkpointing",
        way_out="Set it to false.",
    )


def _lock(
    call: Any, config: LockConfig, parameter: str, unlocked: int, weights: list[nn.Parameter]
) -> None:
    try:
        call()
    except KeyError as error:  # open_clip looks the layers up in a table of its own
        raise ParameterError(
            "must be 0: open_clip does not know the layers of this tower, and can only lock all of "
            "it",
            owner=config,
            parameter=parameter,
            value=unlocked,
        ) from error
    except Exception as error:  # open_clip asserts; a timm or Hugging Face tower raises more
        raise ParameterError(
            f"cannot be true: open_clip cannot lock this tower so: {error}",
            owner=config,
            parameter=parameter.partition("_")[0],
        ) from error
    if all(weight.requires_grad for weight in weights):
        raise ParameterError(
            "must be less than the number of groups of layers, or nothing is locked",
            owner=config,
            parameter=parameter,
            value=unlocked,
        )


def _check_layer_norms(clip: Any, config: LockConfig) -> None:
    from open_clip.hf_model import HFTextEncoder

    text = getattr(clip, "text", None)
    if config.text_freeze_layer_norm or not isinstance(text, HFTextEncoder):
        return  # open_clip refuses it for its own towers
    if not any("LayerNorm" in name.split(".") for name, _ in text.named_parameters()):
        raise ParameterError(
            "must be true: open_clip finds no layer norms in this text tower",
            owner=config,
            parameter="text_freeze_layer_norm",
            value=False,
        )


def _has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(part, _BatchNorm) for part in module.modules())
