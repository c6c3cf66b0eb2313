"""What a training loop gets for a batch; transforms and tokenizers as they come."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from siftclip.datamodules.models.load import Tokenizer, Transform
from siftclip.datamodules.streaming.batches import Batch, kept_random_states
from siftclip.errors import ParameterError

Form = Callable[[Batch], Any]

TRIED_SIZE = (512, 512)  # as images of pools are, so that crops of a fixed size fit into them
MOST_TOKENS = 4096  # tokenizers of Hugging Face that know no limit say 10^30


def as_tuple(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return images, float32 or uint8 [b, 3, h, w], and tokens, int64 [b, t]."""
    return batch.images, batch.tokens


def as_dict(batch: Batch) -> dict[str, Tensor]:
    """Return `images` and `tokens` as `as_tuple`, and `rows`, int64 [b]: the samples in the pool.

    And `weights`, float32 [b], of a selection that has some.
    """
    values = {"images": batch.images, "tokens": batch.tokens, "rows": batch.rows}
    return values if batch.weights is None else {**values, "weights": batch.weights}


@dataclass(frozen=True, slots=True)
class HuggingFaceTokens:
    """Makes token ids, int64 [n, length], with a tokenizer of Hugging Face: padded, cut."""

    tokenizer: Any
    length: int

    def __call__(self, captions: list[str]) -> Tensor:
        """Tokenise captions."""
        encoded = self.tokenizer(
            captions,
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        ids: Tensor = encoded["input_ids"]
        return ids


def checked_transform(transform: Transform) -> Transform:
    """Return a transform if it makes float [3, h, w] of an RGB image; it is tried on a black one.

    Raises:
        ParameterError: it gives something else.
    """
    with kept_random_states():
        image = transform(Image.new("RGB", TRIED_SIZE))
    is_image = isinstance(image, Tensor) and image.ndim == 3 and len(image) == 3
    if not is_image or not image.is_floating_point():
        raise ParameterError(
            "must make a float tensor [3, h, w] of an RGB image",
            owner="SelectedPairs",
            parameter="transform",
            got=_kind(image),
            way_out="End a pipeline of torchvision with ToTensor().",
        )
    return transform


def checked_tokenizer(tokenizer: Any) -> Tokenizer:
    """Return a tokenizer as the loader calls it: a list of captions in, int64 [n, t] out.

    Raises:
        ParameterError: it gives something else.
    """
    ready = _of_hugging_face(tokenizer) if _is_hugging_face(tokenizer) else tokenizer
    tokens = ready(["a photo of a cat", "a dog"])
    is_table = isinstance(tokens, Tensor) and tokens.ndim == 2 and len(tokens) == 2
    if not is_table or tokens.dtype != torch.int64:
        raise ParameterError(
            "must make an int64 tensor [n, t] of a list of n captions",
            owner="SelectedPairs",
            parameter="tokenizer",
            got=f"{_kind(tokens)} for two captions",
            way_out="open_clip.get_tokenizer and tokenizers of Hugging Face do.",
        )
    called: Tokenizer = ready
    return called


def _kind(value: Any) -> str:
    """Say what a value is, without its numbers."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__


def _is_hugging_face(tokenizer: Any) -> bool:
    """Return whether it is one of Hugging Face, without importing their library."""
    module = sys.modules.get("transformers")
    return module is not None and isinstance(tokenizer, module.PreTrainedTokenizerBase)


def _of_hugging_face(tokenizer: Any) -> HuggingFaceTokens:
    length = tokenizer.model_max_length
    if length > MOST_TOKENS:
        raise ParameterError(
            "must say how long captions may be",
            owner="SelectedPairs",
            parameter="tokenizer",
            got=f"{type(tokenizer).__name__} with model_max_length={length}",
            way_out="Set its model_max_length, for CLIP to 77.",
        )
    return HuggingFaceTokens(tokenizer, length)
