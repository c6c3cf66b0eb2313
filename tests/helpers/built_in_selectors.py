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
