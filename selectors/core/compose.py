"""Selectors made of selectors: one after another, sets, rank sums and linear mixes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from siftclip.errors import ParameterError, require_finite
from siftclip.selectors.core.base import (
    Choice,
    Requirements,
    RuleOptions,
    ScoreSelector,
    Selector,
    Source,
    product_of_weights,
    run,
)
from siftclip.selectors.core.description import nested

if TYPE_CHECKING:
    from typing_extensions import Unpack

S = TypeVar("S", bound=Selector)

# In their order; names serve to address them, as in `stages.normsim.fraction`, and are no
# parameters of the selection.
Selectors = Iterable[Any] | Mapping[str, Any]


def union(selectors: Iterable[Selector]) -> Requirements:
    """Return what several selectors read together."""
    return merge([selector.requires for selector in selectors])


def merge(needs: Sequence[Requirements]) -> Requirements:
    """Merge what several selectors need into what they read together.

    Each of them asks its source for what it reads itself, so this only tells which inputs must be
    there. `Requirements` has room for one column of each kind: of several different ones none is
    named.
    """
    columns = {need.column for need in needs if need.column is not None}
    lists = {need.lists for need in needs if need.lists is not None}
    return Requirements(
        features=tuple(dict.fromkeys(key for need in needs for key in need.features)),
        captions=any(need.captions for need in needs),
        sizes=any(need.sizes for need in needs),
        column=columns.pop() if len(columns) == 1 else None,
        lists=lists.pop() if len(lists) == 1 else None,
        files=tuple(dict.fromkeys(file for need in needs for file in need.files)),
    )


def require_selectors(
    owner: object, parameter: str, selectors: Selectors, kind: type[S]
) -> tuple[S, ...]:
    """Return the items of a parameter as a tuple if there is one, and each of them is a `kind`.

    See `require_selector`.
    """
    if not isinstance(selectors, Iterable) or isinstance(selectors, str):
        rule = "must be selectors: a list of them, or a mapping of names to them"
        raise ParameterError(rule, owner=owner, parameter=parameter, value=selectors)
    named = selectors if isinstance(selectors, Mapping) else dict(enumerate(selectors))
    if not named:
        rule = "must name at least one selector"
        raise ParameterError(rule, owner=owner, parameter=parameter, value=selectors, got="none")
    return tuple(
        require_selector(owner, f"{parameter}.{name}", selector, kind)
        for name, selector in named.items()
    )


def require_selector(owner: object, parameter: str, selector: object, kind: type[S]) -> S:
    """Return a parameter of `owner` if it is a `kind`.

    Of `ScoreSelector`s, scores alone are used, so that one that weighs samples is refused.
    """
    given = type(selector).__name__
    if not isinstance(selector, kind):
        raise ParameterError(
            f"must be a {kind.__name__}",
            owner=owner,
            parameter=parameter,
            value=selector,
            got=given,
            way_out="In a configuration it needs a _target_ that names such a class.",
        )
    if issubclass(kind, ScoreSelector) and selector.weighs:
        raise ParameterError(
            "must not weigh what it keeps: here its scores alone count, and its weights would be "
            "lost",
            owner=owner,
            parameter=parameter,
            value=selector,
            got=given,
            way_out="Use a selector without weights, or put this one into a composition of "
            "choices, such as Then.",
        )
    return selector


def require_independent(owner: object, parameter: str, selectors: Sequence[Selector]) -> None:
    """Refuse members, at any depth, that weigh samples and draw with the same seed.

    Weights multiply, which is right for draws that know nothing of each other. With equal draws, a
    sample that survives one survives the other, and its weight is too large.
    """
    seeds: dict[int, str] = {}
    for member in nested(selectors, Selector):  # type: ignore[type-abstract]
        seed = getattr(member, "seed", None)
        if not member.weighs or not isinstance(seed, int):
            continue
        name = type(member).__name__
        if seed in seeds:
            raise ParameterError(
                f"must draw with different seeds: {seeds[seed]} and {name} both weigh what they "
                f"keep at random, and have the same seed={seed}, so that their draws are equal and "
                "the product of their weights is too large",
                owner=owner,
                parameter=parameter,
                way_out="Give each another seed.",
            )
        seeds[seed] = name


def ordinal_ranks(scores: np.ndarray, uids: np.ndarray) -> np.ndarray:
    """Rank each sample from the worst, 0, to the best, n - 1: int64 [n].

    Of equal scores the smaller uid is the better one, as in `rules.keep_top`.

    Args:
        scores: float [n], no NaN.
        uids: uint64 [n, 2].
    """
    ranks = np.empty(len(scores), dtype=np.int64)
    ranks[np.lexsort((~uids[:, 1], ~uids[:, 0], scores))] = np.arange(len(scores))
    return ranks


def rank_sum(
    scores: Sequence[np.ndarray], uids: np.ndarray, weights: Sequence[float]
) -> np.ndarray:
    """Compute the weighted sum of the ranks that samples have by several scores: float64 [n].

    The released code of negCLIPLoss and NormSim (arXiv 2405.19547) writes such a set with equal
    weights as `sum_rank`; there, equal scores get their ranks by the order of the files.

    Args:
        scores: k arrays float [n]. A sample with -inf in one gets -inf, whatever the weight, and
            else one with a NaN gets NaN; neither has a rank in the others.
        uids: uint64 [n, 2], which decide between equal scores.
        weights: k finite numbers.
    """
    total = _verdicts(scores)
    scored = np.flatnonzero(total == 0.0)
    for values, weight in zip(scores, weights, strict=True):
        total[scored] += weight * ordinal_ranks(values[scored], uids[scored])
    return total


def mix_scores(scores: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Compute the weighted sum of standardised scores: float64 [n].

    Every score is brought to mean 0 and standard deviation 1 (a constant one to 0) over the
    samples for which all scores are finite. This is the form of M-FLYT (arXiv 2503.08805), whose
    weights are learned.

    Args:
        scores: k arrays float [n]. A sample with -inf in one gets -inf, whatever the weight, and
            else one with a NaN gets NaN. +inf gives +inf, or -inf with a negative weight.
        weights: k finite numbers.
    """
    total = _verdicts(scores)
    scored = total == 0.0
    finite = np.isfinite(np.stack(scores)).all(0)
    for values, weight in zip(scores, weights, strict=True):
        best = scored & np.isposinf(values)
        if weight < 0:
            total[best] = -np.inf
        elif weight > 0:
            total[best & (total > -np.inf)] = np.inf
        if not finite.any():
            continue
        # Sums over sorted values do not depend on the order of the samples, not even by rounding.
        ordered = np.sort(values[finite]).astype(np.float64)
        mean = ordered.mean()
        spread = np.sqrt(np.square(ordered - mean).mean()) if ordered[0] < ordered[-1] else np.inf
        here = scored & np.isfinite(values)
        total[here] += weight * ((values[here] - mean) / spread)
    return total


