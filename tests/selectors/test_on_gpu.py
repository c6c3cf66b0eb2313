"""Every built-in selector keeps on a GPU what it keeps on the CPU, and scores alike."""

from __future__ import annotations

import pytest
import torch
from built_in_selectors import built_in_selectors, require_alike, selected

BUILT_IN = built_in_selectors()

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", BUILT_IN)
def test_selector_keeps_the_same(name: str, device: torch.device) -> None:
    found = selected(BUILT_IN[name](), device)
    require_alike(name, found, selected(BUILT_IN[name](), torch.device("cpu")))
