"""A browser for the tests of pages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from browser import BROWSER, REASON, Browser, opened_browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if BROWSER is None:
        pytest.skip(REASON)
    with opened_browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened
