"""open_clip models with transforms and tokenizer: by name, folder, checkpoint or configuration.

Everything is built by open_clip. A *model folder* is what `open_clip.create_model_and_transforms`
loads with the prefix `local-dir:`: `open_clip_config.json` and `open_clip_model.safetensors`.
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from siftclip.datamodules.models.architecture import check_architecture
from siftclip.datamodules.models.foreign_code import without_foreign_code
from siftclip.datamodules.models.options import check_options, check_supported, configured
from siftclip.datamodules.models.sharded_checkpoint import is_weights_file
from siftclip.datamodules.models.weight_needs import (
    CONFIG_NAME,
    QUICKGELU_SUFFIX,
    WeightNeeds,
    fit_options,
    needs_of_file,
    needs_of_folder,
    needs_of_repository,
    needs_of_tag,
)
from siftclip.datamodules.models.weights import (
    Tower,
    Weights,
    load_tower_weights,
    load_weights,
    portable_weights,
    read_config,
    read_weights,
    require_whole_weights,
)
from siftclip.errors import InputError, ParameterError
from siftclip.files import read_json_object, write_json
from siftclip.reading import reason_of, require_file
from siftclip.writing import atomic_path, make_folder, temporary_folder, writing_to

log = logging.getLogger(__name__)

WEIGHTS_NAME = "open_clip_model.safetensors"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth")  # what open_clip looks for in a folder
SCHEMES = ("local-dir:", "hf-hub:")
MODEL_FOLDER = "model"  # the model folder inside a run directory

Transform = Callable[[Image.Image], torch.Tensor]
Tokenizer = Callable[[list[str]], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipModel:
    """An open_clip model with what is needed to feed it and to write it out again."""

    model: torch.nn.Module
    train_transform: Transform  # PIL RGB image -> float32 [3, size, size]
    eval_transform: Transform
    tokenizer: Tokenizer  # n captions -> int64 [n, context_length]
    config: dict[str, Any]  # the content of open_clip_config.json


def load_clip_model(
    name: str,
    *,
    pretrained: str | None = None,
    architecture: Mapping[str, Any] | None = None,
    augmentation: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    pretrained_image: str | None = None,
    pretrained_text: str | None = None,
    weights: Weights = "auto",
) -> ClipModel:
    """Build an open_clip model on the CPU in fp32, with the activation that its weights need.

    Args:
        name: a built-in name of open_clip (`ViT-B-32`), `hf-hub:org/repo`, a model folder, a run
            directory of ours, or a file of weights that says what model they are of, as our
            checkpoints and `siftclip export` do. With `architecture` it is only a label.
        pretrained: an open_clip tag (`openai`), or a checkpoint file: open_clip's `.pt`,
            safetensors, or a Lightning `.ckpt` of ours. None means random initialisation.
        architecture: open_clip's `embed_dim`, `vision_cfg`, `text_cfg` and so on, for models that
            open_clip does not know by name.
        augmentation: open_clip's `aug_cfg` for the train transform.
        options: open_clip's own (see `model_options.OPTIONS`); None stands for its default.
        pretrained_image, pretrained_text: files with the weights of one tower, loaded last.
        weights: which ones of a checkpoint that also holds a moving average.

    Raises:
        InputError: the name, tag, file or option does not exist, or the weights do not fit, or were
            trained with another activation than an option asks for.
    """
    import open_clip

    asked = check_options(options or {})
    of_towers: dict[Tower, str | None] = {"image": pretrained_image, "text": pretrained_text}
    towers = {tower: path for tower, path in of_towers.items() if path is not None}
    with temporary_folder() as temporary:
        if architecture is not None:
            _check_label(name, pretrained)
            config = {"model_cfg": copy.deepcopy(dict(architecture)), "preprocess_cfg": {}}
            write_json(temporary / CONFIG_NAME, config)
            source = f"local-dir:{temporary}"
        elif pretrained is None and _is_file(name):
            config = _config_in(name)
            write_json(temporary / CONFIG_NAME, config)
            source, pretrained, architecture = f"local-dir:{temporary}", name, config["model_cfg"]
        else:
            source = resolve_name(name, pretrained)
        # Files are loaded below: open_clip ignores them with some sources, and says less.
        tag, file = _tag_or_file(source, pretrained, weights)
        is_random = architecture is not None and file is None
        try:
            model_cfg = open_clip.get_model_config(source)
            check_architecture(model_cfg, f"The architecture of {name!r}")
            needs = {} if is_random else _needs(source, tag, file, model_cfg)
            for tower, path in towers.items():
                needs |= _tower_needs(tower, path, model_cfg)
            chosen, lines = fit_options(asked, needs, model_cfg, name)
            with (
                without_foreign_code(),
                _without_needless_warnings(
                    architecture is not None
                    or file is not None
                    or (pretrained is None and not name.startswith("hf-hub:"))
                ),
            ):
                model, train_transform, eval_transform = open_clip.create_model_and_transforms(
                    source,
                    pretrained=tag,
                    load_weights=file is None,
                    pretrained_text=file is None and pretrained_text is None,
                    aug_cfg=dict(augmentation) if augmentation else None,
                    **chosen,
                )
                tokenizer = _tokenizer(source, architecture, chosen.get("force_context_length"))
        except InputError:
            raise
        except Exception as error:  # open_clip raises RuntimeError, KeyError, OSError, ...
            raise InputError(
                f"The model {name!r} with pretrained={pretrained!r} could not be built by "
                f"open_clip: {reason_of(error)}"
            ) from error
    for line in lines:
        log.info("%s.", line)
    check_supported(model, chosen)
    if tag is None and (architecture is not None or not source.startswith(SCHEMES)):
        _initialise_decoder(model, model_cfg["text_cfg"])
    if file is not None:
        load_weights(model, file, weights=weights)
    for tower, path in towers.items():
        load_tower_weights(model, tower, path)
    return ClipModel(
        model=model,
        train_transform=train_transform,
        eval_transform=eval_transform,
        tokenizer=tokenizer,
        config={
            "model_cfg": configured(model_cfg, chosen),
            "preprocess_cfg": dict(model.visual.preprocess_cfg),
        },
    )


def _tag_or_file(
    source: str, pretrained: str | None, weights: Weights
) -> tuple[str | None, str | None]:
    """Return what `pretrained` names: open_clip's tag, or an existing file; None for the other."""
    if pretrained is not None and _is_tag(source, pretrained):
        tag, file = pretrained, None
    else:
        tag, file = None, pretrained
    if file is not None and not is_weights_file(file):
        rule = "must be a tag of open_clip or an existing file"
        raise ParameterError(rule, parameter="pretrained", value=file)
    if weights != "auto" and file is None:
        raise ParameterError(
            "chooses within a checkpoint file, which pretrained must name",
            parameter="weights",
            value=weights,
            got=f"{weights!r} and pretrained={pretrained!r}",
        )
    return tag, file


