"""Shares of a sub-batch that are no whole number of each group."""

from __future__ import annotations

from math import gcd

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from siftclip.errors import InputError
from siftclip.selectors.core.base import Choice, Selector, Source, SubBatch, draw
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.rules import keep_top
from siftclip.selectors.core.source import Chunk, ListColumn, Logits
from siftclip.selectors.core.sub_batch import add_uniform, draw_by_score, share_over_groups
from siftclip.selectors.methods.concepts import choose_diverse
from siftclip.selectors.methods.jest.jest import JEST
from siftclip.selectors.methods.jest.learnability import ModelFeatures
from siftclip.selectors.methods.uniform import Uniform


def make_uids(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**63, (samples, 2)).astype(np.uint64)


@given(total=st.integers(0, 300), groups=st.integers(1, 70), turn=st.integers(0, 10**6))
def test_shares_have_the_total_and_take_turns(total: int, groups: int, turn: int) -> None:
    shares = share_over_groups(total, groups, turn)
    assert shares.sum() == total
    assert shares.max() - shares.min() <= 1
    period = groups // gcd(total % groups, groups)
    over_turns = sum(share_over_groups(total, groups, turn + i) for i in range(period))
    assert len(set(np.asarray(over_turns).tolist())) == 1
    # evenly among the groups: any half of them has half of what is left over, to one
    half = np.cumsum(shares - total // groups)[: groups // 2]
    if len(half):
        assert abs(half[-1] - (total % groups) * len(half) / groups) <= 1


@given(
    groups=st.integers(1, 9),
    size=st.integers(1, 6),
    seed=st.integers(0, 99),
    share=st.floats(0, 1),
    temperature=st.sampled_from([None, 0.0, 0.7]),
)
def test_sub_batches_with_uniform_samples_fill_every_group(
    groups: int, size: int, seed: int, share: float, temperature: float | None
) -> None:
    generator = np.random.default_rng(seed)
    quota = int(generator.integers(1, size + 1))
    uids = make_uids(groups * size, seed)
    scores = generator.standard_normal(groups * size).astype(np.float32)
    uniform = share_over_groups(round(share * groups * quota), groups, seed)
    asked = SubBatch.of_quotas(quota - uniform, temperature=temperature, seed=seed)
    assert asked.quotas.tolist() == (quota - uniform).tolist()
    chosen = draw_by_score(scores, uids, asked)
    assert chosen.reshape(groups, -1).sum(1).tolist() == (quota - uniform).tolist()
    if not temperature:
        for group, at in enumerate(asked.group_slices(groups * size)):
            best = keep_top(scores[at], uids[at], int(quota - uniform[group]))
            assert np.array_equal(chosen[at], best)
    kept = add_uniform(chosen, uids, uniform, seed=seed)
    assert (kept >= chosen).all()
    assert kept.max() <= 1
    assert kept.reshape(groups, -1).sum(1).tolist() == [quota] * groups


def test_joint_draws_and_concepts_take_quotas_that_differ() -> None:
    groups, size, dim = 4, 12, 8
    generator = torch.Generator().manual_seed(0)
    keys = ("learner_img", "learner_txt", "reference_img", "reference_txt")
    features = {
        key: torch.nn.functional.normalize(torch.randn(48, dim, generator=generator), dim=1)
        for key in keys
    }
    chunk = Chunk(rows=np.arange(48), uids=make_uids(48), features=features)
    logits = {name: Logits(scale=10.0) for name in ("learner", "reference")}
    quotas = np.array([5, 4, 4, 5])
    for chunks in (1, 3, 16):
        selector = JEST(
            learner=ModelFeatures(name="learner"),
            reference=ModelFeatures(name="reference"),
            chunks=chunks,
            fraction=0.5,
        )
        source = MemorySource(chunk, logits=logits, part_samples=size)
        choice = draw(selector, source, SubBatch.of_quotas(quotas, seed=3))
        assert choice.multiplicities.reshape(groups, -1).sum(1).tolist() == quotas.tolist()
        best = draw(selector, source, SubBatch.of_quotas(quotas, temperature=0.0))
        if chunks == 1:  # the best of each group by the scores of the first chunk
            assert best.scores is not None
            for quota, at in zip(
                quotas, SubBatch(samples=5, groups=4).group_slices(48), strict=True
            ):
                expected = keep_top(best.scores[at], chunk.uids[at], int(quota))
                assert np.array_equal(best.multiplicities[at], expected)
    concepts = ListColumn(np.arange(48) % 7, np.arange(49))
    kept, _ = choose_diverse(concepts, make_uids(48), SubBatch.of_quotas(quotas))
    assert kept.reshape(groups, -1).sum(1).tolist() == quotas.tolist()
    nothing = SubBatch.of_quotas(np.array([0, 1, 1, 0]))
    kept, _ = choose_diverse(concepts, make_uids(48), nothing)
    assert kept.reshape(groups, -1).sum(1).tolist() == [0, 1, 1, 0]


class EqualQuotas(Selector):
    """A plug-in that takes `samples` for the quota of every group."""

    def select(self, source: Source) -> Choice:
        raise NotImplementedError

    def draw(self, source: Source, sub_batch: SubBatch) -> Choice:
        kept = np.zeros((sub_batch.groups, len(source) // sub_batch.groups), dtype=np.int64)
        kept[:, : sub_batch.samples] = 1
        return Choice(multiplicities=kept.ravel())


def test_selector_that_does_not_look_at_the_quotas_is_told() -> None:
    chunk = Chunk(rows=np.arange(8), uids=make_uids(8))
    source = MemorySource(chunk, part_samples=4)
    draw(EqualQuotas(), source, SubBatch(samples=2, groups=2))
    uneven = SubBatch.of_quotas(np.array([2, 1]))
    with pytest.raises(
        InputError, match=r"must choose \[2, 1\] .*Got \[2, 2\]\..*sub_batch.quotas"
    ):
        draw(EqualQuotas(), source, uneven)
    assert draw(Uniform(seed=0, fraction=1), source, uneven).multiplicities.sum() == 3
