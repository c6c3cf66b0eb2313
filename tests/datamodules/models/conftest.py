"""Models that are loaded again and again."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_vocabulary(vocabulary_once: None) -> None:
    """Every model has the same one."""