def _tokenizer(
    source: str, architecture: Mapping[str, Any] | None, context_length: int | None
) -> Tokenizer:
    """Build the tokenizer of a model: of a new architecture, the one that it names.

    open_clip looks for it beside a config that lies in a folder, whatever the config says.
    """
    import open_clip
    from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer

    text = {} if architecture is None else architecture["text_cfg"]
    if text.get("hf_tokenizer_name"):
        tokenizer: Tokenizer = HFTokenizer(
            text["hf_tokenizer_name"],
            context_length=context_length or text.get("context_length", DEFAULT_CONTEXT_LENGTH),
            tokenizer_mode=text.get("tokenizer_mode"),
            **text.get("tokenizer_kwargs", {}),
        )
    else:
        tokenizer = open_clip.get_tokenizer(source, context_length=context_length)
    return tokenizer


def holds_weights(name: str) -> bool:
    """Return whether a model's name brings weights along: a folder or a hub, not a bare name."""
    return name.startswith(("hf-hub:", "local-dir:")) or Path(name).is_dir() or _is_file(name)


def _is_file(name: str) -> bool:
    """Return whether a model's name is that of a file, and not open_clip's."""
    import open_clip

    return is_weights_file(name) and name not in open_clip.list_models()


def _config_in(file: str) -> dict[str, Any]:
    """Read what a file of weights says of its model.

    Raises:
        InputError: nothing, or something else.
    """
    config = read_config(Path(file))
    if config is None:
        read_weights(file)  # which says what is wrong with a damaged one
    if not isinstance(config, dict) or not isinstance(config.get("model_cfg"), dict):
        folder = Path(file).parent
        known = (folder / CONFIG_NAME).is_file()
        other = f"name {folder}" if known else "the model's name"
        raise ParameterError(
            "is a file that does not say what model its weights are of",
            parameter="name",
            value=file,
            way_out=f"Give {other}, and the file as pretrained.",
        )
    return config


