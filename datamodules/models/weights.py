"""Weights in files: read without running code, told apart by their keys, loaded whole or a tower.

What can be read: open_clip's checkpoints `{epoch, name, state_dict}`, bare state dicts,
safetensors, big_vision's npz, and Lightning checkpoints of ours, in one file or in parts, whose
model lies under `model.` and its moving average (EMA), where there is one, under `ema.averaged.`.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from siftclip.datamodules.models.sharded_checkpoint import (
    ShardedCheckpoint,
    is_sharded_checkpoint,
    is_weights_file,
)
from siftclip.errors import InputError, ParameterError
from siftclip.reading import readable, require_file

Weights = Literal["auto", "ema", "raw"]
Tower = Literal["image", "text"]

WEIGHTS: tuple[Weights, ...] = ("auto", "ema", "raw")
LIGHTNING_PREFIX = "model."  # no open_clip model has a part of this name
EMA_PREFIX = "ema.averaged."
DISTRIBUTED_PREFIX = "module."  # of open_clip's checkpoints from several processes
BIG_VISION_SUFFIXES = (".npz", ".npy")
# Where the built-in CLIP, which has no `text.`, keeps the parts of its text tower.
UNPREFIXED_TEXT = (
    "token_embedding.",
    "positional_embedding",
    "transformer.",
    "ln_final.",
    "text_projection",
)
# Old Hugging Face towers saved this constant, transformers 4.31 and later do not know it.
POSITION_IDS = "text.transformer.embeddings.position_ids"
COUNTER = ".num_batches_tracked"
CONFIG_KEY = "open_clip_config"  # where our checkpoints say what model their weights are of
_MAX_LINE = 300  # characters of a line of what a library says
NAMED_KEYS = 5  # a message names so many keys; a wrong file has hundreds


def require_weights_choice(parameter: str, value: object) -> Weights:
    """Return `value`, a parameter of that name, as one of auto, ema, raw."""
    for known in WEIGHTS:
        if value == known:
            return known
    raise ParameterError(f"must be one of {list(WEIGHTS)}", parameter=parameter, value=value)


def read_weights(path: str | Path, *, weights: Weights = "auto") -> dict[str, Tensor]:
    """Read the state dict of a checkpoint, under open_clip's names.

    Args:
        path: open_clip's `.pt`, a bare state dict, safetensors, or a Lightning `.ckpt` of ours, a
            file or a folder of parts.
        weights: of a checkpoint with a moving average: `auto` and `ema` take the average, `raw`
            what the optimizer trained. Other files hold raw weights only.

    Raises:
        InputError: the file is missing, damaged, would run code, or lacks the average asked for.
    """
    if not is_weights_file(path):
        raise InputError(f"{path} is not a file.")
    if not is_sharded_checkpoint(path):
        require_file(path)
    try:
        content = _read_tensors(Path(path))
        state = content.get("state_dict", content)
        if not state or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("it is not a state dict")
    except Exception as error:  # damaged files raise anything from KeyError to UnpicklingError
        raise _unfit(path, fault_of(error)) from error
    averaged = _below(state, EMA_PREFIX)
    if weights == "ema" and not averaged:
        raise InputError(f"{path} holds no moving average of the weights (ema). Take raw or auto.")
    if averaged and weights != "raw":
        return averaged
    for prefix in (LIGHTNING_PREFIX, DISTRIBUTED_PREFIX):
        if any(key.startswith(prefix) for key in state):
            return _below(state, prefix)
    return dict(state)


def read_config(path: Path) -> Any:
    """Read the `open_clip_config.json` that a checkpoint of ours brings along; None without.

    Only the table of contents is read. A file that cannot be read says nothing here: loading its
    weights says what is wrong with it.
    """
    if path.suffix == ".safetensors" or not is_weights_file(path):
        return None
    try:
        if is_sharded_checkpoint(path):
            return ShardedCheckpoint(path).rest.get(CONFIG_KEY)
        content = _read_tensors(path) if zipfile.is_zipfile(path) else None
    except Exception:  # damaged files raise anything, see `read_weights`
        return None
    return content.get(CONFIG_KEY) if isinstance(content, dict) else None


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    weights: Weights = "auto",
) -> None:
    """Load all weights of `model` from a file, in place, with the conversions of open_clip.

    As open_clip's `load_checkpoint` (3.3): positional embeddings of another size are interpolated,
    text towers of the built-in CLIP fit models with a text tower of its own, a logit bias that the
    file lacks becomes 0. Also reads our Lightning checkpoints, and names what does not fit.

    Raises:
        InputError: see `read_weights`; or the weights are not those of this model.
    """
    if Path(path).suffix in BIG_VISION_SUFFIXES:
        import open_clip

        try:
            open_clip.load_checkpoint(model, str(path))
        except Exception as error:  # numpy and missing keys raise all sorts of errors
            raise _unfit(path, fault_of(error)) from error
        return
    state = read_weights(path, weights=weights)
    try:
        state = _converted(model, state)
        require_same_keys(model.state_dict(), state)
        _resize_embeddings(state, model)
        model.load_state_dict(state)
    except Exception as error:  # wrong shapes, also inside open_clip's conversions
        raise _unfit(path, fault_of(error)) from error


def load_tower_weights(
    model: nn.Module, tower: Tower, path: str | Path, *, weights: Weights = "auto"
) -> None:
    """Load the weights of one tower, in place; the other keeps its own.

    The file holds the tower alone, or a whole model whose tower is taken. Unlike open_clip (3.3),
    which loads what fits and logs the rest, all keys must match; and positional embeddings of
    another size are interpolated as for whole models.

    Raises:
        InputError: see `read_weights`; or the weights are not those of this tower.
    """
    part = _tower_part(read_weights(path, weights=weights), tower)
    target: Any = model.visual if tower == "image" else getattr(model, "text", model)
    # The built-in CLIP is its own text tower, without a prefix and with more in it.
    in_model = "visual." if tower == "image" else "" if target is model else "text."
    keys = UNPREFIXED_TEXT if target is model else ("",)
    try:
        require_same_keys((key for key in target.state_dict() if key.startswith(keys)), part)
        state = {in_model + key: value for key, value in part.items()}
        _resize_embeddings(state, model)
        target.load_state_dict(_below(state, in_model), strict=False)
    except Exception as error:  # wrong shapes, also inside open_clip's conversions
        raise _unfit(path, fault_of(error), what=f"the {tower} tower") from error


def portable_weights(weights: Mapping[str, Tensor], owner: str) -> dict[str, Tensor]:
    """Copy a state dict to the CPU, contiguous, checked to be finite; for writing it.

    Args:
        weights: of the whole model.
        owner: what they come from or go to, for messages.

    Raises:
        InputError: a tensor holds NaN or infinity.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    for key, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(
                f"{owner}: the weights {key!r} hold NaN or infinity, so they are not written. "
                "Training has diverged; try a lower learning rate, or bf16 instead of fp16."
            )
    return state


