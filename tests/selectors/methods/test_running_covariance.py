"""VAS with a running covariance, against a loop over steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from siftclip.errors import InputError
from siftclip.ranks import Ranks
from siftclip.selectors.core.base import draw
from siftclip.selectors.core.checks import check_selector
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.rules import keep_top
from siftclip.selectors.core.source import Chunk
from siftclip.selectors.core.sub_batch import SubBatch
from siftclip.selectors.methods.running_covariance import RunningVas, updated_moment
from siftclip.selectors.methods.vas import Vas

KEY = "learner_img"
QUOTA = SubBatch(samples=5, groups=4)


def super_batch(
    step: int, *, samples: int = 64, dim: int = 12, bad: tuple[int, ...] = (), **options: Any
) -> MemorySource:
    generator = np.random.default_rng([9, step])
    values = torch.from_numpy(generator.standard_normal((samples, dim))).float()
    values = torch.nn.functional.normalize(values)
    values[list(bad)] = torch.nan
    chunk = Chunk(
        rows=np.arange(samples),
        uids=generator.integers(0, 2**63, (samples, 2)).astype(np.uint64),
        features={KEY: values},
    )
    return MemorySource(chunk, part_samples=samples // 4, **options)


def features_of(source: MemorySource) -> torch.Tensor:
    values: torch.Tensor = source.take(source.rows, RunningVas(fraction=1).requires).features[KEY]
    return values


def make(**parameters: Any) -> RunningVas:
    return RunningVas(decay=0.8, fraction=0.3, **parameters)


def test_contract() -> None:
    check_selector(lambda: RunningVas(fraction=0.3))
    check_selector(lambda: RunningVas(key="learner_txt", threshold=0.05))


def test_moment_equals_a_loop() -> None:
    generator = np.random.default_rng(0)
    features = torch.from_numpy(generator.standard_normal((7, 3)) / 2).float()
    features[2], features[5, 1] = 0.0, torch.nan
    moment = torch.from_numpy(generator.standard_normal((3, 3)))
    mean = np.zeros((3, 3))
    for i in (0, 1, 3, 4, 6):
        for a in range(3):
            for b in range(3):
                mean[a, b] += float(features[i, a]) * float(features[i, b]) / 5
    first = updated_moment(None, features, 0.8)
    assert first is not None
    np.testing.assert_allclose(first.numpy(), mean, rtol=0, atol=1e-5)
    later = updated_moment(moment, features, 0.8)
    assert later is not None
    np.testing.assert_allclose(later.numpy(), 0.8 * moment.numpy() + 0.2 * mean, rtol=0, atol=1e-5)
    assert updated_moment(moment, features[2:3], 0.8) is moment
    assert updated_moment(None, features[5:6], 0.8) is None


def test_steps_equal_a_loop() -> None:
    selector = make()
    moment: np.ndarray | None = None
    for step in range(4):
        source = super_batch(step, bad=(3, 20) if step == 2 else ())
        choice = draw(selector, source, QUOTA)
        features = features_of(source).double().numpy()
        good = ~np.isnan(features).any(1)
        own = features[good].T @ features[good] / good.sum()
        used = own if moment is None else moment
        scores = np.array([f @ used @ f for f in features])
        assert choice.scores is not None
        np.testing.assert_allclose(choice.scores, scores, rtol=0, atol=2e-6)
        kept = np.concatenate(
            [
                keep_top(choice.scores[start : start + 16], source.uids[start : start + 16], 5)
                for start in range(0, 64, 16)
            ]
        )
        np.testing.assert_array_equal(choice.multiplicities, kept)
        chosen = features[kept > 0]
        mean = chosen.T @ chosen / len(chosen)
        moment = mean if moment is None else 0.8 * moment + 0.2 * mean


def test_it_differs_from_the_statistics_of_each_super_batch() -> None:
    running, fresh = make(), make()
    draw(running, super_batch(0), QUOTA)
    source = super_batch(1)
    first = draw(running, source, QUOTA).multiplicities
    assert (first != draw(fresh, source, QUOTA).multiplicities).any()


def test_samples_without_a_score_come_last_and_teach_nothing() -> None:
    selector = make()
    source = super_batch(0, bad=tuple(range(14)))
    choice = draw(selector, source, QUOTA)
    assert choice.multiplicities[14:16].tolist() == [1, 1]
    assert choice.multiplicities[:14].sum() == 3
    features = features_of(source)[choice.multiplicities > 0].double()
    features = features[~features.isnan().any(1)]
    assert len(features) == 17
    expected = features.T @ features / 17
    torch.testing.assert_close(selector.state_dict()["covariance"], expected, rtol=0, atol=1e-5)
    nothing = make()
    draw(nothing, super_batch(0, bad=tuple(range(64))), QUOTA)
    assert nothing.state_dict() == {}


def test_select_knows_no_steps() -> None:
    selector = make()
    draw(selector, super_batch(0), QUOTA)
    before = selector.state_dict()["covariance"].clone()
    pool = super_batch(5)
    choice = selector.select(pool)
    expected = Vas(features="learner", target="pool", fraction=0.3).select(pool)
    np.testing.assert_array_equal(choice.multiplicities, expected.multiplicities)
    assert choice.scores is not None
    assert expected.scores is not None
    np.testing.assert_allclose(choice.scores, expected.scores, rtol=0, atol=1e-6)
    assert torch.equal(selector.state_dict()["covariance"], before)


def test_a_resumed_run_chooses_alike() -> None:
    whole, first = make(), make()
    for step in range(3):
        draw(whole, super_batch(step), QUOTA)
        draw(first, super_batch(step), QUOTA)
    state = first.state_dict()
    assert state["covariance"].device.type == "cpu"
    resumed = make()
    resumed.load_state_dict(state)
    for step in range(3, 6):
        one, other = (draw(s, super_batch(step), QUOTA) for s in (whole, resumed))
        assert one.scores is not None
        np.testing.assert_array_equal(one.multiplicities, other.multiplicities)
        np.testing.assert_array_equal(one.scores, other.scores)
    assert torch.equal(whole.state_dict()["covariance"], resumed.state_dict()["covariance"])
    resumed.load_state_dict({})
    assert resumed.state_dict() == {}


def test_ranks_choose_and_learn_alike(
    run_on_ranks: Callable[[int, Callable[[Ranks], Any]], list[Any]],
) -> None:
    def decide(ranks: Ranks) -> tuple[list[list[float]], bytes]:
        selector = make()
        answers = []
        for step in range(3):
            choice = draw(selector, super_batch(step, ranks=ranks), QUOTA)
            assert choice.scores is not None
            answers.append([*choice.multiplicities.tolist(), *choice.scores.tolist()])
        return answers, selector.state_dict()["covariance"].numpy().tobytes()

    answers = [answer for size in (1, 2, 4) for answer in run_on_ranks(size, decide)]
    assert all(answer == answers[0] for answer in answers)


def test_sizes_of_super_batches_may_change() -> None:
    selector = make()
    for step, samples in enumerate((64, 32, 128)):
        choice = draw(selector, super_batch(step, samples=samples), QUOTA)
        assert choice.multiplicities.sum() == 20


def test_wrong_input() -> None:
    for decay, message in (
        (1, r"decay must be below 1"),
        (0, r"decay must be a number in the range \(0, 1\]"),
    ):
        with pytest.raises(InputError, match=message):
            RunningVas(decay=decay, fraction=0.3)
    selector = make()
    selector.load_state_dict({"covariance": torch.eye(5, dtype=torch.float64)})
    with pytest.raises(InputError, match=r"learner_img has 12 components, the covariance so far 5"):
        draw(selector, super_batch(0), QUOTA)
