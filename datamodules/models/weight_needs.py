"""What weights need of their model and its images: the activation, mean, std and resizing.

open_clip (3.x) builds the activation that a model's name stands for. Where its own table of weights
says otherwise it only warns: `ViT-B-32` has GELU, its weights `openai` were trained with QuickGELU,
and with GELU they are another model. Of the table's pairs of name and tag 27 are of this kind.

Who says what weights need, the first that does:

    a tag         open_clip's table; where that is silent, the configuration of the model's name
    a file        the configuration in it (checkpoints of ours have one), else the
                  open_clip_config.json beside it, else the table, by the repository of a Hugging
                  Face cache that it lies in or by the name of open_clip's download
    a repository or folder that brings weights along: its open_clip_config.json, else the table
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from siftclip.datamodules.models.options import configured
from siftclip.datamodules.models.weights import CONFIG_KEY, read_config
from siftclip.errors import InputError, ParameterError
from siftclip.files import read_json

CONFIG_NAME = "open_clip_config.json"
IMAGE_KEYS = ("mean", "std", "interpolation", "resize_mode")
QUICKGELU_SUFFIX = "-quickgelu"  # of the names that open_clip has for both activations
# Of the towers: for training alone, or about weights that are loaded over.
_NO_PART_OF_WEIGHTS = {"patch_dropout", "output_tokens", "timm_model_pretrained"} | {
    *("hf_model_pretrained", "timm_drop", "timm_drop_path")
}
_CACHED_REPOSITORY = re.compile(r"models--([^/]+?)--([^/]+)")
# OpenAI's downloads have the names of models, which anybody's files may have.
_ANYBODYS_NAMES = "openaipublic"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightNeeds:
    """What is known of how weights were trained."""

    says: str  # who knows, for messages
    quick_gelu: bool | None = None  # None: nobody says
    image: Mapping[str, Any] = field(default_factory=dict)  # by `image_mean` and other options
    model_cfg: Mapping[str, Any] = field(default_factory=dict)  # open_clip's; empty: not known


def activation_name(quick_gelu: bool) -> str:
    """Return what open_clip calls the activation."""
    return "QuickGELU" if quick_gelu else "GELU"


def needs_of_tag(name: str, tag: str) -> WeightNeeds:
    """Find what open_clip's weights `tag` of the built-in model `name` need.

    The table names QuickGELU alone. Where it says nothing the configuration of the name counts,
    with which the weights were trained. That is the case of `roberta-ViT-B-32` alone, of which
    open_clip warns too: it has had QuickGELU from its first day, and the accuracy that open_clip
    publishes for that configuration (61.71 % on ImageNet) is the one of its authors (61.7 %).
    """
    import open_clip

    entry = open_clip.get_pretrained_cfg(name, tag)
    config = open_clip.get_model_config(name) or {}
    quick_gelu = bool(entry.get("quick_gelu", config.get("quick_gelu", False)))
    return WeightNeeds(
        says="open_clip's table of weights", quick_gelu=quick_gelu, image=_image_options(entry)
    )


def needs_of_file(path: str | Path) -> WeightNeeds | None:
    """Find what a file says about the weights in it, or what is known of it; None if nothing is.

    Raises:
        InputError: the configuration in the file or beside it is damaged.
    """
    path = Path(path)
    config = read_config(path)
    if config is not None:
        return _needs_of_config(config, says="the file itself", owner=f"{path}, {CONFIG_KEY!r},")
    beside = path.parent / CONFIG_NAME
    if beside.is_file():
        return needs_of_folder(path.parent)
    return _listed_needs(path)


def needs_of_folder(folder: Path) -> WeightNeeds:
    """Read what the weights of a folder with an `open_clip_config.json` need.

    Raises:
        InputError: that file is damaged.
    """
    path = folder / CONFIG_NAME
    return _needs_of_config(
        read_json(path), says=str(path), owner=str(path), listed=_listed_needs(path)
    )


def needs_of_repository(source: str, config: Mapping[str, Any]) -> WeightNeeds:
    """Find what the weights of `hf-hub:org/repo` need.

    Args:
        source: the name, with its prefix.
        config: the repository's `model_cfg`.
    """
    repository = source.removeprefix("hf-hub:").partition("@")[0]
    return _needs_of_config(
        {"model_cfg": config}, says=CONFIG_NAME, owner=source, listed=_table().get(repository)
    )


def wrong_activation(
    name: str, pretrained: str | None, options: Mapping[str, Any] | None
) -> bool | None:
    """Return the activation that earlier versions of siftclip built against what weights need.

    They built what the name says. This tells results that lack a record of the activation.

    Args:
        name, pretrained, options: of the `model` node that the results were made with.

    Returns:
        Whether it was QuickGELU; None if it was right, or is not known to have been wrong.
    """
    if pretrained is None:
        return None
    import open_clip

    if not open_clip.is_pretrained_cfg(name, pretrained):
        return None
    config = open_clip.get_model_config(name) or {}
    built = bool(config.get("quick_gelu") or (options or {}).get("force_quick_gelu"))
    return None if built == needs_of_tag(name, pretrained).quick_gelu else built


def _needs_of_config(
    config: Any, *, says: str, owner: str, listed: WeightNeeds | None = None
) -> WeightNeeds:
    """Read needs from an `open_clip_config.json`; the table if that names no activation."""
    model = config.get("model_cfg", config) if isinstance(config, Mapping) else None
    images = config.get("preprocess_cfg", {}) if isinstance(config, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(images, Mapping):
        raise InputError(f"{owner} must hold open_clip's model_cfg and preprocess_cfg.")
    quick_gelu = model.get("quick_gelu")
    if quick_gelu is None and listed is not None:
        quick_gelu, says = listed.quick_gelu, listed.says
    if not isinstance(quick_gelu, bool | None):
        raise InputError(f"{owner}: quick_gelu must be true or false. Got {quick_gelu!r}.")
    return WeightNeeds(
        says=says, quick_gelu=bool(quick_gelu), image=_image_options(images), model_cfg=model
    )


def _image_options(config: Mapping[str, Any]) -> dict[str, Any]:
    options = {f"image_{key}": config[key] for key in IMAGE_KEYS if config.get(key) is not None}
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in options.items()
    }


def _listed_needs(path: Path) -> WeightNeeds | None:
    """Find a downloaded file in open_clip's table, by its place or name."""
    for part in reversed(path.absolute().parent.parts):
        match = _CACHED_REPOSITORY.fullmatch(part)
        if match:
            return _table().get(f"{match[1]}/{match[2]}")
    return _table().get(path.name)


