"""A browser, for the tests that open a page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, headless."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if executable is None:
        pytest.skip("no chromium here (Debian: apt install chromium), so that no page is opened in a browser")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no playwright here, so that no page is opened in a browser"
    )
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield opened
        opened.close()
