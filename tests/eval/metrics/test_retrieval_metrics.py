from __future__ import annotations

from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clip_benchmark.metrics import zeroshot_retrieval
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom

from siftclip.errors import InputError
from siftclip.eval.metrics.outcomes import Metrics
from siftclip.eval.metrics.retrieval_metrics import (
    fixed_point,
    hit_probability,
    require_unit_length,
    retrieval_metrics,
)


def unit_vectors(count: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator), dim=-1)


def sign_vectors(count: int, seed: int) -> torch.Tensor:
    """Vectors of length 1 whose products are -1, -1/2, 0, 1/2 or 1: ties everywhere."""
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed)).sign() / 2


def upstream(images: torch.Tensor, captions: list[torch.Tensor]) -> Metrics:
    """clip_benchmark's `evaluate`: images [I, d], and captions [., d] of each."""
    table = torch.cat(captions)
    numbers = iter(range(len(table)))
    texts = [[str(next(numbers)) for _ in own] for own in captions]
    return zeroshot_retrieval.evaluate(
        SimpleNamespace(encode_image=lambda x: x, encode_text=lambda tokens: table[tokens]),
        [(images[i : i + 7], texts[i : i + 7]) for i in range(0, len(images), 7)],
        lambda prompts: torch.tensor([int(prompt) for prompt in prompts]),
        "cpu",
        amp=False,
        recall_k_list=[1, 5, 10],
    )


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 5), min_size=10, max_size=30), st.integers(0, 999))
def test_equals_clip_benchmark_without_ties(counts: list[int], seed: int) -> None:
    images, texts = unit_vectors(len(counts), 16, seed), unit_vectors(sum(counts), 16, seed + 1)
    image_of = np.repeat(np.arange(len(counts)), counts)
    texts = F.normalize(texts + 0.7 * images[image_of], dim=-1)  # hits at 1 as well as at 10
    order = np.random.default_rng(seed).permutation(sum(counts))  # captions need not be sorted
    text_of = np.empty_like(order)
    text_of[np.arange(len(order))] = order
    metrics, outcomes = retrieval_metrics(images, texts, text_of, image_of[order], chunk=8)
    expected = upstream(images, list(texts.split(counts)))
    for k in (1, 5):
        both = [expected[f"{what}_retrieval_recall@{k}"] for what in ("image", "text")]
        expected[f"mean_recall@{k}"] = sum(both) / 2
    assert metrics == pytest.approx(expected, abs=1e-6)
    for k in (1, 5):
        value, hits, queries = outcomes[f"mean_recall@{k}"].arrays.values()
        both = value.mean() + hits.sum() / queries.sum()
        assert both / 2 == pytest.approx(metrics[f"mean_recall@{k}"])


def enumerated(
    scores: np.ndarray, text_of: list[int], image_of: list[int], k: int
) -> tuple[list[float], list[float]]:
    """Hits of captions and images: the mean over all orders of the candidates, sorted by score."""
    images, captions = range(scores.shape[1]), range(len(text_of))

    def expected(values: list[float], positives: set[int]) -> float:
        hits = [
            bool(positives & set(sorted(order, key=lambda c: -values[c])[:k]))
            for order in permutations(range(len(values)))
        ]
        return float(np.mean(hits))

    caption_hits = [
        expected([scores[text_of[c], i] for i in images], {image_of[c]}) for c in captions
    ]
    image_hits = [
        expected(
            [scores[text_of[c], i] for c in captions], {c for c in captions if image_of[c] == i}
        )
        for i in images
    ]
    return caption_hits, image_hits


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=3).filter(lambda counts: sum(counts) <= 6),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 999),
)
def test_ties_are_broken_at_random(counts: list[int], distinct: int, k: int, seed: int) -> None:
    """Also with one image, with captions that many share, and with k above the candidates."""
    images, texts = sign_vectors(len(counts), seed), sign_vectors(distinct, seed + 1)
    image_of = np.repeat(np.arange(len(counts)), counts)
    text_of = np.random.default_rng(seed).integers(0, distinct, len(image_of))
    metrics, outcomes = retrieval_metrics(images, texts, text_of, image_of, ks=(1, k), chunk=2)
    scores = (texts @ images.T).numpy()
    for each in {1, k}:
        captions, found = enumerated(scores, text_of.tolist(), image_of.tolist(), each)
        assert metrics[f"image_retrieval_recall@{each}"] == pytest.approx(np.mean(captions))
        assert metrics[f"text_retrieval_recall@{each}"] == pytest.approx(np.mean(found))
    captions, found = enumerated(scores, text_of.tolist(), image_of.tolist(), 1)
    arrays = outcomes["mean_recall@1"].arrays
    assert outcomes["mean_recall@1"].statistic == "two_means"
    assert arrays["value"] == pytest.approx(found)
    assert arrays["queries"].tolist() == counts
    assert arrays["hits"] == pytest.approx(np.bincount(image_of, weights=captions))
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
    both = arrays["value"].mean() + arrays["hits"].sum() / arrays["queries"].sum()
    assert both / 2 == pytest.approx(metrics["mean_recall@1"])


