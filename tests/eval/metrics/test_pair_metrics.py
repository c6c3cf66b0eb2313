from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clip_benchmark.metrics import image_caption_selection
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score

from siftclip.errors import InputError
from siftclip.eval.metrics.pair_metrics import (
    association_metrics,
    association_prompt,
    caption_selection_metrics,
)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 20), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.integers(0, 999))
def test_selection_equals_clip_benchmark(
    count: int, images: int, captions: int, tied: bool, seed: int
) -> None:
    """Also with distractors on either side, and where most scores are tied."""
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randn(count, captions, 16, generator=generator)
    shared = torch.arange(images) % captions
    pictures = texts[:, shared] + torch.randn(count, images, 16, generator=generator)
    if tied:
        texts, pictures = texts[..., :4].sign(), pictures[..., :4].sign()
    flat = texts.flatten(0, 1)
    numbers = [[str(i * captions + j) for j in range(captions)] for i in range(count)]
    expected = image_caption_selection.evaluate(
        SimpleNamespace(
            encode_image=lambda x: x.flatten(1), encode_text=lambda tokens: flat[tokens]
        ),
        [(pictures[..., None, None], numbers)],
        lambda prompts: torch.tensor([int(prompt) for prompt in prompts]),
        "cpu",
        amp=False,
    )
    metrics, outcomes = caption_selection_metrics(
        F.normalize(pictures, dim=-1), F.normalize(texts, dim=-1)
    )
    assert metrics == pytest.approx(expected, abs=1e-6)
    assert outcomes.keys() == metrics.keys()
    for name, outcome in outcomes.items():
        assert outcome.statistic == "mean"
        assert outcome.arrays["value"].dtype == np.float32
        assert outcome.units == count
        assert outcome.arrays["value"].mean() == pytest.approx(metrics[name])


def test_selection_by_hand() -> None:
    """One image: its caption is the first; a tie with the second counts as found."""
    images = torch.eye(3)[[0, 0, 0]][:, None]
    texts = torch.eye(3)[torch.tensor([[0, 1], [1, 0], [1, 2]])]  # right, wrong, tied at 0
    metrics, _ = caption_selection_metrics(images, texts)
    assert metrics == pytest.approx({"image_acc": 1, "text_acc": 2 / 3, "acc": 2 / 3})


def test_selection_needs_features() -> None:
    with pytest.raises(InputError, match="at least one instance"):
        caption_selection_metrics(torch.empty(0, 1, 4), torch.empty(0, 2, 4))
    images, texts = torch.eye(4)[:, None].clone(), torch.eye(4)[:, None].clone()
    texts[2, 0, 1] = torch.nan
    with pytest.raises(InputError, match=r"text features .* 1 of 4"):
        caption_selection_metrics(images, texts)
    with pytest.raises(InputError, match=r"image features .* 4 of 4"):
        caption_selection_metrics(images * 0, texts)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([4, 5, 6, 10, 12, 13]), min_size=1, max_size=8), st.integers(0, 99))
def test_associations_equal_sklearns_jaccard(sizes: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores = [generator.permutation(size) / 20 for size in sizes]  # without ties
    marks = [generator.permutation(size) < generator.integers(1, size + 1) for size in sizes]
    metrics, outcomes = association_metrics(scores, marks)
    values = np.array(
        [
            jaccard_score(mark, np.isin(np.arange(len(mark)), np.argsort(score)[-mark.sum() :]))
            for score, mark in zip(scores, marks, strict=True)
        ]
    )
    groups = np.array(sizes)
    chosen = {
        "avg_jaccard_score": groups > 0,
        "jaccard_score_5": groups == 5,
        "jaccard_score_6": groups == 6,
        "jaccard_score_10": groups == 10,
        "jaccard_score_12": groups == 12,
        "jaccard_score_5-6": groups <= 6,
        "jaccard_score_10-12": groups >= 10,
    }
    expected = {n: values[of].mean() if of.any() else math.nan for n, of in chosen.items()}
    assert metrics == pytest.approx(expected, nan_ok=True)
    assert outcomes.keys() == {name for name, of in chosen.items() if of.any()}
    for name, outcome in outcomes.items():
        assert outcome.statistic == "mean"
        assert outcome.units == len(sizes)
        assert np.array_equal(~np.isnan(outcome.arrays["value"]), chosen[name])
        assert np.nanmean(outcome.arrays["value"]) == pytest.approx(metrics[name])


def test_association_ties_go_to_the_lower_index() -> None:
    scores = [np.array([0.1, 0.5, 0.5, 0.5, 0.2])]
    for marks, expected in (([0, 1, 1, 0, 0], 1.0), ([0, 0, 1, 1, 0], 1 / 3), ([1, 0, 0, 1, 0], 0)):
        metrics, _ = association_metrics(scores, [np.array(marks, dtype=bool)])
        assert metrics["jaccard_score_5"] == pytest.approx(expected)
    scores = np.arange(60) % 3  # 20 at 2; of the 20 at 1 the first 10
    marks = (scores == 2) | ((scores == 1) & (np.arange(60) < 30))
    assert association_metrics([scores], [marks])[0]["avg_jaccard_score"] == 1


@pytest.mark.parametrize(
    ("scores", "marks", "message"),
    [
        ([[0.1, 0.2]], [[False, False]], "instance 0 must have an association among its 2"),
        ([[0.1, 0.2]], [[True, True, True]], r"instance 0 must mark .*bool \[2\]. Got bool \[3\]"),
        ([[0.1, 0.2]], [[1, 0]], "Got int64"),
        ([[0.1, math.nan]], [[True, False]], "must be finite. Got .*nan"),
        ([[0.1]], [], "Got 1 and 0"),
        ([], [], "at least one instance"),
    ],
)
def test_wrong_associations(
    scores: list[list[float]], marks: list[list[bool]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        association_metrics([np.array(s) for s in scores], [np.array(m) for m in marks])


@pytest.mark.parametrize(
    ("cue", "prompt"),
    [
        ("dog", "A dog"),
        ("Owl", "An owl"),
        ("UFO", "An ufo"),
        ("hour", "A hour"),
        ("yeti", "A yeti"),
        ("écran", "A écran"),
        ("ice cream", "An ice cream"),
    ],
)
def test_prompts(cue: str, prompt: str) -> None:
    assert association_prompt(cue) == prompt


def test_empty_cue() -> None:
    with pytest.raises(InputError, match="must not be empty"):
        association_prompt("")
