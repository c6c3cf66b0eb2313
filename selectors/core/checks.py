"""The contract of a selector, as checks that anybody can run on theirs.

    from siftclip.selectors.core.checks import check_selector
    def test_my_selector():
        check_selector(lambda: MySelector(alpha=2.0, fraction=0.3))

A selector that leaves open which features it reads is given some. `CHECKS` holds the checks one by
one, for `pytest.mark.parametrize`.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from siftclip.ranks import OneRank, Ranks
from siftclip.selectors.core.arrays import GIVEN
from siftclip.selectors.core.base import Choice, ScoreSelector, Selector, check_choice
from siftclip.selectors.core.draw_checks import (
    CANDIDATES,
    SHARES,
    SUB_BATCHES,
    can_draw,
    drawing_faults,
    drawn,
    known_logits,
)
from siftclip.selectors.core.feature_sets import bind_features
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.simulated_ranks import on_simulated_ranks
from siftclip.selectors.core.source import Chunk, FeatureFile, ListColumn, Requirements, take

SelectorFactory = Callable[[], Selector]
SAMPLES = 257  # prime, so that no chunk size divides it
TOLERANCE = 1e-5  # of scores when the same samples come in other chunks


def synthetic_chunk(
    requires: Requirements, *, samples: int = SAMPLES, dim: int = 16, seed: int = 0
) -> Chunk:
    """Draw a chunk of random unit features, captions and column values, whatever is asked for."""
    generator = np.random.default_rng([seed, samples, dim])
    features = {}
    for key in requires.features:
        values = generator.standard_normal((samples, dim))
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        features[key] = torch.from_numpy(values.astype(np.float16))
    words = np.array(["red", "seven", "on", "a", "blue", "ground"])
    chunk = Chunk(
        rows=np.arange(samples, dtype=np.int64),
        uids=generator.integers(0, 2**63, size=(samples, 2)).astype(np.uint64),
        features=features,
        captions=[" ".join(generator.choice(words, size=4)) for _ in range(samples)]
        if requires.captions
        else None,
        sizes=generator.integers(100, 900, size=(samples, 2)) if requires.sizes else None,
        column=generator.integers(0, 4, size=samples).astype(np.float64)
        if requires.column
        else None,
    )
    if not requires.lists:
        return chunk
    sizes = generator.integers(0, 4, samples)
    values = generator.integers(0, 9, sizes.sum())
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return replace(chunk, lists=ListColumn(values, offsets))


def synthetic_files(
    requires: Requirements, *, samples: int = 61, dim: int = 16
) -> dict[FeatureFile, torch.Tensor]:
    """Draw random unit features for each feature file that is asked for."""
    files = {}
    for number, file in enumerate(requires.files):
        values = np.random.default_rng([7, number]).standard_normal((samples, dim))
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        files[file] = torch.from_numpy(values.astype(np.float16))
    return files


def _built(make: SelectorFactory) -> Selector:
    """Build a selector; the features that it leaves open get a name."""
    return bind_features(make(), GIVEN)


def _source(chunk: Chunk, selector: Selector, **options: Any) -> MemorySource:
    files = synthetic_files(selector.requires)
    return MemorySource(chunk, files=files, logits=known_logits(selector), trusted=True, **options)


def _select(make: SelectorFactory, chunk: Chunk, size: int = SAMPLES) -> Choice:
    selector = _built(make)
    return selector.select(_source(chunk, selector, chunk_samples=size))


def check_answer(make: SelectorFactory) -> None:
    """Check that every sample gets one multiplicity, int64, at least 0, and something is kept."""
    chunk = synthetic_chunk(_built(make).requires)
    choice = _select(make, chunk)
    assert choice.multiplicities.shape == (len(chunk),), "each sample must be answered once"
    assert choice.multiplicities.dtype == np.int64, "multiplicities must be int64"
    assert (choice.multiplicities >= 0).all(), "multiplicities must be at least 0"
    assert choice.multiplicities.sum() > 0, "nothing was kept of a random chunk"
    if choice.scores is not None:
        assert choice.scores.dtype == np.float32, "scores must be float32"
        assert choice.scores.shape == choice.multiplicities.shape, "one score a sample"


def check_weights(make: SelectorFactory) -> None:
    """Check that weights are declared (`weighs = True`), float32, finite, at least 0, and complete.

    What cannot use weights is refused for a selector that declares them, before any work.
    """
    selector = _built(make)
    assert isinstance(selector.weighs, bool), "weighs must be True or False"
    chunk = synthetic_chunk(selector.requires)
    choice = _select(make, chunk)
    try:
        check_choice(type(selector).__name__, choice, samples=len(chunk), weighs=selector.weighs)
    except (TypeError, ValueError) as error:
        raise AssertionError(str(error)) from None


def _assert_same(first: Choice, second: Choice, message: str = "") -> None:
    """Assert that two answers keep the same samples as often, and with the same weights."""
    assert np.array_equal(first.multiplicities, second.multiplicities), message
    kept = first.multiplicities > 0
    weights, others = (
        np.ones(len(kept)) if choice.weights is None else choice.weights
        for choice in (first, second)
    )
    same = np.allclose(weights[kept], others[kept], rtol=TOLERANCE, atol=0)
    assert same, f"weights differ {message}".strip()


def _numpy_state() -> bytes:
    return pickle.dumps(np.random.get_state())


def check_deterministic(make: SelectorFactory) -> None:
    """Check that two fresh selectors agree, and that neither draws from a global random state."""
    chunk = synthetic_chunk(_built(make).requires)
    torch.manual_seed(1)
    np.random.seed(1)
    before = (torch.get_rng_state(), _numpy_state())
    first = _select(make, chunk)
    after = (torch.get_rng_state(), _numpy_state())
    assert torch.equal(before[0], after[0]), "torch's global random state was used"
    assert before[1] == after[1], "numpy's global random state was used"
    _assert_same(first, _select(make, chunk))


def check_chunk_size(make: SelectorFactory) -> None:
    """Check that the answer does not change with how the samples are cut into chunks."""
    chunk = synthetic_chunk(_built(make).requires)
    whole = _select(make, chunk)
    for size in (1, 64):
        pieces = _select(make, chunk, size)
        if whole.scores is not None and pieces.scores is not None:
            np.testing.assert_allclose(pieces.scores, whole.scores, rtol=0, atol=TOLERANCE)
        _assert_same(pieces, whole, f"chunks of {size}")


def check_half_precision(make: SelectorFactory) -> None:
    """Check that float16 features, as pools have them, are scored in float32.

    The same numbers as float32 features must give the same answer.
    """
    chunk = synthetic_chunk(_built(make).requires)
    exact = {key: values.float() for key, values in chunk.features.items()}
    half, single = _select(make, chunk), _select(make, replace(chunk, features=exact))
    way_out = "compute with chunk.features[key].float()"
    if half.scores is not None and single.scores is not None:
        np.testing.assert_allclose(
            half.scores,
            single.scores,
            rtol=0,
            atol=TOLERANCE,
            err_msg=f"float16 features are not scored in float32: {way_out}",
        )
    _assert_same(half, single, f"float16 and float32 features: {way_out}")


def check_sample_order(make: SelectorFactory) -> None:
    """Check that the answer does not change with the order in which the samples arrive."""
    chunk = synthetic_chunk(_built(make).requires)
    shuffled = take(chunk, np.random.default_rng(3).permutation(len(chunk)))
    _assert_same(_select(make, chunk), _select(make, shuffled))


def check_input_untouched(make: SelectorFactory) -> None:
    """Check that the chunk is not modified."""
    chunk = synthetic_chunk(_built(make).requires)
    original = copy.deepcopy(chunk)
    _select(make, chunk)
    assert np.array_equal(chunk.rows, original.rows)
    assert np.array_equal(chunk.uids, original.uids)
    for key, value in chunk.features.items():
        assert torch.equal(value, original.features[key]), f"features {key!r} were modified"
    if chunk.column is not None and original.column is not None:
        assert np.array_equal(chunk.column, original.column)
    assert chunk.captions == original.captions


def check_picklable(make: SelectorFactory) -> None:
    """Check that the selector survives pickling, which spawned processes need."""
    chunk = synthetic_chunk(_built(make).requires)
    try:
        data = pickle.dumps(make())
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise AssertionError(f"the selector cannot be pickled: {error}") from error
    choice = _select(lambda: pickle.loads(data), chunk)  # noqa: S301 - our own bytes
    _assert_same(choice, _select(make, chunk))


def check_unscored(make: SelectorFactory) -> None:
    """Check that a score selector never keeps a sample whose score is NaN."""
    selector = _built(make)
    if not isinstance(selector, ScoreSelector):
        return
    chunk = synthetic_chunk(selector.requires)
    scores = np.full(len(chunk), np.nan, dtype=np.float32)
    scores[::2] = 1.0
    kept = selector.rule(scores, chunk.uids, len(chunk))
    assert kept[1::2].sum() == 0, "samples whose score is NaN were kept"


def check_single_sample(make: SelectorFactory) -> None:
    """Check that a chunk of one sample is a legal input."""
    choice = _select(make, synthetic_chunk(_built(make).requires, samples=1))
    assert choice.multiplicities.shape == (1,)


def check_few_left(make: SelectorFactory) -> None:
    """Check that earlier stages may leave two samples, one, or none."""
    selector = _built(make)
    chunk = synthetic_chunk(selector.requires)
    source = _source(chunk, selector)
    for samples in (2, 1, 0):
        kept = _built(make).select(source.restrict(chunk.rows[:samples])).multiplicities
        assert kept.shape == (samples,), f"{samples} of a source of {len(chunk)} samples"


def check_draw(make: SelectorFactory) -> None:
    """Check the choice of sub-batches, if the selector says how: `draw`, or by its scores.

    Each group gets as many different samples as it is asked for, with few and with all of them;
    draws are functions of the seed and the uids alone; weights are declared, finite and at least 0.
    """
    selector = _built(make)
    if not can_draw(selector):
        return
    chunk = synthetic_chunk(selector.requires, samples=CANDIDATES)
    torch.manual_seed(1)
    np.random.seed(1)
    before = (torch.get_rng_state(), _numpy_state())
    faults = drawing_faults(
        lambda: _built(make), lambda chunk, **options: _source(chunk, selector, **options), chunk
    )
    for fault in faults:
        raise AssertionError(fault)
    assert torch.equal(before[0], torch.get_rng_state()), "torch's global random state was used"
    assert before[1] == _numpy_state(), "numpy's global random state was used"


def check_ranks(make: SelectorFactory) -> None:
    """Check that 2 and 4 ranks, which are simulated, answer as one, all of them, and in lockstep.

    Their shares of the parts are uneven, and some ranks have none.
    """
    chunk = synthetic_chunk(_built(make).requires)
    for size, part_samples in SHARES:

        def choose(ranks: Ranks, part_samples: int = part_samples) -> Choice:
            selector = _built(make)
            source = _source(chunk, selector, part_samples=part_samples, ranks=ranks)
            return selector.select(source)

        _compare_ranks(size, choose, f"in parts of {part_samples} samples")
    if not can_draw(_built(make)):
        return
    chunk = synthetic_chunk(_built(make).requires, samples=CANDIDATES)
    for size in (2, 4):

        def choose_few(ranks: Ranks) -> Choice:
            selector = _built(make)
            source = _source(chunk, selector, part_samples=CANDIDATES // 4, ranks=ranks)
            return drawn(selector, source, SUB_BATCHES[0])

        _compare_ranks(size, choose_few, "for a sub-batch")


def _compare_ranks(size: int, choose: Callable[[Ranks], Choice], when: str) -> None:
    alone = choose(OneRank())
    try:
        choices = on_simulated_ranks(size, choose)
    except Exception as error:  # a selector of somebody else may fail in any way
        what = (
            str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        )
        raise AssertionError(f"{size} ranks, {when}: {what}") from error
    for rank, choice in enumerate(choices):
        _assert_same(choice, alone, f"rank {rank} of {size} does not answer as one rank, {when}")


CHECKS: tuple[Callable[[SelectorFactory], None], ...] = (
    check_answer,
    check_weights,
    check_deterministic,
    check_chunk_size,
    check_half_precision,
    check_sample_order,
    check_input_untouched,
    check_picklable,
    check_unscored,
    check_single_sample,
    check_few_left,
    check_draw,
    check_ranks,
)


def check_selector(make: SelectorFactory) -> None:
    """Run every check. `make` builds a fresh selector at each call.

    Raises:
        AssertionError: names the check that failed and what is wrong.

    Example:
        >>> from siftclip.selectors import Uniform, check_selector
        >>> check_selector(lambda: Uniform(seed=0, fraction=0.3))  # silent: it keeps the contract
    """
    for check in CHECKS:
        try:
            check(make)
        except AssertionError as error:
            raise AssertionError(f"{check.__name__}: {error}") from error
