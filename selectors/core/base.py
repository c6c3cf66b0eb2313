"""What a selector is, and the two base classes.

A selector decides how often each sample of a source is kept. A `ScoreSelector` gives every sample
one number (higher is better) and leaves the decision to a rule; any other set function derives from
`Selector` itself. What a selector reads is in `siftclip.selectors.core.source`.
"""

from __future__ import annotations

import functools
import inspect
import time
from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor

from siftclip.errors import InputError, ParameterError, check_names
from siftclip.ranks import sum_arrays
from siftclip.selectors.core.arrays import GIVEN, Array, Arrays, OtherArrays, array_source
from siftclip.selectors.core.conversion import kind_of
from siftclip.selectors.core.description import ARGUMENTS
from siftclip.selectors.core.feature_sets import bind_features
from siftclip.selectors.core.rules import Of, Rule, can_be_kept, threshold_rule, top_fraction
from siftclip.selectors.core.source import (
    Chunk,
    ExternalColumn,
    FeatureFile,
    Requirements,
    Source,
    WorkUnit,
)
from siftclip.selectors.core.sub_batch import SubBatch, check_draw, draw_by_score

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "Choice",
    "Chunk",
    "ExternalColumn",
    "FeatureFile",
    "Requirements",
    "ScoreSelector",
    "Selector",
    "Source",
    "SubBatch",
    "WorkUnit",
    "draw",
    "run",
]

S = TypeVar("S", bound="Selector")

