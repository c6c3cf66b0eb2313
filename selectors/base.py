"""What a selector is: the chunk it sees, what it asks for, and the two base classes.

A selector decides how often each sample of its input is kept. Its input comes as chunks: one pass
over a pool, or a single super-batch. A `ScoreSelector` gives every sample one number (higher is
better) and leaves the decision to a rule; any other set function derives from `Selector` itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import Tensor

from siftclip.selectors.errors import InputError
from siftclip.selectors.rules import Rule, Threshold, TopFraction


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Some samples of a pool, as a selector sees them. Nothing in it may be modified."""

    rows: np.ndarray  # int64 [n], global rows of the pool
    uids: np.ndarray  # uint64 [n, 2], (high, low)
    features: dict[str, Tensor] = field(default_factory=dict)  # key -> float [n, d]
    captions: list[str] | None = None  # n, if asked for
    column: np.ndarray | None = None  # float64 [n], if asked for; NaN where it has no value

    def __len__(self) -> int:
        return len(self.rows)


# Gives the chunks anew at every call, so that a selector can pass over its input several times.
ChunkSource = Callable[[], Iterable[Chunk]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalColumn:
    """Numbers made elsewhere, keyed by uid.

    `path` is a parquet file with the columns `uid` (32 hexadecimal digits) and `column`, or a
    DataComp subset file (`.npy`), whose value is how often it lists a uid; `column` is then None.
    """

    path: str
    column: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """What the chunks of a selector must carry beside rows and uids."""

    features: tuple[str, ...] = ()  # feature keys, such as "l14_img"
    captions: bool = False
    column: ExternalColumn | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The answer of a selector for n samples."""

    rows: np.ndarray  # int64 [n]
    multiplicities: np.ndarray  # int64 [n], how often each is kept; 0 drops it
    scores: np.ndarray | None = None  # float32 [n], where the selector has scores


def check_choice(owner: str, choice: Choice, *, samples: int) -> Choice:
    """Return the answer of a selector if it is one: distinct rows in range, whole multiplicities.

    Raises:
        TypeError, ValueError: `owner` broke its contract; a fault of its code.
    """
    rows, kept = choice.rows, choice.multiplicities
    if rows.dtype != np.int64 or kept.dtype != np.int64:
        raise TypeError(f"{owner}.select must answer with int64. Got {rows.dtype}, {kept.dtype}.")
    if rows.shape != kept.shape or rows.ndim != 1:
        raise ValueError(
            f"{owner}.select must answer with one multiplicity a row. "
            f"Got {rows.shape} and {kept.shape}."
        )
    if len(rows) and (rows.min() < 0 or rows.max() >= samples or len(np.unique(rows)) < len(rows)):
        raise ValueError(f"{owner}.select must answer with distinct rows in [0, {samples}).")
    if len(kept) and kept.min() < 0:
        raise ValueError(f"{owner}.select must answer with multiplicities of at least 0.")
    return choice


class Selector(ABC):
    """A set function on samples: which are kept, and how often."""

    @property
    def requires(self) -> Requirements:
        """What its chunks must carry. Rows and uids are always there."""
        return Requirements()

    @abstractmethod
    def select(self, source: ChunkSource) -> Choice:
        """Decide about all samples of `source`.

        The answer must not depend on how the samples are cut into chunks, nor on their order.
        """


class ScoreSelector(Selector):
    """A selector that gives each sample one number, higher is better, and applies a rule to it.

    A method implements `score`, and `fit` if it gathers statistics first; everything else is here.
    """

    def __init__(
        self,
        *,
        fraction: float | None = None,
        threshold: float | None = None,
        rule: Rule | None = None,
    ) -> None:
        """Set the rule.

        Args:
            fraction: keep the best int(n * fraction) of n samples, in (0, 1].
            threshold: keep the samples with a score of at least this.
            rule: any other rule. Exactly one of the three must be given.
        """
        self.rule = make_rule(
            type(self).__name__, fraction=fraction, threshold=threshold, rule=rule
        )

    def fit(self, source: ChunkSource) -> None:
        """Gather what scoring needs from one or more passes over the input. Default: nothing."""

    @abstractmethod
    def score(self, chunk: Chunk) -> Tensor:
        """The scores of a chunk, float32 [n], higher is better; NaN means "cannot be judged".

        Each number depends on its own sample and on what `fit` gathered, not on its chunk.
        """

    def checked_score(self, chunk: Chunk) -> np.ndarray:
        """Call `score` without gradients and check its answer: float32 [n] as an array.

        Raises:
            TypeError, ValueError: the method broke its contract; a fault of its code.
        """
        with torch.no_grad():
            scores = self.score(chunk)
        if not isinstance(scores, Tensor) or scores.dtype != torch.float32:
            raise TypeError(f"{type(self).__name__}.score must return a float32 tensor")
        if scores.shape != (len(chunk),):
            raise ValueError(
                f"{type(self).__name__}.score must return [{len(chunk)}] scores for a chunk of "
                f"{len(chunk)} samples. Got {list(scores.shape)}."
            )
        return scores.cpu().numpy()

    def select(self, source: ChunkSource) -> Choice:
        """Fit, score and choose in memory. The pool's engine does the same with files between."""
        self.fit(source)
        chunks = [(chunk.rows, chunk.uids, self.checked_score(chunk)) for chunk in source()]
        rows, uids, scores = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
        return Choice(rows=rows, multiplicities=self.rule(scores, uids), scores=scores)


def make_rule(
    owner: str, *, fraction: float | None, threshold: float | None, rule: Rule | None
) -> Rule:
    """The rule that a score selector was asked for; exactly one of the three must be given."""
    options = {"fraction": fraction, "threshold": threshold, "rule": rule}
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1:
        raise InputError(
            f"{owner} needs exactly one of selector.fraction, selector.threshold and "
            f"selector.rule. Got {' and '.join(given) or 'none of them'}; set the others to null."
        )
    if fraction is not None:
        return TopFraction(fraction)
    if threshold is not None:
        return Threshold(threshold)
    return cast(Rule, rule)
