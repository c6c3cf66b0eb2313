"""Uniform random choice, the control of every comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from siftclip.errors import require_int
from siftclip.hashing import uniform_score
from siftclip.selectors.core.base import Chunk, RuleOptions, ScoreSelector

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Uniform(ScoreSelector):
    """Keep a uniformly random part of the pool, the same for every order and chunk size.

    Example:
        >>> import siftclip
        >>> captions = ["a cat", "a dog", "a red car", "two birds"]
        >>> selector = siftclip.selectors.Uniform(seed=0, fraction=0.5)
        >>> siftclip.select(captions=captions, selector=selector).rows
        array([2, 3])
    """

    def __init__(self, *, seed: int = 0, **rule: Unpack[RuleOptions]) -> None:
        """Set the seed; `rule` is `fraction`, `threshold` or `rule`, see `ScoreSelector`."""
        super().__init__(**rule)
        self.seed = require_int("seed", seed, minimum=0, owner=self)

    def score(self, chunk: Chunk) -> Tensor:
        return torch.from_numpy(uniform_score(chunk.uids, self.seed))