def repeated_task() -> tuple[torch.Tensor, torch.Tensor, np.ndarray, np.ndarray]:
    """Random features in which images and captions occur again, at places far apart."""
    images, texts = unit_vectors(37, 511, 0), unit_vectors(101, 511, 1)
    images[torch.tensor([5, 18, 36])] = images[0].clone()
    images[29] = images[12].clone()
    image_of = np.concatenate([np.arange(37), np.random.default_rng(0).integers(0, 37, 86)])
    text_of = np.random.default_rng(1).integers(0, 101, len(image_of))
    texts = F.normalize(texts.index_add(0, torch.from_numpy(text_of), images[image_of]), dim=-1)
    return images, texts, text_of, image_of


@pytest.mark.parametrize("chunk", [3, 7, 13, 36, 64, 5000])
def test_chunks_and_order_change_nothing(chunk: int) -> None:
    """To the last bit, although no sum of floats is the same in another order."""
    images, texts, text_of, image_of = repeated_task()
    expected, _ = retrieval_metrics(images, texts, text_of, image_of)
    text_of.flags.writeable = image_of.flags.writeable = False  # as a file mapped into memory
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = retrieval_metrics(images, texts, text_of, image_of, chunk=chunk)
    assert found == expected
    new_image, new_text, order = (
        np.random.default_rng(chunk).permutation(n) for n in (37, 101, len(text_of))
    )
    moved_images, moved_texts = torch.empty_like(images), torch.empty_like(texts)
    moved_images[new_image], moved_texts[new_text] = images, texts
    moved = retrieval_metrics(
        moved_images, moved_texts, new_text[text_of[order]], new_image[image_of[order]], chunk=chunk
    )[0]
    # the hits are the same; their mean is a sum in another order
    assert moved == pytest.approx(expected, abs=1e-14)


def test_distinct_captions_or_not() -> None:
    images, texts, text_of, image_of = repeated_task()
    apart = retrieval_metrics(images, texts[text_of], np.arange(len(text_of)), image_of)
    together = retrieval_metrics(images, texts, text_of, image_of)
    assert apart[0] == together[0]


def test_same_image_twice() -> None:
    """Each caption of a pair of equal images finds its own in half of the orders."""
    images = torch.eye(3)[[0, 0, 1]]
    metrics, _ = retrieval_metrics(images, torch.eye(3), np.array([0, 0, 1]), np.array([0, 1, 2]))
    assert metrics["image_retrieval_recall@1"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert metrics["text_retrieval_recall@1"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert metrics["mean_recall@5"] == 1


def test_scores_are_exact() -> None:
    """Equal to sums of Python's integers, in rows and columns of any place."""
    left, right = fixed_point(unit_vectors(5, 1024, 0)), fixed_point(unit_vectors(9, 1024, 1))
    products = left @ right.T
    for i, j in ((0, 0), (4, 8), (2, 5)):
        pairs = zip(left[i].tolist(), right[j].tolist(), strict=True)
        assert int(products[i, j]) == sum(int(a) * int(b) for a, b in pairs)
        assert products[i, j] == (left[i] * right[j]).sum()
    cosines = unit_vectors(5, 1024, 0).double() @ unit_vectors(9, 1024, 1).double().T
    assert products.div(2.0**52) == pytest.approx(cosines, abs=5e-8)  # a float32 sum is no better
    original = unit_vectors(3, 8, 0).double()
    kept = original.clone()
    fixed_point(original)
    assert torch.equal(original, kept)


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 12), st.integers(1, 9), st.data())
def test_hit_probability_is_hypergeometric(
    k: int, above: int, tied: int, data: st.DataObject
) -> None:
    positives = data.draw(st.integers(1, tied))
    places = min(max(k - above, 0), tied)
    expected = 1 - hypergeom.pmf(0, tied, positives, places)
    found = hit_probability(k, *(np.array([n]) for n in (above, tied, positives)))
    assert found == pytest.approx([expected], abs=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_features": torch.zeros(2, 3)}, "image features .* 2 of 2"),
        ({"text_features": torch.full((2, 3), torch.nan)}, "text features .* 2 of 2"),
        ({"text_of_caption": np.array([0, 2])}, "text_of_caption must be from 0 to 1.* 0 to 2"),
        ({"image_of_caption": np.array([-1, 1])}, "image_of_caption must be from 0 to 1"),
        ({"image_of_caption": np.array([0])}, r"one index a caption.*Got \[1\]"),
        ({"image_of_caption": np.array([1, 1])}, "must have a caption. 1 of 2"),
    ],
)
def test_wrong_input(change: dict[str, object], message: str) -> None:
    good = {
        "image_features": torch.eye(3)[:2],
        "text_features": torch.eye(3)[:2],
        "text_of_caption": np.array([0, 1]),
        "image_of_caption": np.array([0, 1]),
    }
    with pytest.raises(InputError, match=message):
        retrieval_metrics(**(good | change))  # type: ignore[arg-type]


def test_no_captions() -> None:
    none = np.array([], dtype=np.int64)
    with pytest.raises(InputError, match="at least one caption"):
        retrieval_metrics(torch.eye(2), torch.eye(2), none, none)


@pytest.mark.parametrize(
    ("length", "is_fine"), [(0.995, True), (1.005, True), (0.98, False), (1.02, False)]
)
def test_lengths_near_1(length: float, is_fine: bool) -> None:
    features = unit_vectors(4, 8, seed=0)
    features[2] *= length
    if is_fine:
        require_unit_length("The features", features)
    else:
        with pytest.raises(InputError, match=r"The features must be .* of length 1\. 1 of 4 are"):
            require_unit_length("The features", features)
