"""What streaming needs beside a pool: open_clip's transforms and tokenizer, all picklable."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import open_clip
import pytest
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2

from siftclip.datamodules.clip_models import Tokenizer, Transform
from siftclip.datamodules.pool import Pool
from siftclip.datamodules.reader import SampleReader
from siftclip.datamodules.streaming import (
    SampleDataset,
)

# Draws from torch's and from Python's random numbers, as a user's aug_cfg may
AUGMENTATION = AugmentationCfg(
    scale=(0.3, 1.0),
    color_jitter=(0.4, 0.4, 0.4, 0.1),
    color_jitter_prob=0.5,
    gray_scale_prob=0.3,
)


@pytest.fixture(scope="session")
def transform() -> Transform:
    """A random augmentation to 16 x 16 pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # open_clip calls the colour jitter unused, but applies it
        return image_transform_v2(PreprocessCfg(size=16), is_train=True, aug_cfg=AUGMENTATION)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return open_clip.SimpleTokenizer(context_length=12)


@pytest.fixture
def make_dataset(transform: Transform, tokenizer: Tokenizer) -> Callable[..., SampleDataset]:
    """`make_dataset(pool, substitutes=rows)`; without it every row of the pool may be one."""

    def make(
        pool: Pool,
        *,
        seed: int = 7,
        max_image_pixels: int = 10_000,
        substitutes: np.ndarray | str | None = "all",
    ) -> SampleDataset:
        if isinstance(substitutes, str):
            substitutes = np.arange(len(pool))
        return SampleDataset(
            reader=SampleReader(pool=pool, max_image_pixels=max_image_pixels),
            transform=transform,
            tokenizer=tokenizer,
            seed=seed,
            substitutes=substitutes,
        )

    return make
