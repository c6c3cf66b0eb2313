"""All built-in selectors, as the test of their contract makes them."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from siftclip.selectors.core.base import Choice, Selector
from siftclip.selectors.core.checks import SelectorFactory, synthetic_chunk, synthetic_files
from siftclip.selectors.core.memory_source import MemorySource

CONTRACT = Path(__file__).parents[1] / "selectors" / "test_selector_contract.py"


def built_in_selectors() -> dict[str, SelectorFactory]:
    """The factories by name."""
    found: dict[str, SelectorFactory] = runpy.run_path(str(CONTRACT))["BUILT_IN"]
    return found


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


def require_alike(name: str, found: Choice, expected: Choice) -> None:
    """Require of a choice on a GPU that it is that on the CPU, and scores alike.

    negCLIPLoss on a CPU multiplies 8-bit numbers where that decides, and bounds the error.
    """
    assert np.array_equal(found.multiplicities, expected.multiplicities)
    if expected.scores is not None:
        assert found.scores is not None
        screens = name.startswith("negcliploss") and "float32" not in name
        np.testing.assert_allclose(
            found.scores, expected.scores, rtol=1e-5, atol=5e-3 if screens else 1e-5
        )
