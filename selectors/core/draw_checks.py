"""The part of a selector's contract that is about sub-batches and about several ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from siftclip.errors import InputError
from siftclip.selectors.core.base import Choice, Selector, check_choice
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.source import Chunk, Logits, set_name
from siftclip.selectors.core.sub_batch import SubBatch, check_draw

CANDIDATES = 96  # of a super-batch
_LOGITS = Logits(scale=10.0, bias=-1.0)
# Few, many, and all of each group; quotas that differ; the best, and random draws
SUB_BATCHES = (
    SubBatch(samples=6, groups=4),
    SubBatch(samples=6, groups=4, one_less=(1, 3)),
    SubBatch(samples=24, groups=4),
    SubBatch(samples=1, groups=1),
    SubBatch(samples=20, groups=1, temperature=0.0),
    SubBatch(samples=20, groups=2, temperature=0.5, seed=7),
)
# Ranks, and samples of a part: uneven shares of the parts, and ranks without any
SHARES = ((2, 40), (4, 40), (4, 100), (2, 1000))

Build = Callable[[], Selector]
MakeSource = Callable[..., MemorySource]  # of a chunk and options


def can_draw(selector: Selector) -> bool:
    """Return whether a selector says how to choose a sub-batch."""
    return type(selector).draw is not Selector.draw


def known_logits(selector: Selector) -> dict[str, Logits]:
    """Return logits for all features that a selector reads."""
    return {set_name(key): _LOGITS for key in selector.requires.features}


class _RefusedError(Exception):
    """A selector draws in its own way, and not with a temperature."""


def drawn(selector: Selector, source: MemorySource, sub_batch: SubBatch) -> Choice:
    """Let a selector choose a sub-batch; what is wrong with its answer is an AssertionError."""
    owner = type(selector).__name__
    try:
        choice = selector.draw(source, sub_batch)
    except InputError as error:
        if sub_batch.temperature:
            raise _RefusedError from error
        raise AssertionError(f"a sub-batch is refused: {error}") from error
    try:
        check_choice(owner, choice, samples=len(source), weighs=selector.weighs)
        check_draw(owner, choice.multiplicities, sub_batch)
    except (InputError, TypeError, ValueError) as error:
        raise AssertionError(str(error)) from error
    return choice


def drawing_faults(build: Build, source_of: MakeSource, chunk: Chunk) -> Iterator[str]:
    """Yield what is wrong with draws from a super-batch, beside what `drawn` raises."""
    for sub_batch in SUB_BATCHES:
        options = {"part_samples": CANDIDATES // sub_batch.groups}
        selector, source = build(), source_of(chunk, **options)
        try:
            first = drawn(selector, source, sub_batch).multiplicities
        except _RefusedError:
            continue
        if not np.array_equal(first, drawn(build(), source, sub_batch).multiplicities):
            yield f"two fresh selectors draw differently with the same seed: {sub_batch}"
        learns = type(selector).state_dict is not Selector.state_dict
        if not learns and not np.array_equal(
            first, drawn(selector, source, sub_batch).multiplicities
        ):
            yield (
                "a second draw with the same seed differs from the first: what a selector learns "
                "belongs into its state_dict, and random numbers come from sub_batch.seed and the "
                "uids"
            )
