"""open_clip models with transforms and tokenizer: by name, folder, checkpoint or configuration.

Everything is built by open_clip. A *model folder* is what `open_clip.create_model_and_transforms`
loads with the prefix `local-dir:`: `open_clip_config.json` and `open_clip_model.safetensors`.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from siftclip.datamodules.files import atomic_path, write_json
from siftclip.selectors.errors import InputError

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth")  # what open_clip looks for in a folder
SCHEMES = ("local-dir:", "hf-hub:")
MODEL_FOLDER = "model"  # the model folder inside a run directory
LIGHTNING_PREFIX = "model."  # the name of the model inside our Lightning module

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
) -> ClipModel:
    """Build an open_clip model on the CPU in fp32.

    Args:
        name: a built-in name of open_clip (`ViT-B-32`), `hf-hub:org/repo`, a model folder, or a run
            directory of ours. With `architecture` it is only a label.
        pretrained: an open_clip tag (`openai`), or a checkpoint file: open_clip's `.pt`,
            safetensors, or a Lightning `.ckpt` of ours. None means random initialisation.
        architecture: open_clip's `embed_dim`, `vision_cfg`, `text_cfg` and so on, for models that
            open_clip does not know by name.
        augmentation: open_clip's `aug_cfg` for the train transform.

    Raises:
        InputError: the name, tag or file does not exist, or the weights do not fit the model.
    """
    is_ckpt = pretrained is not None and pretrained.endswith(".ckpt")
    open_clip_tag = None if is_ckpt else pretrained
    with tempfile.TemporaryDirectory() as temporary:
        if architecture is not None:
            config = {"model_cfg": copy.deepcopy(dict(architecture)), "preprocess_cfg": {}}
            write_json(Path(temporary) / CONFIG_NAME, config)
            source = f"local-dir:{temporary}"
        else:
            source = _resolve(name, pretrained)
        try:
            with _without_warnings_of_random_weights(
                architecture is not None or (pretrained is None and not name.startswith("hf-hub:"))
            ):
                model, train_transform, eval_transform = open_clip.create_model_and_transforms(
                    source,
                    # open_clip ignores `pretrained` with these, so the file is loaded below
                    pretrained=None if source.startswith(SCHEMES) else open_clip_tag,
                    aug_cfg=dict(augmentation) if augmentation else None,
                )
                tokenizer = open_clip.get_tokenizer(source)
        except Exception as error:  # open_clip raises RuntimeError, KeyError, OSError, ...
            raise InputError(
                f"model.name={name!r} with model.pretrained={pretrained!r} could not be built by "
                f"open_clip: {error}"
            ) from error
        model_cfg = open_clip.get_model_config(source)
    if pretrained is not None and (is_ckpt or source.startswith(SCHEMES)):
        _load_weights(model, pretrained)
    return ClipModel(
        model=model,
        train_transform=train_transform,
        eval_transform=eval_transform,
        tokenizer=tokenizer,
        config={"model_cfg": model_cfg, "preprocess_cfg": dict(model.visual.preprocess_cfg)},
    )


def holds_weights(name: str) -> bool:
    """Whether a model's name brings weights along: a folder or a model hub, not a bare name."""
    return name.startswith(("hf-hub:", "local-dir:")) or Path(name).is_dir()


@contextmanager
def _without_warnings_of_random_weights(wanted: bool) -> Iterator[None]:
    """Silence open_clip's root-logger warnings where random weights are what was asked for."""
    before = logging.root.manager.disable
    if wanted:
        logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _resolve(name: str, pretrained: str | None) -> str:
    """What open_clip calls the model, after checks whose messages open_clip leaves out."""
    folder = Path(name.removeprefix("local-dir:"))
    for candidate in (folder / MODEL_FOLDER, folder):
        if (candidate / CONFIG_NAME).is_file():
            if pretrained is None and not _has_weights(candidate):
                raise InputError(f"The model folder {candidate} holds no weights ({WEIGHTS_NAME}).")
            return f"local-dir:{candidate}"
    if name.startswith("local-dir:") or folder.is_dir():
        raise InputError(
            f"model.name={name!r} must be a run directory with a {MODEL_FOLDER}/ folder, or a "
            f"folder with {CONFIG_NAME}. Neither was found there: has its training finished?"
        )
    if name.startswith("hf-hub:"):
        return name
    known = open_clip.list_models()
    if name not in known:
        raise InputError(
            f"model.name must be one of open_clip's {len(known)} models (python -c 'import "
            f"open_clip; print(open_clip.list_models())'), a folder, or hf-hub:org/repo. "
            f"Got {name!r}.{_similar(name, known)}"
        )
    if pretrained is not None and not Path(pretrained).is_file():
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained not in tags:
            raise InputError(
                f"model.pretrained must be an existing file or one of {tags} for {name}. "
                f"Got {pretrained!r}."
            )
    return name


def _has_weights(folder: Path) -> bool:
    return any(path.suffix in WEIGHT_SUFFIXES for path in folder.iterdir())


def _similar(name: str, known: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, n=3)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _load_weights(model: torch.nn.Module, path: str) -> None:
    """Load an open_clip checkpoint, or a Lightning one of ours, safely, into `model`."""
    if not Path(path).is_file():
        raise InputError(f"model.pretrained={path!r} is not a file.")
    try:
        if path.endswith(".ckpt"):
            state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
            model.load_state_dict({k.removeprefix(LIGHTNING_PREFIX): v for k, v in state.items()})
        else:
            open_clip.load_checkpoint(model, path)
    except Exception as error:  # damaged files raise anything from KeyError to UnpicklingError
        raise InputError(
            f"model.pretrained={path!r} does not hold the weights of this model: {error}"
        ) from error


def save_model_folder(clip: ClipModel, folder: Path) -> None:
    """Write a model folder that `open_clip.create_model_and_transforms('local-dir:...')` loads."""
    hf_tokenizer = getattr(clip.tokenizer, "tokenizer", None)
    if hf_tokenizer is not None and hasattr(hf_tokenizer, "save_pretrained"):
        hf_tokenizer.save_pretrained(str(folder))  # a local-dir model reads its tokenizer there
    state = {
        key: value.detach().cpu().contiguous() for key, value in clip.model.state_dict().items()
    }
    with atomic_path(folder / WEIGHTS_NAME) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    write_json(folder / CONFIG_NAME, clip.config)  # last: its presence says that all is there
