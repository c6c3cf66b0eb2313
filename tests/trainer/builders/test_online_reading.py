"""What a run says at its start of the features that the loop's selector reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from siftclip.trainer.builders.online_reading import reading_in_words

Compose = Callable[..., Any]

REFERENCE = "online.reference.features.name=noise"
CLIP_SCORE = "selector@online.selector=clip_score"


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["online=every_step", CLIP_SCORE],
         "ClipScore reads learner_img, learner_txt: super-batches are read and scored"),
        (["online=every_step", CLIP_SCORE, "online.features=noise"],
         "ClipScore reads noise_img, noise_txt of the pool: it chooses before samples are read"),
        (["online=every_step", CLIP_SCORE, "online.features=reference"],
         "ClipScore reads noise_img, noise_txt of the pool: it chooses before samples are read"),
        (["online=every_step", CLIP_SCORE, "online.features=reference",
          "online.reference.model.name=RN50"],
         "ClipScore reads reference_img, reference_txt: super-batches are read and scored"),
        (["online=every_step"],
         "JEST reads learner_img, learner_txt and noise_img, noise_txt of the pool: super-batches "
         "are read and scored"),
        (["online=every_step", "selector@online.selector=random"],
         "Uniform reads no features: it chooses before samples are read"),
        (["online=every_n_steps", CLIP_SCORE],
         "ClipScore reads learner_img, learner_txt: the model in training embeds the samples to "
         "choose from"),
        (["online=every_n_steps", CLIP_SCORE, "online.features=noise"],
         "ClipScore reads noise_img, noise_txt of the pool: nothing is embedded of the samples to "
         "choose from"),
        (["online=every_epoch"],
         "InfoBatch reads the losses of training: nothing is embedded of the samples to choose "
         "from"),
    ],
)  # fmt: skip
def test_what_is_read_is_said(
    options: list[str], wanted: str, base: list[str], compose: Compose
) -> None:
    online = compose("train", [*base, *options, REFERENCE]).online
    assert reading_in_words(online) == f"online.selector: {wanted}"