def _read_tensors(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if is_sharded_checkpoint(path):
        parts = ShardedCheckpoint(path)
        return {"state_dict": parts.whole(parts.rest["state_dict"], "state_dict")}
    # Mapped, so that the optimizer's state in a checkpoint takes no memory.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def require_whole_weights(path: Path) -> None:
    """Raise InputError unless a safetensors file has all that its header lists."""
    from safetensors import safe_open

    require_file(path)
    with readable(path, "safetensors file"), safe_open(path, "pt"):
        pass


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def _tower_part(state: Mapping[str, Tensor], tower: Tower) -> dict[str, Tensor]:
    """Extract a tower's weights, under its own names, from those of a model or of the tower."""
    prefixed = _below(state, "visual." if tower == "image" else "text.")
    if prefixed:
        return prefixed
    if tower == "text" and _below(state, "visual."):
        return {key: value for key, value in state.items() if key.startswith(UNPREFIXED_TEXT)}
    return dict(state)


def _converted(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict as open_clip's `load_checkpoint` does before it resizes embeddings."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    state = convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for key in ("logit_scale", "logit_bias"):
        buffer = getattr(model, key, None)
        if buffer is not None and key in state:
            state[key] = state[key].reshape(buffer.shape)
    if model.logit_bias is not None:
        state.setdefault("logit_bias", torch.zeros_like(model.logit_bias))
    if POSITION_IDS not in model.state_dict():
        state.pop(POSITION_IDS, None)
    return state


def _resize_embeddings(state: dict[str, Tensor], model: nn.Module) -> None:
    """Interpolate positional embeddings to the model's sizes, in place of `state`."""
    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    resize_pos_embed(state, model)
    resize_text_pos_embed(state, model)


def require_same_keys(expected: Iterable[str], given: Iterable[str]) -> None:
    """Compare names before shapes, whose mismatch would say less.

    Raises:
        ValueError: a key is missing or left over.
    """
    # PyTorch loads a frozen batch norm, which counts no batches, into a usual one and back.
    first, second = ({k for k in keys if not k.endswith(COUNTER)} for keys in (expected, given))
    faults = [
        f"{len(keys)} {kind} ({_some(keys)})"
        for kind, keys in (("missing", first - second), ("unexpected", second - first))
        if keys
    ]
    if faults:
        raise ValueError("; ".join(faults))


def _some(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:NAMED_KEYS]) + (", ..." if len(keys) > NAMED_KEYS else "")


def fault_of(error: Exception) -> str:
    """Describe in a few lines what is wrong with a file."""
    if isinstance(error, pickle.UnpicklingError):
        # PyTorch's own message says how to run what is in the file.
        other = re.search(r"GLOBAL (\S+)", str(error))
        if other is None:
            return "it is damaged, or no checkpoint of PyTorch"
        return (
            f"it holds more than tensors ({other[1][:_MAX_LINE]}), and reading that could run "
            "code. Whoever made the file can write the tensors alone: those of the model's "
            "state_dict()"
        )
    if "failed finding central directory" in str(error):  # what torch says of a cut archive
        return "it is cut off, or no checkpoint"
    lines = [line[:_MAX_LINE] for line in str(error).strip().splitlines()]
    lines = lines or [type(error).__name__]
    return "\n".join([*lines[: NAMED_KEYS + 1], *(["..."] if len(lines) > NAMED_KEYS + 1 else [])])


def _unfit(path: str | Path, reason: str, *, what: str = "this model") -> InputError:
    return InputError(f"{path} does not hold the weights of {what}: {reason}")
