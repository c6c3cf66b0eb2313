"""CLIP score, against a loop and against DataComp's and VAS's released rules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from siftclip.selectors.core.base import Chunk
from siftclip.selectors.core.memory_source import MemorySource
from siftclip.selectors.core.rules import Threshold, TopFraction
from siftclip.selectors.methods.clip_score import ClipScore, clip_score

REFERENCE = Path(__file__).parents[3].parent / "shared" / "reference"


def test_clip_score_equals_loop() -> None:
    generator = np.random.default_rng(0)
    image, text = generator.standard_normal((2, 20, 7)).astype(np.float16)
    scores = clip_score(torch.from_numpy(image), torch.from_numpy(text))
    assert scores.dtype == torch.float32
    for i in range(20):
        expected = sum(float(a) * float(b) for a, b in zip(image[i], text[i], strict=True))
        assert scores[i].item() == pytest.approx(expected, abs=1e-5)


def test_clip_score_multiplies_in_float32() -> None:
    # in fp16 the second product vanishes behind the first: 2048 + 0.5 = 2048
    image = torch.tensor([[2048.0, 0.5]], dtype=torch.float16)
    text = torch.tensor([[1.0, 1.0]], dtype=torch.float16)
    assert clip_score(image, text).tolist() == [2048.5]


def test_clip_score_does_not_normalise() -> None:
    assert clip_score(torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 0.0]])).tolist() == [6.0]


def test_selector_uses_the_named_features() -> None:
    selector = ClipScore(features="b32", fraction=0.5)
    assert selector.requires.features == ("b32_img", "b32_txt")
    features = {
        "b32_img": torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        "b32_txt": torch.tensor([[0.0, 1.0], [0.0, 1.0]]),
    }
    uids = np.array([[0, 1], [0, 2]], dtype=np.uint64)
    chunk = Chunk(rows=np.array([4, 9]), uids=uids, features=features)
    choice = selector.select(MemorySource(chunk))
    assert choice.multiplicities.tolist() == [0, 1]
    assert choice.scores is not None
    assert choice.scores.tolist() == [0.0, 1.0]


@pytest.mark.testbed
@pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"{REFERENCE} is not on this machine")
def test_clip_score_agrees_with_released_code() -> None:
    inputs = np.load(REFERENCE / "inputs_l14.npz")
    answers = np.load(REFERENCE / "clipscore_l14.npz")
    uids = np.stack([inputs["uid_hi"], inputs["uid_lo"]], axis=1)
    image, text = (torch.from_numpy(inputs[key]) for key in ("img", "txt"))

    stored = inputs["css_f16"].astype(np.float32)  # rounded to fp16, as DataComp's column is
    np.testing.assert_allclose(clip_score(image, text).numpy(), stored, rtol=0, atol=1e-3)

    # The rules, on the very scores that the released code was given. At a cut inside a run of
    # equal fp16 scores any of them may be kept, so what is compared there is the scores.
    kept = np.flatnonzero(TopFraction(0.3)(stored, uids, len(uids)))
    expected = answers["vas_rows_frac0.3"]
    assert len(kept) == len(expected) == 2400
    np.testing.assert_array_equal(np.sort(stored[kept]), np.sort(stored[expected]))
    cut = stored[kept].min()
    above = np.flatnonzero(stored > cut)
    assert set(above) <= set(kept)
    assert set(above) <= set(expected)

    kept = np.flatnonzero(Threshold(0.2)(stored, uids, len(uids)))
    assert kept.tolist() == sorted(answers["rows_thr0.2"].tolist())
    assert kept.tolist() == sorted(answers["vas_rows_thr0.2"].tolist())

    # DataComp's own top fraction is a threshold: one more than int(n * f), and all ties
    for fraction in (0.2, 0.3):
        kept = np.flatnonzero(Threshold(float(answers[f"thr_frac{fraction}"]))(stored, uids, 0))
        assert kept.tolist() == sorted(answers[f"rows_frac{fraction}"].tolist())
