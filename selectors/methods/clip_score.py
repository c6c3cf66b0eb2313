"""CLIP score: the cosine of a sample's image and caption (DataComp, arXiv 2304.14108)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from siftclip.errors import InputError
from siftclip.selectors.core.base import Chunk, Requirements, RuleOptions, ScoreSelector
from siftclip.selectors.core.source import IMAGE, TEXT, ReadsFeatures
from siftclip.selectors.kernels.blocks import row_blocks

if TYPE_CHECKING:
    from typing_extensions import Unpack


def require_pairs(image_features: Tensor, text_features: Tensor) -> None:
    """Raise InputError unless images and texts are vectors [n, d] of one width."""
    if image_features.shape != text_features.shape:
        raise InputError(
            "Images and texts must be features [samples, dim] of one model. Got "
            f"{list(image_features.shape)} and {list(text_features.shape)}."
        )


def clip_score(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Compute the inner product of each image with its caption, float32 [n].

    Args:
        image_features: float [n, d] of unit norm. As in DataComp and the authors' releases they
            are not normalised again, and the product is taken in float32.
        text_features: float [n, d] of unit norm.

    Example:
        >>> import torch
        >>> from siftclip.selectors.methods.clip_score import clip_score
        >>> images = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
        >>> texts = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> clip_score(images, texts)
        tensor([1.0000, 0.6000])
    """
    require_pairs(image_features, text_features)
    scores = image_features.new_empty(len(image_features), dtype=torch.float32)
    pairs = row_blocks(image_features, text_features, scores)
    for image, text, block in pairs:
        torch.sum(image.float() * text.float(), dim=1, out=block)
    return scores


class ClipScore(ReadsFeatures, ScoreSelector):
    """Keep the pairs whose image and caption agree best according to a CLIP model.

    Example:
        >>> import numpy as np
        >>> from siftclip.selectors import ClipScore
        >>> images = np.array([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32)
        >>> texts = np.array([[0.6, 0.8], [0.6, 0.8]], dtype=np.float32)
        >>> ClipScore(fraction=0.5).scores(images, texts)
        array([0.6, 0.8], dtype=float32)
    """

    def __init__(self, *, features: str | None = None, **rule: Unpack[RuleOptions]) -> None:
        """Choose the features.

        Args:
            features: name of a feature set, such as `l14` for the keys `l14_img` and `l14_txt`;
                None: the one that it is used with.
            **rule: `fraction`, `threshold` or `rule`, see `ScoreSelector`.
        """
        super().__init__(**rule)
        self.features = features

    @property
    def requires(self) -> Requirements:
        return Requirements(features=self.feature_keys(IMAGE, TEXT))

    def score(self, chunk: Chunk) -> Tensor:
        image, text = (chunk.features[key] for key in self.requires.features)
        return clip_score(image, text)