def _needs(
    source: str, tag: str | None, file: str | None, model_cfg: Mapping[str, Any]
) -> dict[str, WeightNeeds | None]:
    """Find what a whole model's weights need, by what brings them; nothing for random ones."""
    if tag is not None:
        return {f"pretrained={tag!r}": needs_of_tag(source, tag)}
    if file is not None:
        return {f"pretrained={file!r}": needs_of_file(file)}
    if source.startswith("hf-hub:"):
        return {f"name={source!r}": needs_of_repository(source, model_cfg)}
    if source.startswith("local-dir:"):
        folder = source.removeprefix("local-dir:")
        return {f"name={folder!r}": needs_of_folder(Path(folder))}
    return {}


def _tower_needs(
    tower: Tower, path: str, model_cfg: Mapping[str, Any]
) -> dict[str, WeightNeeds | None]:
    """Find what the weights of one tower need: images for the image tower, and the activation.

    ResNets and towers of timm and Hugging Face have activations of their own.
    """
    needs = needs_of_file(path)
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    has_own = (
        "timm_model_name" in vision or isinstance(vision.get("layers"), (list, tuple))
        if tower == "image"
        else "hf_model_name" in text
    )
    if has_own:
        needs = replace(needs or WeightNeeds(says=""), quick_gelu=None)
    if needs is not None:
        part = "vision_cfg" if tower == "image" else "text_cfg"
        needs = replace(needs, model_cfg={k: v for k, v in needs.model_cfg.items() if k == part})
    if tower == "text" and needs is not None:
        needs = replace(needs, image={})
    return {f"pretrained_{tower}={path!r}": needs}


def _initialise_decoder(model: torch.nn.Module, text_cfg: dict[str, Any]) -> None:
    """Give the text decoder of a random CoCa the projection that open_clip (3.3) leaves undefined.

    It is memory as it was found, at times NaN: the decoder's `init_parameters`, which has this
    standard deviation, is never called (https://github.com/mlfoundations/open_clip/pull/551).

    A text tower of Hugging Face has a vocabulary of its own, and open_clip gives the decoder that
    of CLIP: it gets an output for every token, which `text_cfg` then says.
    """
    decoder: Any = getattr(model, "text_decoder", None)
    if decoder is None:
        return
    from open_clip.hf_model import HFTextEncoder

    width, tokens = decoder.text_projection.shape
    text: Any = model.text
    if (
        isinstance(text, HFTextEncoder)
        and "vocab_size" not in text_cfg
        and text.vocab_size > tokens
    ):
        text_cfg["vocab_size"] = text.vocab_size
        decoder.text_projection = torch.nn.Parameter(torch.empty(width, text.vocab_size))
    torch.nn.init.normal_(decoder.text_projection, std=width**-0.5)


@contextmanager
def _without_needless_warnings(random_weights: bool) -> Iterator[None]:
    """Silence what open_clip says of activations, which are right, and of wanted random weights."""
    before = logging.root.manager.disable
    if random_weights:
        logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "QuickGELU mismatch", UserWarning)
            yield
    finally:
        logging.disable(before)


