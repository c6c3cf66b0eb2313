"""Built-in selectors keep on a simulated GPU what they keep on the CPU, and mix no devices."""

from __future__ import annotations

import pytest
import torch
from built_in_selectors import built_in_selectors, require_alike, selected
from simulated_cuda import GPU, MIX, simulated_cuda

BUILT_IN = built_in_selectors()


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_simulated_gpu_keeps_the_same(name: str) -> None:
    expected = selected(BUILT_IN[name](), torch.device("cpu"))
    with simulated_cuda() as events:
        found = selected(BUILT_IN[name](), GPU)
        assert events.of(MIX) == {}
    require_alike(name, found, expected)
