"""Features of texts, in batches of equal length.

A prompt such as "a photo of a cat." has 8 tokens of the 77 that a CLIP takes; what comes after the
end token changes nothing where attention is causal. So texts are sorted by length, and the tower
runs on as many positions as the longest of a batch has: the same features, for a tenth of the work.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from siftclip.datamodules.models.typed import as_clip
from siftclip.errors import InputError


class _TextTower(nn.Module):
    """`encode_text` as a forward pass, which `functional_call` asks for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return as_clip(self.model).encode_text(tokens, normalize=True)


def token_lengths(model: nn.Module, tokens: Tensor) -> Tensor | None:
    """Count the tokens of each text that decide about its feature, int64 [n]; None if all may.

    All but those behind the end token, where the tower is open_clip's, attends causally, has no
    class token and takes the feature from the end token.

    Args:
        model: an open_clip model.
        tokens: int64 [n, context length].
    """
    tower: Any = getattr(model, "text", model)
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    causal = getattr(tower, "attn_mask", None) is not None
    if not causal or getattr(tower, "cls_emb", None) is not None:
        return None
    if pool == "argmax":
        return tokens.argmax(dim=-1) + 1
    if pool == "eos":
        end: int = getattr(tower, "text_eos_id", getattr(tower, "eos_id", -1))
        is_end: Tensor = tokens == end
        whole = torch.full((len(tokens),), tokens.shape[1])
        return torch.where(is_end.any(dim=-1), is_end.int().argmax(dim=-1) + 1, whole)
    return None


def encode_tokens(model: nn.Module, tokens: Tensor) -> Tensor:
    """Encode texts to unit features, [b, d].

    Args:
        model: an open_clip model.
        tokens: int64 [b, length], on the model's device. Positions behind the longest of
            `token_lengths` may have been cut off, where that is not None.
    """
    tower: Any = getattr(model, "text", model)
    mask, length = getattr(tower, "attn_mask", None), tokens.shape[1]
    if mask is None or length == getattr(tower, "context_length", len(mask)):
        return as_clip(model).encode_text(tokens, normalize=True)
    prefix = "model." if tower is model else "model.text."
    shorter = {
        f"{prefix}positional_embedding": tower.positional_embedding[:length],
        f"{prefix}attn_mask": mask[:length, :length],
    }
    features: Tensor = functional_call(_TextTower(model), shorter, (tokens,))
    return features


def length_batches(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Batch rows of about equal length, longest first, so that memory runs out at once.

    Args:
        lengths: int64 [n].
        batch_size: texts in a batch.
    """
    order = np.argsort(-lengths, kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def check_tokens(model: nn.Module, tokens: Tensor) -> None:
    """Check that a tokenizer is that of the model.

    Raises:
        InputError: it gives tokens that the model does not have, or another length.
    """
    from open_clip.hf_model import HFTextEncoder

    tower: Any = getattr(model, "text", model)
    table = getattr(tower, "token_embedding", None)
    if isinstance(tower, HFTextEncoder):
        table = tower.transformer.get_input_embeddings()
    if isinstance(table, nn.Embedding):
        highest = int(tokens.max())
        if highest >= table.num_embeddings:
            raise InputError(
                f"The tokenizer does not belong to the model: it gives the token {highest}, and "
                f"the model has {table.num_embeddings}. Name the model's own tokenizer in "
                "text_cfg.hf_tokenizer_name, or another model."
            )
    limit = getattr(tower, "context_length", None)  # 0: relative positions, as T5 has them
    if limit and tokens.shape[1] > limit:
        raise InputError(
            f"The tokenizer does not belong to the model: it gives {tokens.shape[1]} tokens a "
            f"text, and the model takes {limit}."
        )