def resolve_name(name: str, pretrained: str | None) -> str:
    """Return what open_clip calls the model, after checks whose messages open_clip leaves out.

    Raises:
        InputError: there is no such model, or what its folder holds is damaged.
    """
    folder = Path(name.removeprefix("local-dir:"))
    for candidate in (folder / MODEL_FOLDER, folder):
        if os.path.lexists(candidate / CONFIG_NAME):
            read_json_object(candidate / CONFIG_NAME)
            has_weights = _has_weights(candidate)
            if pretrained is None and not has_weights:
                raise InputError(f"The model folder {candidate} holds no weights ({WEIGHTS_NAME}).")
            return f"local-dir:{candidate}"
    if name.startswith("local-dir:") or folder.is_dir():
        raise ParameterError(
            f"must be a run directory with a {MODEL_FOLDER}/ folder, or a folder with "
            f"{CONFIG_NAME}",
            parameter="name",
            value=name,
            way_out="Neither was found there: has its training finished?",
        )
    if name.startswith("hf-hub:"):
        return name
    import open_clip

    known = open_clip.list_models()
    if name not in known:
        raise ParameterError(
            f"must be one of open_clip's {len(known)} models (python -c 'import open_clip; "
            "print(open_clip.list_models())'), a folder, or hf-hub:org/repo",
            parameter="name",
            value=name,
            way_out=_similar(name, known),
        )
    if pretrained is not None and not is_weights_file(pretrained):
        tags = open_clip.list_pretrained_tags_by_model(name)
        if not open_clip.is_pretrained_cfg(name, pretrained):  # it also takes Laion2B-S34B-B79K
            other = name.removesuffix(QUICKGELU_SUFFIX)
            hint = (
                f"These are weights with GELU: set the name to {other}."
                if other != name and open_clip.is_pretrained_cfg(other, pretrained)
                else ""
            )
            raise ParameterError(
                f"must be an existing file or one of {tags} for {name}",
                parameter="pretrained",
                value=pretrained,
                way_out=hint,
            )
    return name


def _check_label(name: str, pretrained: str | None) -> None:
    """Say that an architecture is built where the name stands for another model.

    Raises:
        InputError: a model of a hub, or a tag, is asked for.
    """
    import open_clip

    label = "an architecture is given, with which the name is only a label"
    for_name = "Leave the architecture out (null)"
    if name.startswith(SCHEMES):
        raise ParameterError(
            f"would not be read: {label}", parameter="name", value=name, way_out=f"{for_name}."
        )
    if pretrained is not None and _is_tag(name, pretrained):
        raise ParameterError(
            f"is a tag of open_clip's {name}, which is not built: {label}",
            parameter="pretrained",
            value=pretrained,
            way_out=f"{for_name}.",
        )
    if name in open_clip.list_models() or holds_weights(name):
        log.warning("The model %r is not what is built: %s. %s for it", name, label, for_name)


def _is_tag(source: str, pretrained: str) -> bool:
    """Return whether `pretrained` is open_clip's name for weights of a built-in model."""
    import open_clip

    return not source.startswith(SCHEMES) and open_clip.is_pretrained_cfg(source, pretrained)


def _has_weights(folder: Path) -> bool:
    """Return whether a folder has weights; what is no file, or damaged, raises InputError."""
    paths = [path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES]
    for path in paths:
        (require_whole_weights if path.suffix == ".safetensors" else require_file)(path)
    return bool(paths)


def _similar(name: str, known: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, n=3)
    return f"Did you mean {' or '.join(close)}?" if close else ""


def save_model_folder(
    clip: ClipModel, folder: Path, weights: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write a model folder that `open_clip.create_model_and_transforms('local-dir:...')` loads.

    Args:
        clip: the model.
        folder: where to.
        weights: a state dict to write instead of the model's own, such as a moving average.

    Raises:
        InputError: a weight is NaN or infinite; nothing is written then.
    """
    from safetensors.torch import save_file

    state = portable_weights(clip.model.state_dict() if weights is None else weights, str(folder))
    hf_tokenizer = getattr(clip.tokenizer, "tokenizer", None)
    if hf_tokenizer is not None and hasattr(hf_tokenizer, "save_pretrained"):
        with writing_to(make_folder(folder)):
            hf_tokenizer.save_pretrained(str(folder))  # a local-dir model reads its tokenizer there
    with atomic_path(folder / WEIGHTS_NAME) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    write_json(folder / CONFIG_NAME, clip.config)  # last: its presence says that all is there