@functools.cache
def _table() -> dict[str, WeightNeeds]:
    """Load open_clip's table by repository (`org/name`) and by file name of a download."""
    import open_clip

    table: dict[str, WeightNeeds] = {}
    for name, tag in open_clip.list_pretrained():
        entry, needs = open_clip.get_pretrained_cfg(name, tag), needs_of_tag(name, tag)
        places = [entry.get("hf_hub", "").rpartition("/")[0]]
        if _ANYBODYS_NAMES not in entry.get("url", ""):
            places.append(entry.get("url", "").rpartition("/")[2])
        for place in filter(None, places):
            says = f"open_clip's table of weights has {place}"
            table[place] = WeightNeeds(says=says, quick_gelu=needs.quick_gelu, image=needs.image)
    return table


def fit_options(
    options: Mapping[str, Any],
    needs: Mapping[str, WeightNeeds | None],
    model_cfg: Mapping[str, Any],
    name: str,
) -> tuple[dict[str, Any], list[str]]:
    """Choose options with which a model fits its weights.

    The activation of the weights counts: an option that contradicts it is refused, since the model
    would be another one. Of the images an option counts, else what the weights say.

    Args:
        options: of `model.options`, those that are set.
        needs: by what brings the weights, such as `model.pretrained='openai'`; None: not known.
        model_cfg: open_clip's, of the model's name.
        name: of the model, for messages.

    Returns:
        The options, with the keyword `quick_gelu` of open_clip's models in place of
        `force_quick_gelu` where `model_cfg` has the other activation; and lines to tell the user.

    Raises:
        InputError: an option or other weights contradict the activation.
    """
    fitted = {key: value for key, value in options.items() if key != "force_quick_gelu"}
    known = {what: need for what, need in needs.items() if need is not None}
    default = bool(model_cfg.get("quick_gelu"))
    quick_gelu, lines = _fit_activation(options.get("force_quick_gelu"), needs, default, name)
    if quick_gelu != default:
        fitted["quick_gelu"] = quick_gelu
    for what, need in known.items():
        for key, value in need.image.items():
            if options.get(key, value) != value:
                lines.append(
                    f"{what}: these weights were trained with {key.removeprefix('image_')} {value} "
                    f"({need.says}). The option {key}={options[key]} is taken"
                )
            fitted.setdefault(key, value)
    built_cfg = configured(model_cfg, fitted)
    for what, need in known.items():
        others = _differences(need.model_cfg, built_cfg, options)
        if others:
            lines.append(
                f"{what}: these weights were trained with another architecture than they get here "
                f"({need.says}): {'; '.join(others)}"
            )
    return fitted, lines


