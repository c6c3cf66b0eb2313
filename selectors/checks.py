"""The contract of a selector, as checks that anybody can run on theirs.

    from siftclip.selectors.checks import check_selector
    def test_my_selector():
        check_selector(lambda: MySelector(alpha=2.0, fraction=0.3))

`CHECKS` holds the checks one by one, for `pytest.mark.parametrize`.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch

from siftclip.selectors.base import (
    Choice,
    Chunk,
    ChunkSource,
    Requirements,
    ScoreSelector,
    Selector,
)

SelectorFactory = Callable[[], Selector]
SAMPLES = 257  # prime, so that no chunk size divides it
TOLERANCE = 1e-5  # of scores when the same samples come in other chunks


def synthetic_chunk(
    requires: Requirements, *, samples: int = SAMPLES, dim: int = 16, seed: int = 0
) -> Chunk:
    """One chunk of random unit features, captions and column values, whatever is asked for."""
    generator = np.random.default_rng([seed, samples, dim])
    features = {}
    for key in requires.features:
        values = generator.standard_normal((samples, dim))
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        features[key] = torch.from_numpy(values.astype(np.float16))
    words = np.array(["red", "seven", "on", "a", "blue", "ground"])
    return Chunk(
        rows=np.arange(samples, dtype=np.int64),
        uids=generator.integers(0, 2**63, size=(samples, 2)).astype(np.uint64),
        features=features,
        captions=[" ".join(generator.choice(words, size=4)) for _ in range(samples)]
        if requires.captions
        else None,
        column=generator.integers(0, 4, size=samples).astype(np.float64)
        if requires.column
        else None,
    )


def take(chunk: Chunk, index: np.ndarray) -> Chunk:
    """The samples of a chunk at `index`, int64 [m], in that order."""
    return replace(
        chunk,
        rows=chunk.rows[index],
        uids=chunk.uids[index],
        features={key: value[torch.from_numpy(index)] for key, value in chunk.features.items()},
        captions=None if chunk.captions is None else [chunk.captions[i] for i in index],
        column=None if chunk.column is None else chunk.column[index],
    )


def in_pieces(chunk: Chunk, size: int) -> ChunkSource:
    """A source that gives `chunk` in pieces of `size` samples."""

    def source() -> Iterator[Chunk]:
        for start in range(0, len(chunk), size):
            yield take(chunk, np.arange(start, min(start + size, len(chunk))))

    return source


def _select(make: SelectorFactory, chunk: Chunk, size: int = SAMPLES) -> Choice:
    choice = make().select(in_pieces(chunk, size))
    order = np.argsort(choice.rows)
    return Choice(
        rows=choice.rows[order],
        multiplicities=choice.multiplicities[order],
        scores=None if choice.scores is None else choice.scores[order],
    )


def check_answer(make: SelectorFactory) -> None:
    """Every sample gets one multiplicity of at least 0, int64, and something is kept."""
    chunk = synthetic_chunk(make().requires)
    choice = _select(make, chunk)
    assert choice.rows.dtype == np.int64, "rows must be int64"
    assert np.array_equal(choice.rows, chunk.rows), "each sample must be answered exactly once"
    assert choice.multiplicities.dtype == np.int64, "multiplicities must be int64"
    assert (choice.multiplicities >= 0).all(), "multiplicities must be at least 0"
    assert choice.multiplicities.sum() > 0, "nothing was kept of a random chunk"
    if choice.scores is not None:
        assert choice.scores.dtype == np.float32, "scores must be float32"
        assert choice.scores.shape == choice.rows.shape, "one score a sample"


def _numpy_state() -> bytes:
    return pickle.dumps(np.random.get_state())


def check_deterministic(make: SelectorFactory) -> None:
    """Two fresh selectors agree, and neither draws from a global random state."""
    chunk = synthetic_chunk(make().requires)
    torch.manual_seed(1)
    np.random.seed(1)
    before = (torch.get_rng_state(), _numpy_state())
    first = _select(make, chunk)
    after = (torch.get_rng_state(), _numpy_state())
    assert torch.equal(before[0], after[0]), "torch's global random state was used"
    assert before[1] == after[1], "numpy's global random state was used"
    assert np.array_equal(first.multiplicities, _select(make, chunk).multiplicities)


def check_chunk_size(make: SelectorFactory) -> None:
    """How the samples are cut into chunks does not change the answer."""
    chunk = synthetic_chunk(make().requires)
    whole = _select(make, chunk)
    for size in (1, 64):
        pieces = _select(make, chunk, size)
        if whole.scores is not None and pieces.scores is not None:
            np.testing.assert_allclose(pieces.scores, whole.scores, rtol=0, atol=TOLERANCE)
        assert np.array_equal(pieces.multiplicities, whole.multiplicities), f"chunks of {size}"


def check_sample_order(make: SelectorFactory) -> None:
    """The order in which the samples arrive does not change the answer."""
    chunk = synthetic_chunk(make().requires)
    shuffled = take(chunk, np.random.default_rng(3).permutation(len(chunk)))
    first, second = _select(make, chunk), _select(make, shuffled)
    assert np.array_equal(first.multiplicities, second.multiplicities)


def check_input_untouched(make: SelectorFactory) -> None:
    """The chunk is not modified."""
    chunk = synthetic_chunk(make().requires)
    original = copy.deepcopy(chunk)
    make().select(lambda: [chunk])
    assert np.array_equal(chunk.rows, original.rows)
    assert np.array_equal(chunk.uids, original.uids)
    for key, value in chunk.features.items():
        assert torch.equal(value, original.features[key]), f"features {key!r} were modified"
    if chunk.column is not None and original.column is not None:
        assert np.array_equal(chunk.column, original.column)
    assert chunk.captions == original.captions


def check_picklable(make: SelectorFactory) -> None:
    """The selector survives pickling, which processes that are spawned need."""
    chunk = synthetic_chunk(make().requires)
    try:
        data = pickle.dumps(make())
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise AssertionError(f"the selector cannot be pickled: {error}") from error
    copied = pickle.loads(data)  # noqa: S301 - our own bytes
    choice = copied.select(lambda: [chunk])
    assert np.array_equal(choice.multiplicities, _select(make, chunk).multiplicities)


def check_unjudged(make: SelectorFactory) -> None:
    """A score selector never keeps a sample whose score is NaN."""
    selector = make()
    if not isinstance(selector, ScoreSelector):
        return
    chunk = synthetic_chunk(selector.requires)
    scores = np.full(len(chunk), np.nan, dtype=np.float32)
    scores[::2] = 1.0
    kept = selector.rule(scores, chunk.uids)
    assert kept[1::2].sum() == 0, "samples whose score is NaN were kept"


def check_single_sample(make: SelectorFactory) -> None:
    """A chunk of one sample is a legal input."""
    selector = make()
    chunk = synthetic_chunk(selector.requires, samples=1)
    choice = selector.select(lambda: [chunk])
    assert choice.multiplicities.shape == (1,)


CHECKS: tuple[Callable[[SelectorFactory], None], ...] = (
    check_answer,
    check_deterministic,
    check_chunk_size,
    check_sample_order,
    check_input_untouched,
    check_picklable,
    check_unjudged,
    check_single_sample,
)


def check_selector(make: SelectorFactory) -> None:
    """Run every check. `make` builds a fresh selector at each call.

    Raises:
        AssertionError: names the check that failed and what is wrong.
    """
    for check in CHECKS:
        try:
            check(make)
        except AssertionError as error:
            raise AssertionError(f"{check.__name__}: {error}") from error