def _verdicts(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Return -inf where a score is -inf, else NaN where one is NaN, else 0: float64 [n]."""
    values = np.stack(scores)
    unscored = np.where(np.isnan(values).any(0), np.nan, 0.0)
    return np.where(np.isneginf(values).any(0), -np.inf, unscored)


class Then(Selector):
    """Stages, each of which sees only what those before it have kept.

    Multiplicities multiply, and so do weights: a stage that prunes at random and weighs up what it
    keeps makes up for its own losses alone.

    Example:
        >>> import numpy as np
        >>> import siftclip
        >>> from siftclip.selectors import CaptionFilter, External, Then
        >>> best = External(path=None, column="score", fraction=0.5, of="left")
        >>> captions, scores = ["a red car", "a", "b", "two dogs"], np.array([1, 8, 9, 2])
        >>> selector = Then(stages=[CaptionFilter(), best])
        >>> siftclip.select(captions=captions, column=scores, selector=selector).rows
        array([3])
    """

    def __init__(self, *, stages: Selectors) -> None:
        """Give the stages, in order. Their fractions are `of` the pool, or of what is left."""
        self.stages = require_selectors(self, "stages", stages, Selector)  # type: ignore[type-abstract]
        require_independent(self, "stages", self.stages)

    @property
    def requires(self) -> Requirements:
        return union(self.stages)

    @property
    def weighs(self) -> bool:
        return any(stage.weighs for stage in self.stages)

    def select(self, source: Source) -> Choice:
        """Select stage by stage; the scores are the last stage's, NaN for what it has not seen."""
        kept = np.ones(len(source), dtype=np.int64)
        scores = weights = None
        for stage in self.stages:
            index = np.flatnonzero(kept)
            if not len(index):
                break
            choice = run(stage, source.restrict(source.rows[index]))
            kept[index] *= choice.multiplicities
            if choice.weights is not None:
                of_stage = np.ones(len(source), dtype=np.float32)
                of_stage[index] = choice.weights
                weights = product_of_weights(weights, of_stage)
            scores = None
            if choice.scores is not None:
                scores = np.full(len(source), np.nan, dtype=np.float32)
                scores[index] = choice.scores
        return Choice(multiplicities=kept, scores=scores, weights=weights)


class _Together(Selector):
    """Selectors that see the same samples."""

    def __init__(self, *, selectors: Selectors) -> None:
        self.selectors = require_selectors(self, "selectors", selectors, Selector)  # type: ignore[type-abstract]

    @property
    def requires(self) -> Requirements:
        return union(self.selectors)

    @property
    def weighs(self) -> bool:
        return any(selector.weighs for selector in self.selectors)

    @abstractmethod
    def join(self, choices: Sequence[Choice]) -> Choice:
        """Join the choices of all selectors, about the same samples, into one without scores."""

    def select(self, source: Source) -> Choice:
        return self.join([run(selector, source) for selector in self.selectors])


class And(_Together):
    """What every selector keeps, as often as the one that keeps it least; weights multiply.

    Example:
        >>> import numpy as np
        >>> import siftclip
        >>> from siftclip.selectors import And, CaptionFilter, External
        >>> best = External(path=None, column="score", fraction=0.5)
        >>> selector = And(selectors=[CaptionFilter(), best])
        >>> captions, scores = ["a red car", "a", "b", "two dogs"], np.array([9, 8, 1, 2])
        >>> siftclip.select(captions=captions, column=scores, selector=selector).rows
        array([0])
    """

    def __init__(self, *, selectors: Selectors) -> None:
        super().__init__(selectors=selectors)
        require_independent(self, "selectors", self.selectors)

    def join(self, choices: Sequence[Choice]) -> Choice:
        return Choice(
            multiplicities=np.minimum.reduce([choice.multiplicities for choice in choices]),
            weights=product_of_weights(*(choice.weights for choice in choices)),
        )


class Or(_Together):
    """What any selector keeps, as often as the one that keeps it most, and with its weight.

    Of several that keep a sample so often, the smallest weight counts. A weight above 1 stands for
    samples that were dropped by chance; where another selector keeps a sample for certain, there is
    nothing to make up for. (Of several that prune the same samples at random, no rule is without a
    bias here: what one has dropped does not say with which probability. A warning says so.)

    Example:
        >>> import numpy as np
        >>> import siftclip
        >>> from siftclip.selectors import Or, CaptionFilter, External
        >>> best = External(path=None, column="score", fraction=0.5)
        >>> selector = Or(selectors=[CaptionFilter(), best])
        >>> captions, scores = ["a red car", "a", "b", "two dogs"], np.array([9, 8, 1, 2])
        >>> siftclip.select(captions=captions, column=scores, selector=selector).rows
        array([0, 1, 3])
    """

    def faults(self, left_samples: int, pool_samples: int) -> list[str]:
        weighing = [type(member).__name__ for member in self.selectors if member.weighs]
        if len(weighing) < 2:
            return []
        return [
            f"{' and '.join(weighing)} weigh what they keep, and a sample that several of them "
            "prune at random counts too much: what one has dropped does not say with which "
            "probability. Put them one after another (Then), or weigh with one of them"
        ]

    def join(self, choices: Sequence[Choice]) -> Choice:
        kept = np.maximum.reduce([choice.multiplicities for choice in choices])
        if all(choice.weights is None for choice in choices):
            return Choice(multiplicities=kept)
        offered = [
            np.where(
                choice.multiplicities == kept,
                np.float32(1) if choice.weights is None else choice.weights,
                np.float32(np.inf),
            )
            for choice in choices
        ]
        weights = np.where(kept > 0, np.minimum.reduce(offered), np.float32(1))
        return Choice(multiplicities=kept, weights=weights)


class Minus(Selector):
    """What one selector keeps, without every sample that another one keeps at all.

    Weights are those of the first: the second says which samples go, and none of its own stays.

    Example:
        >>> import numpy as np
        >>> import siftclip
        >>> from siftclip.selectors import External, Minus
        >>> best = External(path=None, column="score", fraction=0.25)
        >>> good = External(path=None, column="score", fraction=0.75)
        >>> scores = np.array([0.9, 0.8, 0.1, 0.2])
        >>> siftclip.select(column=scores, selector=Minus(keep=good, remove=best)).rows
        array([1, 3])
    """

    def __init__(self, *, keep: Selector, remove: Selector) -> None:
        self.keep = require_selector(self, "keep", keep, Selector)  # type: ignore[type-abstract]
        self.remove = require_selector(self, "remove", remove, Selector)  # type: ignore[type-abstract]

    @property
    def requires(self) -> Requirements:
        return union((self.keep, self.remove))

    @property
    def weighs(self) -> bool:
        return self.keep.weighs

    def faults(self, left_samples: int, pool_samples: int) -> list[str]:
        if not self.remove.weighs:
            return []
        return [
            f"what it removes with, {type(self.remove).__name__}, weighs what it keeps, and that "
            "goes: what is left is what it would prune at random, and no weights make up for the "
            "rest"
        ]

    def select(self, source: Source) -> Choice:
        kept = run(self.keep, source)
        removed = run(self.remove, source).multiplicities > 0
        return Choice(
            multiplicities=np.where(removed, 0, kept.multiplicities),
            scores=kept.scores,
            weights=kept.weights,
        )


class Combined(ScoreSelector):
    """A score that is made of the scores of other selectors. The rules of these do not count."""

    def __init__(
        self,
        *,
        selectors: Selectors,
        weights: Iterable[float] | None = None,
        **rule: Unpack[RuleOptions],
    ) -> None:
        """Name the selectors.

        Args:
            selectors: score selectors, each with any rule (`fraction: 1` does).
            weights: one finite number for each; None: 1 for each.
            **rule: `fraction`, `threshold` or `rule`, see `ScoreSelector`.
        """
        super().__init__(**rule)
        self.selectors = require_selectors(self, "selectors", selectors, ScoreSelector)
        given = [1.0] * len(self.selectors) if weights is None else list(weights)
        if len(given) != len(self.selectors):
            raise ParameterError(
                f"must be one number for each of {len(self.selectors)} selectors",
                owner=self,
                parameter="weights",
                value=weights,
                got=str(len(given)),
            )
        self.weights = tuple(require_finite("weights", weight, owner=self) for weight in given)

    @property
    def requires(self) -> Requirements:
        return union(self.selectors)

    @abstractmethod
    def combine(self, scores: Sequence[np.ndarray], uids: np.ndarray) -> np.ndarray:
        """Combine scores float32 [n] of each selector: float64 [n], -inf or NaN where one is."""

    def combined(self, source: Source) -> np.ndarray:
        """Compute the score of every sample before it is rounded to float32: float64 [n]."""
        return self.combine([child.scores(source) for child in self.selectors], source.uids)

    def score_source(self, source: Source) -> np.ndarray:
        return self.combined(source).astype(np.float32)

    def select(self, source: Source) -> Choice:
        """Apply the rule before rounding: float32 would join ranks above 2^24."""
        combined = self.combined(source)
        kept = self.rule(combined, source.uids, len(source.whole))
        return Choice(multiplicities=kept, scores=combined.astype(np.float32))


class RankSum(Combined):
    """Select by the weighted sum of ranks, which takes no notice of the scales of the scores.

    Example:
        >>> import numpy as np
        >>> from siftclip.selectors import ClipScore, External, RankSum
        >>> members = [ClipScore(fraction=1), External(path=None, column="score", fraction=1)]
        >>> selector = RankSum(selectors=members, weights=[2, 1], fraction=0.5)
        >>> images = np.array([[1, 0], [0.8, 0.6], [0, 1]], dtype=np.float32)
        >>> texts = np.array([[1, 0], [1, 0], [1, 0]], dtype=np.float32)
        >>> selector.scores(images, texts, column=np.array([0.1, 0.5, 0.9]))
        array([4., 3., 2.], dtype=float32)
    """

    def combine(self, scores: Sequence[np.ndarray], uids: np.ndarray) -> np.ndarray:
        return rank_sum(scores, uids, self.weights)


class Mix(Combined):
    """Select by a weighted sum of standardised scores, such as M-FLYT (arXiv 2503.08805).

    Example:
        >>> import numpy as np
        >>> from siftclip.selectors import ClipScore, External, Mix
        >>> members = [ClipScore(fraction=1), External(path=None, column="score", fraction=1)]
        >>> selector = Mix(selectors=members, weights=[2, 1], fraction=0.5)
        >>> images = np.array([[1, 0], [0.8, 0.6], [0, 1]], dtype=np.float32)
        >>> texts = np.array([[1, 0], [1, 0], [1, 0]], dtype=np.float32)
        >>> selector.scores(images, texts, column=np.array([0.1, 0.5, 0.9])).round(3)
        array([ 0.627,  0.926, -1.553], dtype=float32)
    """

    def combine(self, scores: Sequence[np.ndarray], uids: np.ndarray) -> np.ndarray:
        return mix_scores(scores, self.weights)
