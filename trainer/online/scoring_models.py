"""Models whose features a super-batch is judged by: the learner, a reference, a small scorer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from siftclip.datamodules.models.typed import as_clip
from siftclip.datamodules.streaming.batches import Batch
from siftclip.selectors.core.source import Logits
from siftclip.trainer.online.scoring import (
    resized_images,
    resized_positions,
    scoring_features,
)
from siftclip.trainer.online.scoring_config import ScoringConfig

Pair = tuple[Tensor, Tensor]  # image and text features


def carried(parts: Sequence[Batch], key: str) -> Tensor:
    """Join cached features of all parts, as stored: autocast to bfloat16 would refuse float16."""
    with torch.autocast(parts[0].images.device.type, enabled=False):
        return torch.cat([part.references[key] for part in parts])


class LiveFeatures(Protocol):
    """Gives features under the keys `<name>_img` and `<name>_txt`."""

    @property
    def name(self) -> str: ...

    def features(self, parts: Sequence[Batch], seeds: Sequence[int]) -> Pair:
        """Compute features of the samples of all parts, float [n, d], unit norm, without gradients.

        `seeds` are those of dropout, one a part.
        """

    def logits(self) -> Logits:
        """Return how this model turns cosines into logits now."""


def model_logits(model: nn.Module) -> Logits:
    """Return scale and bias of an open_clip model: on a GPU as tensors, which need no waiting."""
    bias = getattr(model, "logit_bias", None)
    return Logits(
        scale=_scalar(as_clip(model).logit_scale.detach().exp()),
        bias=0.0 if bias is None else _scalar(bias.detach()),
        has_bias=bias is not None,
    )


def _scalar(value: Tensor) -> float | Tensor:
    return value.double() if value.is_cuda else float(value)


@dataclass(slots=True, kw_only=True)
class ScoredModel:
    """A model that the scoring forward runs through."""

    name: str
    model: Callable[[], nn.Module]  # asked at every step: it may be replaced, or moved
    config: ScoringConfig
    image_size: int | None = None  # of its images; None: that of the learner's

    def features(self, parts: Sequence[Batch], seeds: Sequence[int]) -> Pair:
        model = self.model()
        positions = resized_positions(model, self.config)
        pairs = [
            scoring_features(
                model,
                resized_images(part.finished().images, self.image_size),
                part.tokens,
                self.config,
                seed,
                positions=positions,
            )
            for part, seed in zip(parts, seeds, strict=True)
        ]
        image, text = (torch.cat(features) for features in zip(*pairs, strict=True))
        return image, text

    def logits(self) -> Logits:
        return model_logits(self.model())


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedModel:
    """A model whose features batches bring along; its logit scale is known."""

    name: str
    keys: tuple[str, str]  # of the batches' references
    known_logits: Logits

    def features(self, parts: Sequence[Batch], seeds: Sequence[int]) -> Pair:
        image, text = (carried(parts, key) for key in self.keys)
        return image, text

    def logits(self) -> Logits:
        return self.known_logits
