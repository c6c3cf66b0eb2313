"""Options of open_clip's `create_model_and_transforms` that change a model without a new config.

What an option changes in the architecture also goes into the config of the written model folder, so
that the folder alone gives the same outputs again. The activation that weights were trained with
comes from them, see `weight_needs`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from siftclip.errors import ParameterError, is_finite


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_list(value: object, length: int, rule: Callable[[object], bool]) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == length and all(map(rule, value))


def _is_deviation(value: object) -> bool:
    return is_finite(value) and float(value) > 0


# Rules and their wording. open_clip would accept some other values and fail at the first image.
_BOOL = (lambda value: isinstance(value, bool), "true or false")
_NUMBER = (is_finite, "a finite number")
OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "force_quick_gelu": _BOOL,
    "force_custom_text": _BOOL,
    "force_patch_dropout": (
        lambda value: is_finite(value) and 0 <= value < 1,
        "a number in the range [0, 1)",
    ),
    "force_image_size": (
        lambda value: _is_count(value) or _is_list(value, 2, _is_count),
        "a number of pixels, or [height, width]",
    ),
    "force_context_length": (_is_count, "a number of tokens, at least 1"),
    "image_mean": (lambda value: _is_list(value, 3, is_finite), "three numbers, for R, G and B"),
    "image_std": (
        lambda value: _is_list(value, 3, _is_deviation),
        "three numbers above 0, for R, G and B",
    ),
    "image_interpolation": (
        lambda value: value in ("bicubic", "bilinear", "random"),
        "bicubic, bilinear or random",
    ),
    "image_resize_mode": (
        lambda value: value in ("shortest", "longest", "squash"),
        "shortest, longest or squash",
    ),
    "init_logit_scale": _NUMBER,
    "init_logit_bias": _NUMBER,
    "nonscalar_logit_scale": _BOOL,
}
_MODEL_ARGUMENTS = ("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale")


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Check the options that are set and return them: null stands for what the architecture says.

    Raises:
        InputError: a name is unknown, or a value is not what open_clip can use.
    """
    for name, value in options.items():
        if name not in OPTIONS:
            raise ParameterError(
                "is unknown",
                parameter=f"options.{name}",
                way_out=f"The options are {', '.join(OPTIONS)}.",
            )
        valid, rule = OPTIONS[name]
        if value is not None and not valid(value):
            raise ParameterError(f"must be {rule}", parameter=f"options.{name}", value=value)
    chosen = {name: value for name, value in options.items() if value is not None}
    # open_clip adds some of them to tuples.
    return {k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items()}


def check_supported(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Refuse what open_clip accepts and the built model then ignores or cannot run.

    Raises:
        InputError: an option has no effect on this model, or breaks it.
    """
    from open_clip.modified_resnet import ModifiedResNet

    if options.get("force_patch_dropout") and isinstance(model.visual, ModifiedResNet):
        raise ParameterError(
            "has no effect: the image tower of this model is a ResNet, without patches",
            parameter="options.force_patch_dropout",
        )
    length = options.get("force_context_length")
    decoder = getattr(model, "text_decoder", None)
    if length is not None and decoder is not None and length > decoder.context_length:
        raise ParameterError(
            f"must be at most {decoder.context_length}, the context of this model's text decoder",
            parameter="options.force_context_length",
            value=length,
        )


def configured(model_cfg: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return open_clip's `model_cfg` of the model that was built from `model_cfg` with `options`.

    The options are those of `weight_needs.fit_options`.

    Patch dropout is left out: it has no weights, and is for training only, while open_clip returns
    models in training mode; whoever trains the model further sets it again.
    """
    config = copy.deepcopy(dict(model_cfg))
    if options.get("force_custom_text"):
        config["custom_text"] = True
    if "force_image_size" in options:
        size = options["force_image_size"]
        config["vision_cfg"]["image_size"] = list(size) if isinstance(size, tuple) else size
    if "force_context_length" in options:
        config["text_cfg"]["context_length"] = options["force_context_length"]
    if "force_patch_dropout" in options:
        config["vision_cfg"].pop("patch_dropout", None)
    config.update({name: options[name] for name in _MODEL_ARGUMENTS if name in options})
    if options.get("quick_gelu"):
        config["quick_gelu"] = True
    elif "quick_gelu" in options:
        del config["quick_gelu"]  # open_clip's configurations name QuickGELU alone
    return config
