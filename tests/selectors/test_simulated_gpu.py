"""Built-in selectors keep on a simulated GPU what they keep on the CPU, and mix no devices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from built_in_selectors import built_in_selectors, score_tolerance
from simulated_cuda import MIX, on_gpu, simulated_cuda

from siftclip.selectors.core.arrays import GIVEN
from siftclip.selectors.core.checks import synthetic_chunk, synthetic_files
from siftclip.selectors.core.feature_sets import bind_features
from siftclip.selectors.core.memory_source import MemorySource

BUILT_IN = built_in_selectors()


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_simulated_gpu_keeps_the_same(name: str) -> None:
    own, other = (bind_features(BUILT_IN[name](), GIVEN) for _ in range(2))
    chunk, files = synthetic_chunk(own.requires), synthetic_files(own.requires)
    expected = own.select(MemorySource(chunk, files=files, part_samples=20, chunk_samples=16))
    with simulated_cuda() as events:
        there = replace(chunk, features=on_gpu(chunk.features))
        source = MemorySource(there, files=on_gpu(files), part_samples=20, chunk_samples=16)
        chosen = other.select(source)
        assert events.of(MIX) == {}
    np.testing.assert_array_equal(chosen.multiplicities, expected.multiplicities)
    if expected.scores is not None:
        assert chosen.scores is not None
        np.testing.assert_allclose(chosen.scores, expected.scores, **score_tolerance(name))
