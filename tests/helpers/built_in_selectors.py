"""All built-in selectors, as the test of their contract makes them."""

from __future__ import annotations

import runpy
from pathlib import Path

from siftclip.selectors.core.checks import SelectorFactory

CONTRACT = Path(__file__).parents[1] / "selectors" / "test_selector_contract.py"


def built_in_selectors() -> dict[str, SelectorFactory]:
    """The factories by name."""
    found: dict[str, SelectorFactory] = runpy.run_path(str(CONTRACT))["BUILT_IN"]
    return found


def score_tolerance(name: str) -> dict[str, float]:
    """How far scores of a GPU may be from those of the CPU, for numpy's `assert_allclose`.

    negCLIPLoss on a CPU multiplies 8-bit numbers where that decides, and bounds the error.
    """
    screens = name.startswith("negcliploss") and "float32" not in name
    return {"rtol": 1e-5, "atol": 5e-3 if screens else 1e-5}
