"""What a training loop gets for a batch, and tokenizers as they come."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from siftclip.datamodules.models.load import Tokenizer
from siftclip.datamodules.streaming.batches import Batch
from siftclip.errors import ParameterError

Form = Callable[[Batch], Any]

MOST_TOKENS = 4096  # tokenizers of Hugging Face that know no limit say 10^30


def as_tuple(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return images, float32 [b, 3, h, w], and tokens, int64 [b, t]."""
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


def checked_tokenizer(tokenizer: Any) -> Tokenizer:
    """Return a tokenizer as the loader calls it: a list of captions in, int64 [n, t] out.

    Raises:
        ParameterError: it gives something else.
    """
    ready = _of_hugging_face(tokenizer) if _is_hugging_face(tokenizer) else tokenizer
    tokens = ready(["a photo of a cat", "a dog"])
    shape = tuple(getattr(tokens, "shape", ()))
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or shape[:-1] != (2,):
        got = f"{getattr(tokens, 'dtype', type(tokens).__name__)} {list(shape)}"
        raise ParameterError(
            "must make an int64 tensor [n, t] of a list of n captions",
            owner="SelectedPairs",
            parameter="tokenizer",
            got=f"{got} for two captions",
            way_out="open_clip.get_tokenizer and tokenizers of Hugging Face do.",
        )
    called: Tokenizer = ready
    return called


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
