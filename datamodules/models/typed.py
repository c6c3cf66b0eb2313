"""What every open_clip model has, for the type checker: `nn.Module` says nothing of it."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn


class Clip(Protocol):
    """The two towers and the temperature that open_clip's models have in common."""

    visual: nn.Module
    logit_scale: nn.Parameter  # float, a scalar: the logarithm of the scale of logits

    def encode_image(self, image: Tensor, /, *, normalize: bool) -> Tensor:
        """Encode images, float [b, 3, h, w], to features [b, d]; of unit norm if asked for."""

    def encode_text(self, text: Tensor, /, *, normalize: bool) -> Tensor:
        """Encode tokens, int64 [b, length], to features [b, d]; of unit norm if asked for."""


def as_clip(model: nn.Module) -> Clip:
    """Return the model itself, which is one of open_clip's."""
    untyped: Any = model
    clip: Clip = untyped
    return clip
