"""ClipCov, against a loop over the notebook's schedule and the authors' outputs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from siftclip.errors import InputError
from siftclip.ranks import Ranks
from siftclip.selectors.core.base import Choice, Chunk, FeatureFile
from siftclip.selectors.core.checks import check_selector
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.source import DictCache, RestrictedSource, take
from siftclip.selectors.fitting.clusters import GivenCentroids, KMeans
from siftclip.selectors.methods.clipcov import greedy as clipcov_greedy
from siftclip.selectors.methods.clipcov import terms as clipcov_terms
from siftclip.selectors.methods.clipcov.clipcov import ClipCov

LABELS = FeatureFile(path="names.npz", key="txt")
KMEANS = KMeans(clusters=4, seed=3, iterations=3)


class KeepingSource(MemorySource):
    """Its cache outlives a call, and counts what is read."""

    kept: DictCache
    taken = 0

    def cache(self, selector: object) -> DictCache:
        return self.kept

    def take(self, rows: np.ndarray, requires: Any) -> Chunk:
        self.taken += len(rows)
        return super().take(rows, requires)


def pool(seed: int, samples: int, *, classes: int = 5, dim: int = 12) -> tuple[Chunk, torch.Tensor]:
    generator = np.random.default_rng(seed)

    def unit(values: np.ndarray) -> np.ndarray:
        return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float16)

    names = generator.standard_normal((classes, dim))
    # skewed classes, and similarities of both signs within each
    true = np.minimum(generator.geometric(0.5, samples) - 1, classes - 1)
    image = unit(0.5 * names[true] + generator.standard_normal((samples, dim)))
    text = unit(image + 0.7 * names[true] + generator.standard_normal((samples, dim)))
    chunk = Chunk(
        rows=np.arange(samples, dtype=np.int64),
        uids=generator.integers(0, 2**63, size=(samples, 2)).astype(np.uint64),
        features={"b32_img": torch.from_numpy(image), "b32_txt": torch.from_numpy(text)},
    )
    return chunk, torch.from_numpy(unit(names))


def source(chunk: Chunk, names: torch.Tensor, **options: Any) -> MemorySource:
    return MemorySource(chunk, files={LABELS: names}, **options)


def clipcov(fraction: float = 0.5, **options: Any) -> ClipCov:
    return ClipCov(features="b32", fraction=fraction, labels=LABELS, **options)


def rows(choice: Choice) -> list[int]:
    return np.flatnonzero(choice.multiplicities).tolist()


def slow_clipcov(
    chunk: Chunk, names: torch.Tensor, budget: int, options: Mapping[str, Any]
) -> tuple[np.ndarray, list[int]]:
    """Initial scores and picks by loops and whole matrices, in float64."""
    interval, charge = options.get("interval", 200), options.get("charge", "cumulative")
    threshold = options.get("threshold", 0.0)
    weights = {"cross": 1.0, "self": 2.0, "label": 0.5, "inter_class": -1.0}
    weights |= {name: options.get(f"{name}_weight", w) for name, w in weights.items()}
    image, text = (chunk.features[key].double().numpy() for key in ("b32_img", "b32_txt"))
    label = names.double().numpy()
    n = len(image)
    good = [
        i
        for i in range(n)
        if np.isfinite(image[i]).all()
        and np.isfinite(text[i]).all()
        and image[i].any()
        and text[i].any()
    ]
    of = {i: int(np.argmax(label @ image[i])) for i in good}
    classes = {c: [i for i in good if of[i] == c] for c in set(of.values())}
    mean_image = {c: image[ids].mean(0) for c, ids in classes.items()}
    mean_text = {c: text[ids].mean(0) for c, ids in classes.items()}
    pairs, cross, scores = {}, np.zeros(n), np.full(n, np.nan)
    for c, ids in classes.items():
        matrix = image[ids] @ text[ids].T
        own = np.diag(matrix).copy()
        if threshold is not None:
            matrix[matrix <= threshold] = 0
        pairs[c] = matrix + matrix.T
        for k, i in enumerate(ids):
            cross[i] = pairs[c][k].sum() / len(ids)
            inter = [
                image[i] @ mean_text[other] + text[i] @ mean_image[other]
                for other in classes
                if other != c
            ]
            scores[i] = weights["cross"] * cross[i] + weights["self"] * own[k]
            scores[i] += weights["label"] * (text[i] @ label[c])
            scores[i] += weights["inter_class"] * (np.mean(inter) if inter else 0.0)
    initial, picks = scores.copy(), list[int]()
    of_class: dict[int, list[int]] = {c: [] for c in classes}
    updated = dict.fromkeys(classes, 0)
    for _ in range(min(budget, len(good))):
        best = min((i for i in good if i not in picks), key=lambda i: (-scores[i], i))
        picks.append(best)
        c, ids = of[best], classes[of[best]]
        of_class[c].append(best)
        if (len(of_class[c]) + 1) % interval:
            continue
        new, updated[c] = of_class[c][updated[c] :], len(of_class[c])
        charged = of_class[c] if charge == "cumulative" else new
        for k, i in enumerate(ids):
            lost = weights["cross"] * sum(pairs[c][k, ids.index(j)] for j in new)
            lost += weights["cross"] * sum(cross[j] for j in charged)
            lost += weights["label"] * sum(text[j] @ label[c] for j in new)
            scores[i] -= lost / len(ids)
    return initial, picks


OPTIONS: list[dict[str, Any]] = [
    {},
    {"interval": 4},
    {"interval": 4, "charge": "once"},
    {"interval": 1},
    {"interval": 1, "charge": "once"},
    {"interval": 3, "threshold": None},
    {"interval": 3, "threshold": 0.2},
    {"interval": 1, "threshold": -0.1},
    {"interval": 3, "cross_weight": 0.0},
    {"interval": 3, "self_weight": 0.0, "label_weight": 0.0},
    {"interval": 3, "inter_class_weight": 0.0, "label_weight": -2.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_loop(options: dict[str, Any]) -> None:
    chunk, names = pool(3, 90)
    chunk.features["b32_img"][7] = 0
    chunk.features["b32_txt"][11, 2] = torch.nan
    for fraction in (0.2, 0.7):
        choice = clipcov(fraction, **options).select(source(chunk, names))
        scores, picks = slow_clipcov(chunk, names, int(90 * fraction), options)
        assert choice.scores is not None
        np.testing.assert_allclose(choice.scores, scores, rtol=0, atol=2e-6)
        assert np.isnan(choice.scores[[7, 11]]).all()
        assert rows(choice) == sorted(picks)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    samples=st.integers(1, 40),
    classes=st.integers(1, 6),
    interval=st.integers(1, 6),
    fraction=st.floats(0.01, 1.0),
)
def test_property_equals_loop(
    seed: int, samples: int, classes: int, interval: int, fraction: float
) -> None:
    chunk, names = pool(seed, samples, classes=classes)
    choice = clipcov(fraction, interval=interval).select(source(chunk, names))
    _, picks = slow_clipcov(chunk, names, int(samples * fraction), {"interval": interval})
    assert rows(choice) == sorted(picks)


@pytest.mark.parametrize("threshold", [None, -1.0, -0.5, 0.0, 0.2])
def test_picks_that_raise_the_score_of_others_are_not_overlooked(
    monkeypatch: pytest.MonkeyPatch, threshold: float | None
) -> None:
    """Below a threshold of 0 similarities may be negative: an old score bounds no fresh one."""
    monkeypatch.setattr(clipcov_greedy, "CANDIDATES", 3)
    options = {"interval": 1, "charge": "once", "threshold": threshold}
    options |= {"cross_weight": 30.0, "label_weight": 0.0, "inter_class_weight": 0.0}
    for seed in range(4):
        chunk, names = pool(seed, 60, classes=1)
        signs = torch.from_numpy(np.random.default_rng(seed).choice([-1.0, 1.0], (60, 1))).half()
        for features in chunk.features.values():
            features *= signs  # half of all pairs are opposed
        choice = clipcov(0.3, **options).select(source(chunk, names))
        _, picks = slow_clipcov(chunk, names, 18, options)
        assert rows(choice) == sorted(picks)


@pytest.mark.parametrize("interval", [1, 3])
def test_large_classes_are_streamed_alike(monkeypatch: pytest.MonkeyPatch, interval: int) -> None:
    chunk, names = pool(5, 70)
    whole = clipcov(interval=interval).select(source(chunk, names))
    for held, chunk_samples in ((16, 8), (16, 1000), (64, 5)):
        monkeypatch.setattr(clipcov_terms, "HELD_SAMPLES", held)
        pieces = clipcov(interval=interval).select(
            source(chunk, names, chunk_samples=chunk_samples, part_samples=19)
        )
        assert whole.scores is not None
        assert pieces.scores is not None
        np.testing.assert_allclose(pieces.scores, whole.scores, rtol=0, atol=2e-6)
        assert rows(pieces) == rows(whole)


def test_pieces_cover_all_members(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clipcov_terms, "HELD_SAMPLES", 10)
    for sizes in ([3, 4, 5], [10, 10], [25], [4, 31, 4, 4], [11, 1, 9, 2, 20], [1]):
        starts = np.concatenate([[0], np.cumsum(sizes)])
        members = clipcov_terms.Members(
            index=np.arange(sum(sizes)),
            rows=np.arange(sum(sizes)),
            uid_ranks=np.arange(sum(sizes)),
            classes=np.repeat(np.arange(len(sizes)), sizes),
            labels=np.arange(len(sizes)),
            starts=starts,
        )
        pieces = members.pieces()
        assert [a for a, _ in pieces] == [0, *[b for _, b in pieces[:-1]]]
        assert pieces[-1][1] == sum(sizes)
        assert all(0 < b - a <= 10 for a, b in pieces)
        for a, b in pieces:  # a class is cut only if it is large, and then has pieces of its own
            for start, end in itertools.pairwise(starts):
                if a < end and start < b and not (a <= start and end <= b):
                    assert end - start > 10
                    assert start <= a < b <= end


@pytest.mark.parametrize("options", [{"interval": 3}, {"interval": 1}], ids=str)
def test_ranks_give_identical_bits(
    monkeypatch: pytest.MonkeyPatch,
    run_on_ranks: Callable[[int, Callable[[Ranks], Any]], list[Any]],
    options: dict[str, Any],
) -> None:
    monkeypatch.setattr(clipcov_terms, "HELD_SAMPLES", 32)
    chunk, names = pool(6, 200)
    chunk.features["b32_img"][9] = torch.inf

    def run(ranks: Ranks) -> Choice:
        return clipcov(**options).select(source(chunk, names, ranks=ranks, part_samples=41))

    (one,) = run_on_ranks(1, run)
    assert one.multiplicities.sum() == 100
    for size in (2, 4):
        for other in run_on_ranks(size, run):
            assert np.array_equal(other.multiplicities, one.multiplicities)
            assert np.array_equal(other.scores, one.scores, equal_nan=True)


def test_killed_run_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clipcov_terms, "HELD_SAMPLES", 32)
    chunk, names = pool(7, 200)
    whole = clipcov(interval=2).select(source(chunk, names))
    keeping = KeepingSource(chunk, files={LABELS: names}, part_samples=50)
    keeping.kept = DictCache()
    original, puts = DictCache.put, 0

    def failing(self: DictCache, name: str, **arrays: np.ndarray) -> None:
        nonlocal puts
        puts += 1
        if puts % 3 == 0:
            raise KeyboardInterrupt
        original(self, name, **arrays)

    with monkeypatch.context() as patch:
        patch.setattr(DictCache, "put", failing)
        for _ in range(40):
            try:
                choice = clipcov(interval=2).select(keeping)
                break
            except KeyboardInterrupt:
                continue
    assert puts > 6
    assert np.array_equal(choice.multiplicities, whole.multiplicities)
    keeping.taken = 0
    again = clipcov(interval=2).select(keeping)
    assert keeping.taken == 0
    assert np.array_equal(again.multiplicities, whole.multiplicities)
    assert np.array_equal(again.scores, whole.scores)


def test_order_of_samples_and_ties() -> None:
    chunk, names = pool(8, 60)
    for values in chunk.features.values():
        values[30:] = values[:30]  # every sample twice
    whole = clipcov(0.3, interval=200).select(source(chunk, names))
    shuffled = take(chunk, np.random.default_rng(1).permutation(60))
    other = clipcov(0.3, interval=200).select(source(shuffled, names))
    assert np.array_equal(whole.multiplicities, other.multiplicities)
    one = dataclasses.replace(
        chunk, features={k: v[:1].expand(60, -1) for k, v in chunk.features.items()}
    )
    choice = clipcov(0.2).select(source(one, names))
    by_uid = np.lexsort((chunk.uids[:, 1], chunk.uids[:, 0]))
    assert rows(choice) == sorted(by_uid[:12].tolist())


def test_budget_counts_pool_or_left() -> None:
    chunk, names = pool(9, 80)
    left = RestrictedSource(source(chunk, names), np.arange(0, 80, 2))
    assert clipcov(0.25).select(left).multiplicities.sum() == 20
    assert clipcov(0.25, of="left").select(left).multiplicities.sum() == 10
    assert clipcov(1.0).select(left).multiplicities.sum() == 40
    assert clipcov(0.01).select(left).multiplicities.sum() == 0


def test_nothing_usable_keeps_nothing() -> None:
    chunk, names = pool(10, 5)
    chunk.features["b32_txt"][:] = 0
    choice = clipcov().select(source(chunk, names))
    assert choice.multiplicities.sum() == 0
    assert choice.scores is not None
    assert np.isnan(choice.scores).all()


def test_clusters_as_classes() -> None:
    chunk, names = pool(11, 70)
    selector = ClipCov(features="b32", fraction=0.3, clustering=KMEANS, label_weight=0.0)
    choice = selector.select(source(chunk, names))
    assert choice.multiplicities.sum() == 21
    centroids = KMEANS.centroids(source(chunk, names), "b32_img")
    _, picks = slow_clipcov(chunk, centroids, 21, {"label_weight": 0.0})
    assert rows(choice) == sorted(picks)
    given = ClipCov(
        features="b32", fraction=0.3, clustering=GivenCentroids(file=LABELS), label_weight=0.0
    )
    assert rows(given.select(source(chunk, centroids))) == rows(choice)


def test_contract() -> None:
    check_selector(lambda: clipcov(0.3, interval=2, charge="once"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": None}, "labels and clustering. Got neither"),
        ({"clustering": KMEANS}, "Got both"),
        ({"labels": None, "clustering": KMEANS}, "label_weight must be 0"),
        ({"interval": 0}, "interval"),
        ({"charge": "twice"}, "charge"),
        ({"threshold": float("nan")}, "threshold"),
        ({"cross_weight": "1"}, "cross_weight"),
        ({"fraction": 0.0}, "fraction"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ClipCov(**{"features": "b32", "fraction": 0.3, "labels": LABELS} | options)


@pytest.mark.parametrize("fault", ["nan", "zero", "empty"])
def test_faulty_labels(fault: str) -> None:
    chunk, names = pool(12, 5)
    if fault == "empty":
        names = names[:0]
    else:
        names[2] = torch.nan if fault == "nan" else 0.0
    with pytest.raises(InputError, match="no rows" if fault == "empty" else "row 2"):
        clipcov().select(source(chunk, names))


def largest_regret(
    inputs: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    order: np.ndarray,
    interval: int,
) -> float:
    """By how much a pick fell short of the best sample left, at most: the notebook in float64."""
    image, text = (inputs[key].astype(np.float64) for key in ("img", "txt"))
    scores, of = expected["initial_scores"].copy(), expected["cls"]
    new: dict[int, list[int]] = {}
    charged: dict[int, list[int]] = {}
    regret = 0.0
    for pick in order:
        regret = max(regret, float(scores.max() - scores[pick]))
        c = int(of[pick])
        new.setdefault(c, []).append(pick)
        charged.setdefault(c, []).append(pick)
        scores[pick] = -np.inf
        if (len(charged[c]) + 1) % interval:
            continue
        ids = np.flatnonzero(of == c)
        pairs = (image[ids] @ text[new[c]].T).clip(min=0) + (text[ids] @ image[new[c]].T).clip(
            min=0
        )
        lost = pairs.sum(1) + expected["cross"][charged[c]].sum()
        scores[ids] -= (lost + 0.5 * expected["ls"][new[c]].sum()) / len(ids)
        new[c] = []
    return regret


@pytest.mark.testbed
@pytest.mark.parametrize(
    ("case", "fraction", "interval"),
    [("10pct", 0.1, 200), ("50pct", 0.5, 200), ("30pct_every20", 0.3, 20)],
)
def test_reference(
    monkeypatch: pytest.MonkeyPatch,
    reference: Callable[[str], Mapping[str, np.ndarray]],
    reference_source: Callable[..., MemorySource],
    conformance: Callable[..., None],
    case: str,
    fraction: float,
    interval: int,
) -> None:
    inputs, expected = reference("inputs_b32"), reference(f"clipcov_b32_{case}")
    made = reference_source(inputs, "b32")
    made._files[LABELS] = torch.from_numpy(inputs["label_txt"])
    order: list[int] = []
    pick = ClipCov._pick

    def recorded(self: ClipCov, *arguments: Any) -> np.ndarray:
        picks = pick(self, *arguments)
        order.extend(arguments[2].rows[picks].tolist())
        return picks

    monkeypatch.setattr(ClipCov, "_pick", recorded)
    choice = clipcov(fraction, interval=interval).select(made)
    assert choice.scores is not None
    # Near ties may come in either order, and how many do is up to the CPU. So each order is
    # replayed by itself: no pick is worse than the best one left by more than rounding.
    ours, theirs = np.asarray(order), expected["subset_order"]
    assert largest_regret(inputs, expected, ours, interval) < 1e-6
    assert largest_regret(inputs, expected, theirs, interval) < 1e-6
    places = np.flatnonzero(ours != theirs)
    conformance(
        f"clipcov b32, {case}",
        scores=choice.scores,
        expected_scores=expected["initial_scores"],
        kept=np.asarray(rows(choice)),
        expected_kept=expected["rows"],
        note=f"order of picking equal but for {len(places)} places, near ties",
    )


@pytest.mark.testbed
@pytest.mark.parametrize(
    ("weight", "parts"),
    [
        ("cross", ("cross",)),
        ("self", ("easiness",)),
        ("label", ("ls",)),
        ("inter_class", ("itc", "tic")),
    ],
)
def test_reference_terms(
    reference: Callable[[str], Mapping[str, np.ndarray]],
    reference_source: Callable[..., MemorySource],
    conformance: Callable[..., None],
    weight: str,
    parts: tuple[str, ...],
) -> None:
    inputs, expected = reference("inputs_b32"), reference("clipcov_b32_10pct")
    made = reference_source(inputs, "b32")
    made._files[LABELS] = torch.from_numpy(inputs["label_txt"])
    weights = dict.fromkeys(("cross", "self", "label", "inter_class"), 0.0) | {weight: 1.0}
    options = {f"{name}_weight": value for name, value in weights.items()}
    choice = clipcov(0.01, **options).select(made)
    conformance(
        f"clipcov b32, term {weight}",
        scores=choice.scores,
        expected_scores=sum(expected[part] for part in parts),
    )