def _fit_activation(
    asked: Any, needs: Mapping[str, WeightNeeds | None], default: bool, name: str
) -> tuple[bool, list[str]]:
    """Decide if a model has QuickGELU: as its weights say, else as asked, else by default."""
    lines: list[str] = []
    quick_gelu = default if asked is None else bool(asked)
    stated = {
        what: need
        for what, need in needs.items()
        if need is not None and need.quick_gelu is not None
    }
    for what, need in stated.items():
        wanted = bool(need.quick_gelu)
        trained = f"{what}: these weights were trained with {activation_name(wanted)} ({need.says})"
        if asked is not None and wanted != bool(asked):
            raise ParameterError(
                f"would make another model of the weights: {trained}",
                parameter="options.force_quick_gelu",
                value=asked,
                got=str(asked).lower(),
                way_out="Leave that option out.",
            )
        if wanted != bool(next(iter(stated.values())).quick_gelu):
            raise InputError(
                f"{trained}, and {next(iter(stated))} with the other activation. One model has one."
            )
        quick_gelu = wanted
        if wanted != default:
            lines.append(f"{trained}. {name} is built with it, not with {activation_name(default)}")
    silent = [what for what, need in needs.items() if need is None]
    if asked is None and silent and not stated and (twin := _twin(name)) is not None:
        built, other = activation_name(quick_gelu), activation_name(not quick_gelu)
        lines += [
            f"{what}: the file does not say its activation. {name} is built with {built}; "
            f"{twin} has {other}"
            for what in silent
        ]
    return quick_gelu, lines


def _differences(
    trained: Mapping[str, Any], built: Mapping[str, Any], options: Mapping[str, Any]
) -> list[str]:
    """Describe how towers differ from those that weights were trained for, though weights may fit.

    Other sizes of images and texts are interpolated, heads and pooling are in no shape at all.
    What an option asks for is no news.
    """
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    towers = {"vision_cfg": asdict(CLIPVisionCfg()), "text_cfg": asdict(CLIPTextCfg())}
    lines = []
    for part, defaults in towers.items():
        if part not in trained or part not in built:
            continue
        ours, theirs = ({**defaults, **cfg[part]} for cfg in (built, trained))
        for key in sorted(ours.keys() & theirs.keys() - _NO_PART_OF_WEIGHTS):
            was, now = (
                _pair(cfg[key]) if key == "image_size" else cfg[key] for cfg in (theirs, ours)
            )
            if was != now and options.get(f"force_{key}") is None:
                lines.append(f"{part}.{key}={was}, not {now}")
    return lines


def _pair(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value, value]


def _twin(name: str) -> str | None:
    """Return the name of the same architecture with the other activation, if open_clip has one."""
    import open_clip

    plain = name.removesuffix(QUICKGELU_SUFFIX)
    twin = plain if plain != name else f"{name}{QUICKGELU_SUFFIX}"
    return twin if twin in open_clip.list_models() else None
