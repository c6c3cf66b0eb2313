"""Every built-in selector keeps on a GPU what it keeps on the CPU, and scores alike."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from built_in_selectors import built_in_selectors, score_tolerance

from siftclip.selectors.core.base import Choice, Selector
from siftclip.selectors.core.checks import synthetic_chunk, synthetic_files
from siftclip.selectors.core.memory_source import MemorySource

BUILT_IN = built_in_selectors()

pytestmark = pytest.mark.gpu


def selected(selector: Selector, device: torch.device) -> Choice:
    """What is kept of the synthetic samples in parts and chunks, with features on a device."""
    chunk = synthetic_chunk(selector.requires)
    on_device = {key: values.to(device) for key, values in chunk.features.items()}
    files = synthetic_files(selector.requires)
    source = MemorySource(
        replace(chunk, features=on_device),
        files={file: values.to(device) for file, values in files.items()},
        part_samples=100,
        chunk_samples=64,
    )
    return selector.select(source)


@pytest.mark.parametrize("name", BUILT_IN)
def test_selector_keeps_the_same(name: str, device: torch.device) -> None:
    found = selected(BUILT_IN[name](), device)
    expected = selected(BUILT_IN[name](), torch.device("cpu"))
    assert np.array_equal(found.multiplicities, expected.multiplicities)
    if expected.scores is not None:
        assert found.scores is not None
        np.testing.assert_allclose(found.scores, expected.scores, **score_tolerance(name))