_MANY_TIES = 0.1  # of what is kept: so many of one score at the cut, and uids decide, are told
_NEARLY_ALL = 0.99  # of the samples: a selector that keeps so many, or drops so many, says so


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The answer of a selector: one entry per sample of the source, in the order of its rows.

    Attributes:
        multiplicities: int64 [n], how often each is kept; 0 drops it.
        scores: float32 [n], where the selector has scores.
        weights: float32 [n], what kept samples count in the loss; None: 1.
    """

    multiplicities: np.ndarray
    scores: np.ndarray | None = None
    weights: np.ndarray | None = None


def product_of_weights(*weights: np.ndarray | None) -> np.ndarray | None:
    """Return what samples count after several decisions, float32 [n]; None stands for 1 of each."""
    given = [values for values in weights if values is not None]
    return np.multiply.reduce(given) if given else None


def check_choice(owner: str, choice: Choice, *, samples: int, weighs: bool = False) -> Choice:
    """Return the answer of a selector if it is one.

    Args:
        owner: the class of the selector.
        choice: its answer.
        samples: of its source.
        weighs: whether the selector declares that it weighs samples.

    Raises:
        InputError: it weighs samples and does not declare it.
        TypeError, ValueError: `owner` broke its contract; a fault of its code.
    """
    kept = choice.multiplicities
    if kept.dtype != np.int64:
        raise TypeError(f"{owner}.select must answer with int64. Got {kept.dtype}.")
    if kept.shape != (samples,):
        raise ValueError(
            f"{owner}.select must answer with one multiplicity for each of {samples} samples. "
            f"Got {kept.shape}."
        )
    if len(kept) and kept.min() < 0:
        raise ValueError(f"{owner}.select must answer with multiplicities of at least 0.")
    weights = choice.weights
    if weights is None:
        return choice
    if not weighs:
        raise InputError(
            f"{owner} answers with weights and does not declare that it weighs samples, so that a "
            f"loss that cannot use weights would not be refused. Write `weighs = True` into the "
            f"class {owner}, or let it answer without weights."
        )
    if weights.dtype != np.float32:
        raise TypeError(f"{owner}.select must answer with weights of float32. Got {weights.dtype}.")
    if weights.shape != kept.shape:
        raise ValueError(
            f"{owner}.select must answer with one weight for each of {samples} samples. "
            f"Got {weights.shape}."
        )
    of_kept = weights[kept > 0]
    wrong = of_kept[~(np.isfinite(of_kept) & (of_kept >= 0))]
    if len(wrong):
        raise ValueError(
            f"{owner}.select must give what it keeps finite weights of at least 0. Got {wrong[0]}."
        )
    return choice


def run(selector: Selector, source: Source) -> Choice:
    """Let a selector decide, check its answer, report it to the source, and say what is odd.

    Every selector comes by here, the members of a composition too.

    Raises:
        TypeError, ValueError: the selector broke its contract; a fault of its code.
    """
    require_source(source, selector)
    start = time.perf_counter()
    owner = type(selector).__name__
    choice = check_choice(
        owner, selector.select(source), samples=len(source), weighs=selector.weighs
    )
    source.report(selector, choice, len(source), time.perf_counter() - start)
    for text in oddities(selector, choice, len(source.whole)):
        source.warn(f"{owner}: {text}")
    return choice


def score_faults(scores: np.ndarray) -> list[str]:
    """Say how many of the scores, float [n], exclude their samples from every selection."""
    unscored, never = int(np.isnan(scores).sum()), int(np.isneginf(scores).sum())
    faults = []
    if unscored:
        faults.append(f"{unscored} of {len(scores)} samples have no score and cannot be selected")
    if never:
        faults.append(f"{never} of {len(scores)} samples have the score -inf and are never kept")
    return faults


def oddities(selector: Selector, choice: Choice, pool_samples: int) -> list[str]:
    """Describe what is odd about a choice: bad scores, a rule without effect, a missed number.

    Args:
        selector: that has made the choice.
        choice: of n samples, which earlier stages have left of the pool.
        pool_samples: of the whole pool.
    """
    samples = len(choice.multiplicities)
    if not samples:
        return []
    asked = selector.asked_samples(samples, pool_samples)
    kept, distinct = int(choice.multiplicities.sum()), np.count_nonzero(choice.multiplicities)
    texts = selector.faults(samples, pool_samples)
    if choice.scores is not None and isinstance(selector, ScoreSelector):
        texts += score_faults(choice.scores)
    share = f"{distinct} of {samples} samples ({100 * distinct / samples:.3g} %)"
    if distinct >= _NEARLY_ALL * samples and kept == distinct:
        if not selector.keeps_all:
            texts.append(f"keeps {share}: it changes next to nothing")
    elif asked is not None and kept < asked:
        texts.append(f"keeps {kept} samples where {asked} were asked for: no others can be kept")
    elif asked is None and distinct < (1 - _NEARLY_ALL) * samples:
        texts.append(f"keeps {share}")
    elif distinct < (1 - _NEARLY_ALL) * min(samples, kept):
        texts.append(f"keeps {share}, each {kept / distinct:.3g} times on average")
    if choice.scores is not None and kept and isinstance(selector, ScoreSelector):
        texts += _ties_at_cut(choice.scores, choice.multiplicities > 0)
    return texts


def _ties_at_cut(scores: np.ndarray, kept: np.ndarray) -> list[str]:
    """Say whether the order of uids, not the scores, float [n], has decided about many samples."""
    lowest = scores[kept].min()
    equal = scores == lowest
    if np.nanmax(scores[~kept], initial=-np.inf) > lowest:  # random draws: no cut
        return []
    ties, dropped = int(equal.sum()), int((equal & ~kept).sum())
    if not dropped or ties - dropped < _MANY_TIES * int(kept.sum()):
        return []
    return [
        f"{ties} of {len(scores)} samples have the same score, {lowest:g}, of which "
        f"{ties - dropped} are kept: their uids decide, and not the score"
    ]


def draw(selector: Selector, source: Source, sub_batch: SubBatch) -> Choice:
    """Let a selector choose a sub-batch, and check its answer.

    Raises:
        InputError: it cannot, or has not chosen exactly that many.
        TypeError, ValueError: the selector broke its contract; a fault of its code.
    """
    owner = type(selector).__name__
    choice = check_choice(
        owner, selector.draw(source, sub_batch), samples=len(source), weighs=selector.weighs
    )
    check_draw(owner, choice.multiplicities, sub_batch)
    if (
        choice.scores is not None
        and not can_be_kept(choice.scores[choice.multiplicities > 0]).all()
    ):
        source.warn(
            f"{owner}: a super-batch has too few samples with a score above -inf. The sub-batch is "
            "filled up with samples without a score, or of score -inf, since it has a fixed size."
        )
    return choice


class _NamesArguments(ABCMeta):
    """Says which argument was meant where a selector is built with one that it does not have."""

    @property
    def __signature__(cls) -> inspect.Signature:
        """That of the constructor, which inspect would not look at beside a `__call__`."""
        if cls.__init__ is object.__init__:  # type: ignore[misc]  # a class, not an object
            return inspect.Signature()
        signature = inspect.signature(cls.__init__)  # type: ignore[misc]  # a class, not an object
        _, *parameters = signature.parameters.values()  # without the selector itself
        return signature.replace(parameters=parameters)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls.__init__ is object.__init__:  # type: ignore[misc]  # which would pass them over
            inspect.Signature().bind(*args)
            check_names(cls, kwargs)
        try:
            return super().__call__(*args, **kwargs)
        except TypeError:  # of a base class, which names another class and no argument that is near
            if not args:
                check_names(cls, kwargs)
            raise


_TAKE_SOURCES = ("select", "draw", "fit", "score_source")  # methods whose first argument is one


def require_source(source: object, owner: object) -> None:
    """Refuse what is no source, such as an array.

    Args:
        source: what was given.
        owner: whose argument it is, for the message.

    Raises:
        ParameterError: it is none.
    """
    if not isinstance(source, Source):
        raise ParameterError(
            "must be a source of samples, such as a MemorySource",
            owner=owner,
            parameter="source",
            got=kind_of(source),
            way_out="The method scores(images, texts) scores arrays, and siftclip.select selects "
            "from them.",
        )


def _taking_a_source(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method of a selector so that its source is checked."""

    @functools.wraps(method)
    def checked(self: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        require_source(source, self)
        return method(self, source, *args, **kwargs)

    return checked


class Selector(metaclass=_NamesArguments):
    """A set function on samples: which are kept, and how often.

    The public attributes of an instance are its parameters, and stand for its answer: what it has
    worked out is reused where they are equal. State belongs in attributes with an underscore.
    """

    loaded_ns: ClassVar[int]  # since the epoch

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Take note of when the code was loaded: what its file says later is not what runs.

        What is handed to its methods in place of a source is told before they fail by it.
        """
        super().__init_subclass__(**kwargs)
        cls.loaded_ns = time.time_ns()
        for name in _TAKE_SOURCES:
            if inspect.isfunction(vars(cls).get(name)):
                setattr(cls, name, _taking_a_source(vars(cls)[name]))

    def __new__(cls: type[S], *args: Any, **kwargs: Any) -> S:
        """Take note of the arguments, which count where no public attribute holds them."""
        selector = super().__new__(cls)
        with suppress(TypeError):  # __init__ says it better
            signature = inspect.signature(cls.__init__)
            arguments = signature.bind(selector, *args, **kwargs).arguments
            arguments.pop(next(iter(arguments)))  # the selector itself
            for name, parameter in signature.parameters.items():
                if parameter.kind is parameter.VAR_KEYWORD:
                    arguments |= arguments.pop(name, {})
            object.__setattr__(selector, ARGUMENTS, arguments)
        return selector

    @property
    def requires(self) -> Requirements:
        """What it reads itself. Rows and uids are always there."""
        return Requirements()

    @property
    def weighs(self) -> bool:
        """Whether its choices may have weights. A class that weighs says `weighs = True`.

        It is asked before any work, so that losses that cannot use weights are refused in time.
        """
        return False

    @property
    def keeps_all(self) -> bool:
        """Whether it was asked to keep every sample."""
        return bool(getattr(getattr(self, "rule", None), "keeps_all", False))

    def asked_samples(self, left_samples: int, pool_samples: int) -> int | None:
        """Return how many samples to keep, repetitions counted; None if it decides by itself.

        By default its `rule` says so, if it has one.

        Args:
            left_samples: of the source that it is to select from.
            pool_samples: of the whole pool.
        """
        asked = getattr(getattr(self, "rule", None), "asked_samples", None)
        return None if asked is None else int(asked(left_samples, pool_samples))

    def faults(self, left_samples: int, pool_samples: int) -> list[str]:
        """List what makes the parameters meaningless for these sizes; by default the rule's."""
        of_rule = getattr(getattr(self, "rule", None), "faults", None)
        return [] if of_rule is None else list(of_rule(left_samples, pool_samples))

    @abstractmethod
    def select(self, source: Source) -> Choice:
        """Decide about all samples of `source`; called on every rank, with the same answer.

        The answer must not depend on how the samples are cut into chunks, nor on their order.
        """

    def draw(self, source: Source, sub_batch: SubBatch) -> Choice:
        """Choose exactly a sub-batch of a super-batch; called on every rank, with the same answer.

        What the selector says about fractions and rules does not apply: `sub_batch` does.

        Raises:
            InputError: the selector decides by itself how many samples it keeps.
        """
        raise InputError(
            f"{type(self).__name__} decides by itself how many samples it keeps, and cannot be "
            "used at every step. Use a selector with scores, or Jest; or this one once, every "
            "epoch or every N steps."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned in training: tensors and plain values. Default: nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        return None


class RuleOptions(TypedDict, total=False):
    """The parameters of every score selector, which `ScoreSelector` explains."""

    fraction: float | None
    threshold: float | None
    rule: Rule | None
    of: Of


class ScoreSelector(Selector):
    """A selector that gives each sample one number, higher is better, and applies a rule to it.

    A method implements `score`, and `fit` if it gathers statistics first; everything else is here.

    Example:
        >>> import torch
        >>> from siftclip.selectors import Requirements, ScoreSelector
        >>> class CaptionLength(ScoreSelector):
        ...     requires = Requirements(captions=True)
        ...     def score(self, chunk):
        ...         return torch.tensor([float(len(caption)) for caption in chunk.captions])
        >>> CaptionLength(fraction=0.5).scores(captions=["a cat", "a red car"])
        array([5., 9.], dtype=float32)
    """

    passes = 1  # the score of a sample is the mean of its values in so many passes

    def __init__(
        self,
        *,
        fraction: float | None = None,
        threshold: float | None = None,
        rule: Rule | None = None,
        of: Of = "pool",
    ) -> None:
        """Set the rule.

        Args:
            fraction: keep the best int(n * fraction) of n samples, in (0, 1].
            threshold: keep the samples with a score of at least this.
            rule: any other rule. Exactly one of the three must be given.
            of: what n counts: the samples of the whole "pool", or those that earlier stages have
                "left".
        """
        self.rule = make_rule(self, fraction=fraction, threshold=threshold, rule=rule, of=of)

    def fit(self, source: Source) -> None:
        """Gather what scoring needs from one or more passes over the input. Default: nothing."""

    def score(self, chunk: Chunk) -> Tensor:
        """Score a chunk: float32 [n], higher is better; NaN means "no score".

        -inf means "never": no rule keeps it, even where it would need it to reach its fraction.
        +inf is the best. A statistic of scores leaves all three out.

        Each number depends on its own sample and on what `fit` gathered, not on its chunk. Samples
        that are not `chunk.usable()` get NaN from the caller, whatever is answered for them.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement score or score_task")

    def tasks(self, source: Source, pass_number: int) -> Sequence[WorkUnit]:
        """Split a pass into tasks: each sample that can be scored is in one task."""
        return source.tasks(self.requires)

    def score_task(self, source: Source, task: WorkUnit) -> Tensor:
        """Compute the values of the samples of a task, float32 [m]: `score` of its chunks."""
        values = [self.checked_score(chunk) for chunk in source.chunks(task.rows, self.requires)]
        return torch.cat(values) if values else torch.empty(0)

    def checked_score(self, chunk: Chunk) -> Tensor:
        """Call `score` and check its answer, float32 [n]; NaN for samples that are not usable.

        Raises:
            TypeError, ValueError: the method broke its contract; a fault of its code.
        """
        scores = self.score(chunk)
        if not isinstance(scores, Tensor) or scores.dtype != torch.float32:
            got = kind_of(scores) if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            raise TypeError(
                f"{type(self).__name__}.score must return a float32 tensor [{len(chunk)}]. "
                f"Got {got}. Compute in float32: features come as they are stored, often in "
                "float16, and chunk.features[key].float() converts them."
            )
        if scores.shape != (len(chunk),):
            raise ValueError(
                f"{type(self).__name__}.score must return [{len(chunk)}] scores for a chunk of "
                f"{len(chunk)} samples. Got {list(scores.shape)}."
            )
        return scores.masked_fill(~chunk.usable().to(scores.device), torch.nan)

    @torch.no_grad()
    def scores(
        self,
        images: Source | Arrays | None = None,
        texts: Array | None = None,
        **others: Unpack[OtherArrays],
    ) -> np.ndarray:
        """Fit, and score all samples: float32 [n], NaN for those without a score.

        Of a source the tasks are shared among the ranks, and what was kept of an earlier call is
        not done again.

        Args:
            images: a source; or float [n, d] of numpy or torch, or a mapping of arrays by key, see
                `siftclip.selectors.core.arrays.array_source`.
            texts: float [n, e], with arrays.
            **others: `captions`, `sizes`, `column`, `uids`, `files` in the same way.

        Raises:
            InputError: what the selector reads is missing, or shapes do not fit together.
        """
        if isinstance(images, Source):
            return self.score_source(images)
        bound = bind_features(self, GIVEN)
        source = array_source(bound.requires, owner=self, images=images, texts=texts, **others)
        return bound.scores(source)

    def score_source(self, source: Source) -> np.ndarray:
        """Fit, and score all samples of a source: what `scores` does with one."""
        cache = source.cache(self)
        fitted = False
        total = np.zeros(len(source), dtype=np.float64 if self.passes > 1 else np.float32)
        for number in range(self.passes):
            tasks = self.tasks(source, number)  # of one pass at a time: they hold all its rows
            values = np.zeros(len(source), dtype=np.float32)
            todo = []
            for task in source.mine(tasks):
                kept = cache.get(task.name)
                if kept is None:
                    todo.append(task)
                else:
                    values[source.index_of(task.rows)] = kept["values"]
            # On every rank or on none, because fitting may wait for the other ranks.
            if not fitted and int(source.ranks.sum(torch.tensor(len(todo)))) > 0:
                self.fit(source)
                fitted = True
            label = type(self).__name__ + (
                f" {number + 1}/{self.passes}" if self.passes > 1 else ""
            )
            with source.bar(sum(len(task.rows) for task in todo), label) as bar:
                for task in todo:
                    of_task = self.score_task(source, task).float().cpu().numpy()
                    cache.put(task.name, values=of_task)
                    values[source.index_of(task.rows)] = of_task
                    bar.update(len(task.rows))
            np.add(total, _of_all_ranks(source, tasks, values), out=total)
        mean: np.ndarray = np.divide(total, self.passes)
        return mean.astype(np.float32)

    def select(self, source: Source) -> Choice:
        """Score the samples and apply the rule."""
        scores = self.scores(source)
        kept = self.rule(scores, source.uids, len(source.whole))
        return Choice(multiplicities=kept, scores=scores)

    def draw(self, source: Source, sub_batch: SubBatch) -> Choice:
        """Score the samples, and take the best of each group or draw by score."""
        scores = self.scores(source)
        kept = draw_by_score(scores, source.uids, sub_batch)
        return Choice(multiplicities=kept, scores=scores)


def _of_all_ranks(source: Source, tasks: Sequence[WorkUnit], values: np.ndarray) -> np.ndarray:
    """Share the values of a pass with all ranks: float32 [n], NaN where no rank has a value.

    Ranks add arrays of which a single one is not zero in any place, so that the sum is exact.
    """
    values = sum_arrays(source.ranks, values)
    unseen = np.ones(len(source), dtype=bool)
    for task in tasks:
        unseen[source.index_of(task.rows)] = False
    values[unseen] = np.nan
    return values


def make_rule(
    owner: object,
    *,
    fraction: float | None,
    threshold: float | None,
    rule: Rule | None,
    of: Of = "pool",
) -> Rule:
    """Build the rule that a score selector asks for; exactly one of the three must be given."""
    options = {"fraction": fraction, "threshold": threshold, "rule": rule}
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1:
        raise ParameterError(
            "needs exactly one of fraction, threshold and rule",
            owner=owner,
            value={name: options[name] for name in given},
            got=" and ".join(given) or "none of them",
            way_out="Set the others to null." if given else "A fraction of 0.3 is usual.",
        )
    if fraction is not None:
        return top_fraction(owner, fraction, of)
    if of != "pool":
        raise ParameterError("belongs to fraction", owner=owner, parameter="of", value=of)
    if threshold is not None:
        return threshold_rule(owner, threshold)
    if not callable(rule):
        raise ParameterError(
            "must be a rule, such as a TopFraction",
            owner=owner,
            parameter="rule",
            value=rule,
            way_out="Most selectors need a fraction alone.",
        )
    return rule
