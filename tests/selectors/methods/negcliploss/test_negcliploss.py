"""negCLIPLoss against loops, the released code, and itself in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from siftclip.errors import InputError
from siftclip.ranks import Ranks
from siftclip.selectors.core.checks import check_selector
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.rules import TopFraction
from siftclip.selectors.core.source import Chunk, DictCache
from siftclip.selectors.kernels.hardware import int8_is_fast
from siftclip.selectors.methods.negcliploss import negcliploss as module
from siftclip.selectors.methods.negcliploss import screening
from siftclip.selectors.methods.negcliploss.negcliploss import NegCLIPLoss, block_order, negcliploss
from siftclip.selectors.methods.negcliploss.screening import undecided

needs_int8 = pytest.mark.usefixtures("int8")
pytestmark = pytest.mark.usefixtures("int8_where_exact")


def slow_score(image: Tensor, text: Tensor, temperature: float) -> np.ndarray:
    """The released formula in float64, sample by sample."""
    v, t = image.double().numpy(), text.double().numpy()
    scores = []
    for i in range(len(v)):
        row = sum(math.exp(float(v[i] @ t[j]) / temperature) for j in range(len(t)))
        column = sum(math.exp(float(v[j] @ t[i]) / temperature) for j in range(len(v)))
        scores.append(float(v[i] @ t[i]) - temperature / 2 * (math.log(row) + math.log(column)))
    return np.array(scores)


def pool(
    samples: int,
    *,
    seed: int = 0,
    dim: int = 16,
    agreement: float = 1.0,
    bad: tuple[int, ...] = (),
    **options: Any,
) -> MemorySource:
    generator = np.random.default_rng([seed, samples])
    image = generator.standard_normal((samples, dim))
    agreements = generator.uniform(0, agreement, (samples, 1))
    text = agreements * image + generator.standard_normal((samples, dim))
    image, text = (x + generator.standard_normal(dim) for x in (image, text))
    image, text = (
        torch.from_numpy((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16))
        for x in (image, text)
    )
    for number, row in enumerate(bad):
        (image, text)[number % 2][row] = (torch.nan, torch.inf, 0.0)[number % 3]
    uids = generator.integers(0, 2**63, (samples, 2)).astype(np.uint64)
    features = {"x_img": image, "x_txt": text}
    chunk = Chunk(rows=np.arange(samples), uids=uids, features=features)
    return MemorySource(chunk, **options)


def make(**options: Any) -> NegCLIPLoss:
    defaults = {"features": "x", "batch_size": 32, "passes": 2}
    rule = {} if "threshold" in options else {"fraction": 0.3}
    return NegCLIPLoss(**{**defaults, **rule, **options})


def slow_scores(source: MemorySource, selector: NegCLIPLoss, part_samples: int) -> np.ndarray:
    """Partitions, blocks and passes by loops. Parts are consecutive rows."""
    scores = np.zeros(len(source))
    for number in range(selector.passes):
        for first in range(0, len(source), part_samples):
            rows = source.rows[first : first + part_samples]
            rows = rows[block_order(source.uids[rows], selector.seed, number)]
            for start in range(0, len(rows), selector.batch_size):
                chunk = source.take(rows[start : start + selector.batch_size], selector.requires)
                usable = chunk.usable().numpy()
                image, text = (chunk.features[key][usable] for key in ("x_img", "x_txt"))
                scores[chunk.rows[usable]] += slow_score(image, text, selector.temperature)
                scores[chunk.rows[~usable]] = np.nan
    return scores / selector.passes


def test_block_equals_loop() -> None:
    chunk = pool(40)._chunk
    for temperature in (0.01, 0.07, 1.0):
        image, text = chunk.features["x_img"], chunk.features["x_txt"]
        scores = negcliploss(image, text, temperature)
        assert scores.dtype == torch.float32
        expected = slow_score(image, text, temperature)
        np.testing.assert_allclose(scores.numpy(), expected, rtol=0, atol=1e-6)
        assert scores.max() <= 1e-6


def test_a_sample_alone_has_no_loss() -> None:
    source = pool(1)
    np.testing.assert_allclose(make().scores(source), [0.0], rtol=0, atol=1e-6)
    assert make(fraction=1.0).select(source).multiplicities.tolist() == [1]


def test_pairs_that_overflow_the_released_code_are_the_best() -> None:
    image = torch.eye(8)  # similarities of 1: exp(100) is beyond float32
    text = torch.eye(8)
    text[5] = torch.nn.functional.normalize(torch.ones(8), dim=0)
    scores = negcliploss(image, text, 0.01)
    assert scores.isfinite().all()
    assert scores.argmin() == 5


@pytest.mark.parametrize("partition", ["file", "global"])
@pytest.mark.parametrize("batch_size", [1, 32, 45, 1000])
def test_scores_equal_loops(partition: str, batch_size: int) -> None:
    source = pool(101, bad=(0, 13, 14, 50, 51, 100), part_samples=45)
    selector = make(batch_size=batch_size, passes=3, partition=partition, seed=4)
    expected = slow_scores(source, selector, 45 if partition == "file" else 101)
    np.testing.assert_allclose(selector.scores(source), expected, rtol=0, atol=2e-6)
    screened = selector.select(source)
    assert screened.scores is not None
    np.testing.assert_allclose(screened.scores, expected, rtol=0, atol=0.03)
    assert screened.multiplicities[np.isnan(expected)].sum() == 0


def test_passes_draw_other_blocks() -> None:
    source = pool(64)
    one, two = make(passes=1).scores(source), make(passes=2).scores(source)
    second = 2 * two.astype(np.float64) - one
    assert np.abs(second - one).max() > 1e-3


@settings(deadline=None, max_examples=12)
@given(
    samples=st.integers(1, 150),
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.01, 0.07]),
    passes=st.integers(1, 3),
    fraction=st.sampled_from([0.01, 0.3, 0.7, 1.0]),
)
def test_screening_keeps_what_float32_keeps(
    samples: int, seed: int, temperature: float, passes: int, fraction: float
) -> None:
    source = pool(samples, seed=seed, bad=(0,), part_samples=90)
    options = {"temperature": temperature, "passes": passes, "seed": seed}
    for rule in ({"fraction": fraction}, {"threshold": -0.12}, {"threshold": 0.5}):
        exact = make(precision="float32", **options, **rule).select(source)
        screened = make(**options, **rule).select(source)
        assert np.array_equal(exact.multiplicities, screened.multiplicities)
        assert exact.scores is not None
        assert screened.scores is not None
        np.testing.assert_allclose(screened.scores, exact.scores, rtol=0, atol=0.03)


@needs_int8
def test_only_undecided_samples_are_computed_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    source = pool(600, dim=64, agreement=0.2)
    selector = make(batch_size=200, passes=3)
    asked: list[int] = []

    def count(own: Tensor, other: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        asked.append(len(own))
        return pair_log_sums(own, other, temperature)

    pair_log_sums = screening.pair_log_sums
    monkeypatch.setattr(screening, "pair_log_sums", count)
    assert selector.recomputed_samples == 0
    kept = selector.select(source).multiplicities
    # 6 steps of 3 blocks, with fewer samples each
    assert 0 < selector.recomputed_samples < 200
    line = f"NegCLIPLoss: {selector.recomputed_samples} of 600 samples were computed again"
    assert [record.message for record in caplog.records] == [f"{line} in float32"]
    assert sum(asked) < 0.8 * 6 * selector.recomputed_samples
    monkeypatch.undo()
    assert np.array_equal(make(precision="float32", batch_size=200, passes=3).select(source)
                          .multiplicities, kept)  # fmt: skip


@needs_int8
def test_wrong_integers_are_put_right(monkeypatch: pytest.MonkeyPatch) -> None:
    # answers as wrong as their bounds allow still give the same selection
    def wrong(image: Tensor, text: Tensor, temperature: float) -> Any:
        row, column = pair_log_sums(image, text, temperature)
        sign = torch.where(image[:, 0] > image[:, 0].median(), 1.0, -1.0)
        error = torch.full_like(row, 1.5)
        return module_sums(
            row=row + 1.4 * sign, column=column + 1.4 * sign, row_error=error, column_error=error
        )

    from siftclip.selectors.kernels.pair_log_sums import LogSums as module_sums
    from siftclip.selectors.kernels.pair_log_sums import pair_log_sums

    source = pool(300)
    expected = make(precision="float32").select(source).multiplicities
    monkeypatch.setattr(screening, "screened_log_sums", wrong)
    assert np.array_equal(make().select(source).multiplicities, expected)


def test_equal_samples_are_kept_by_uid() -> None:
    source = pool(50)
    for values in source._chunk.features.values():
        values[:] = values[0].clone()
    choice = make(batch_size=25, fraction=0.4).select(source)
    assert choice.scores is not None
    # the last bit of a product may depend on its place, as the CPU decides
    assert np.ptp(choice.scores) < 1e-6
    order = np.lexsort((source.uids[:, 1], source.uids[:, 0], -choice.scores))
    assert np.flatnonzero(choice.multiplicities).tolist() == sorted(order[:20])


def test_norms_that_float32_cannot_hold_are_left_to_float32() -> None:
    source = pool(40)
    features = source._chunk.features
    for key in features:
        features[key] = features[key].float()
    features["x_img"][3] *= 1e25
    screened, exact = (make(precision=p).select(source) for p in ("screened", "float32"))
    assert np.array_equal(screened.multiplicities, exact.multiplicities)


def test_other_rules_get_float32_scores() -> None:
    class Half(TopFraction):
        pass

    source = pool(70)
    rule = Half(0.5)
    selector = NegCLIPLoss(features="x", batch_size=32, passes=2, rule=rule)
    scores = selector.select(source).scores
    assert scores is not None
    assert np.array_equal(scores, selector.scores(source))


@pytest.mark.parametrize("partition", ["file", "global"])
@pytest.mark.parametrize("precision", ["screened", "float32"])
def test_ranks_agree_to_the_bit(
    partition: str, precision: str, run_on_ranks: Callable[..., list[Any]]
) -> None:
    def select(ranks: Ranks) -> tuple[np.ndarray, np.ndarray]:
        source = pool(301, bad=(7, 8), part_samples=120, ranks=ranks)
        choice = make(partition=partition, precision=precision).select(source)
        assert choice.scores is not None
        return choice.multiplicities, choice.scores

    module.TASK_SAMPLES, before = 64, module.TASK_SAMPLES
    try:
        kept, scores = select(pool(1).ranks)
        for size in (2, 4):
            for other_kept, other_scores in run_on_ranks(size, select):
                assert np.array_equal(kept, other_kept)
                assert np.array_equal(scores, other_scores, equal_nan=True)
    finally:
        module.TASK_SAMPLES = before


class KeptSource(MemorySource):
    """A source whose cache outlives a run."""

    kept: DictCache

    def cache(self, selector: object) -> DictCache:
        return self.kept


@needs_int8
def test_a_killed_run_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TASK_SAMPLES", 64)
    source = KeptSource(pool(301)._chunk)
    source.kept = DictCache()
    expected = make().select(source)
    names = list(source.kept._kept)
    assert len([name for name in names if name.startswith("screened")]) == 2 * 5
    assert len(names) > 2 * 5

    def none(*_: object) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(screening, "pair_log_sums", none)
    monkeypatch.setattr(screening, "screened_log_sums", none)
    again = make().select(source)
    assert again.scores is not None
    assert np.array_equal(again.scores, expected.scores)  # type: ignore[arg-type]
    monkeypatch.undo()
    monkeypatch.setattr(module, "TASK_SAMPLES", 64)
    for name in names[7:]:  # killed in the first pass over the pool
        del source.kept._kept[name]
    assert np.array_equal(make().select(source).scores, expected.scores)  # type: ignore[arg-type]


@pytest.mark.parametrize("partition", ["file", "global"])
@pytest.mark.parametrize(("batch_size", "limit"), [(10, 25), (30, 25), (7, 1000)])
def test_tasks_are_whole_blocks(
    partition: str, batch_size: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TASK_SAMPLES", limit)
    source = pool(101, part_samples=45)
    tasks = make(partition=partition, batch_size=batch_size).tasks(source, 1)
    assert sorted(np.concatenate([task.rows for task in tasks])) == list(range(101))
    assert len({task.name for task in tasks}) == len(tasks)
    assert max(len(task.rows) for task in tasks) <= max(limit, batch_size)
    short = sum(len(task.rows) % batch_size != 0 for task in tasks)
    assert short <= (3 if partition == "file" else 1)
    if partition == "file":
        assert all(len(np.unique(task.rows // 45)) == 1 for task in tasks)


def test_order_is_a_function_of_uid_seed_and_pass() -> None:
    uids = pool(500).uids
    order = block_order(uids, 3, 0)
    assert sorted(order) == list(range(500))
    shuffle = np.random.default_rng(0).permutation(500)
    assert np.array_equal(uids[order], uids[shuffle][block_order(uids[shuffle], 3, 0)])
    for other in (block_order(uids, 4, 0), block_order(uids, 3, 1)):
        assert abs(np.corrcoef(np.argsort(order), np.argsort(other))[0, 1]) < 0.15
    assert len(block_order(uids[:0], 3, 0)) == 0


def test_order_is_uniform() -> None:
    uids = np.stack([np.zeros(4000), np.arange(4000)], axis=1).astype(np.uint64)
    first = np.concatenate([block_order(uids, seed, 0)[:1000] for seed in range(20)])
    counts = np.histogram(first, bins=20, range=(0, 4000))[0]
    assert np.abs(counts - 1000).max() < 120  # four standard deviations


@settings(deadline=None, max_examples=200)
@given(data=st.data(), count=st.integers(0, 12))
def test_decided_samples_are_decided(data: st.DataObject, count: int) -> None:
    grid = st.integers(-8, 8)
    true = np.array(data.draw(st.lists(grid, min_size=1, max_size=12)), dtype=np.float64)
    errors = np.array([data.draw(st.integers(0, 4)) for _ in true], dtype=np.float64)
    scores = true + np.array([data.draw(st.integers(-int(e), int(e))) for e in errors])
    scores[data.draw(st.integers(0, len(true) - 1))] = np.nan
    scored = ~np.isnan(scores)
    is_open, cut = undecided(scores, errors, count=count)
    if is_open.any():
        assert cut == np.sort(scores[scored])[-count]
    assert not is_open[~scored].any()
    values = np.where(scored, true, -np.inf)
    mixed = np.where(is_open | ~scored, values, scores)
    count = min(count, int(scored.sum()))
    if not is_open.any() and 0 < count < scored.sum():
        assert np.sort(scores[scored])[-count] > np.sort(scores[scored])[-count - 1]
    kept = np.argsort(-mixed, kind="stable")[:count]
    assert np.array_equal(np.sort(values[kept]), np.sort(values)[len(values) - count :])
    threshold = float(data.draw(grid))
    is_open, _ = undecided(scores, errors, threshold=threshold)
    decided = scored & ~is_open
    assert np.array_equal((scores >= threshold)[decided], (true >= threshold)[decided])


@pytest.mark.parametrize(
    ("option", "value"),
    [("temperature", 0.0), ("temperature", math.nan), ("batch_size", 0), ("passes", 0),
     ("passes", 1.5), ("partition", "shard"), ("precision", "fp16"), ("seed", -1)],
)  # fmt: skip
def test_parameters_are_checked(option: str, value: object) -> None:
    with pytest.raises(InputError, match=f"NegCLIPLoss: {option} must"):
        make(**{option: value})


@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "float32"}, {"partition": "global"}, {"batch_size": 1000, "passes": 1},
     {"threshold": -0.3}],
)  # fmt: skip
def test_keeps_the_contract(options: dict[str, Any]) -> None:
    check_selector(lambda: make(batch_size=options.get("batch_size", 64), **{
        key: value for key, value in options.items() if key != "batch_size"}))  # fmt: skip


REFERENCE_CASES = {
    "full_K1": "l14, one block of all 8,000",
    "B4096_K10": "l14, B 4096, K 10",
    "b32_B4096_K5": "b32, B 4096, K 5",
    "b32_B4096_K2_tau0.07": "b32, B 4096, K 2, temperature 0.07",
    "sh4_B2048_K3": "l14, four shards, B 2048, K 3",
}


@pytest.mark.testbed
@pytest.mark.parametrize("name", REFERENCE_CASES)
def test_agrees_with_released_code(
    name: str,
    reference: Callable[[str], Mapping[str, np.ndarray]],
    conformance: Callable[..., None],
) -> None:
    answers = reference(f"negcliploss_{name}")
    inputs = reference(f"inputs_{answers['arch']}")
    image, text = (torch.from_numpy(inputs[key]) for key in ("img", "txt"))
    passes, size = int(answers["K"]), int(answers["B"])
    scores = np.zeros(len(image))
    permutations = iter(np.split(answers["perms"], np.cumsum(answers["perm_len"])[:-1]))
    for first in answers["shard_edges"][:-1]:
        for _ in range(passes):
            order = first + next(permutations)
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                scores[rows] += negcliploss(image[rows], text[rows], float(answers["tau"])).numpy()
    scores = (scores / passes).astype(np.float32)
    uids = np.stack([inputs["uid_hi"], inputs["uid_lo"]], axis=1)
    conformance(
        f"negcliploss {REFERENCE_CASES[name]}, top 30 %",
        scores=scores,
        expected_scores=answers["score"],
        kept=np.flatnonzero(TopFraction(0.3)(scores, uids, len(scores))),
        expected_kept=answers["rows_top30"],
        note="the released permutations are replayed",
        cut_limit=2e-6,
    )


@pytest.mark.testbed
def test_selector_agrees_with_released_code(
    reference: Callable[[str], Mapping[str, np.ndarray]],
    reference_source: Callable[..., MemorySource],
    conformance: Callable[..., None],
) -> None:
    answers = reference("negcliploss_full_K1")
    source = reference_source(reference("inputs_l14"), "l14")
    selector = NegCLIPLoss(features="l14", batch_size=8000, passes=1, fraction=0.3)
    choice = selector.select(source)
    assert 0 < selector.recomputed_samples < 1000 or not int8_is_fast()
    conformance(
        "negcliploss l14, one block, screened selector, top 30 %",
        kept=np.flatnonzero(choice.multiplicities),
        expected_kept=answers["rows_top30"],
    )


@needs_int8
def test_another_rule_computes_its_own_samples_again() -> None:
    """What was kept for one rule is about other samples than those that the next leaves open."""
    source = KeptSource(pool(301)._chunk)
    source.kept = DictCache()
    for rule in ({"fraction": 0.3}, {"fraction": 0.5}, {"threshold": -0.15}, {"fraction": 0.3}):
        kept, alone = make(**rule).select(source), make(**rule).select(pool(301))
        assert np.array_equal(kept.multiplicities, alone.multiplicities)
        assert np.array_equal(kept.scores, alone.scores)  # type: ignore[arg-type]


def test_without_int8_instructions_scores_are_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "int8_is_fast", lambda: False)
    source, selector = pool(70), make()
    assert np.array_equal(selector.select(source).scores, selector.scores(source))  # type: ignore[arg-type]


# ---- features of which 8 bits leave most samples open --------------------------------------------
def pairs_of(samples: int, agreement: float, **options: Any) -> MemorySource:
    """Random images, and captions that agree with them: at 0.3 all scores are nearly equal."""
    generator = np.random.default_rng(3)
    images, noise = generator.standard_normal((2, samples, 64))
    pairs = (images, agreement * images + (1 - agreement) * noise)
    features = {
        key: torch.from_numpy((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16))
        for key, x in zip(("l14_img", "l14_txt"), pairs, strict=True)
    }
    uids = generator.integers(0, 2**63, size=(samples, 2)).astype(np.uint64)
    chunk = Chunk(rows=np.arange(samples), uids=uids, features=features)
    return MemorySource(chunk, **options)


@needs_int8
@pytest.mark.parametrize("rule", [{"fraction": 0.3}, {"threshold": -1e-5}])
def test_many_open_samples_are_computed_in_float32_at_once(
    rule: dict[str, float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(screening, "PROBE_FROM", 500)
    monkeypatch.setattr(screening, "PROBE_SAMPLES", 100)
    caplog.set_level("INFO")
    source = pairs_of(600, 0.9)
    exact, screened = (
        NegCLIPLoss(features="l14", batch_size=256, passes=2, precision=precision, **rule)
        for precision in ("float32", "screened")
    )
    expected, choice = exact.select(source), screened.select(source)
    assert "float32 for all samples, since 8-bit products would leave about" in caplog.text
    assert screened.recomputed_samples == 0
    assert np.array_equal(choice.multiplicities, expected.multiplicities)
    assert choice.scores is not None
    assert np.array_equal(choice.scores, expected.scores)  # type: ignore[arg-type]


@needs_int8
def test_few_open_samples_are_screened_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    source = pairs_of(600, 0.05)
    options: dict[str, Any] = {"batch_size": 256, "passes": 2, "fraction": 0.3}
    before = NegCLIPLoss(features="l14", **options)
    expected = before.select(source)
    assert 0 < before.recomputed_samples < 600
    monkeypatch.setattr(screening, "PROBE_FROM", 500)
    monkeypatch.setattr(screening, "PROBE_SAMPLES", 100)
    after = NegCLIPLoss(features="l14", **options)
    choice = after.select(source)
    assert after.recomputed_samples == before.recomputed_samples
    assert np.array_equal(choice.multiplicities, expected.multiplicities)
    assert np.array_equal(choice.scores, expected.scores)  # type: ignore[arg-type]


@needs_int8
def test_ranks_agree_on_what_was_seen(
    run_on_ranks: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screening, "PROBE_FROM", 500)

    def select(ranks: Ranks) -> tuple[np.ndarray, int]:
        selector = NegCLIPLoss(features="l14", batch_size=256, passes=1, fraction=0.3)
        source = pairs_of(600, 0.9, ranks=ranks)
        return selector.select(source).multiplicities, selector.recomputed_samples

    kept, _ = select(pool(1).ranks)
    for other, recomputed in run_on_ranks(2, select):
        assert np.array_equal(kept, other)
        assert recomputed == 0
