"""The chat page, open in a headless Chromium."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.server.page.actor import Server
from tests.server.page.steps import load

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
MAX_WAIT_MS = 60_000  # for a machine under load


@pytest.fixture(scope="package")  # no longer: Playwright keeps an event loop in this thread
def browser() -> Iterator[Browser]:
    api = pytest.importorskip("playwright.sync_api", reason="needs Playwright (pip install playwright)")
    with api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        given = [os.environ.get("GODWIT_CHROMIUM"), own if Path(own).exists() else None]
        program = next(filter(None, [*given, *map(shutil.which, BROWSERS)]), None)
        if program is None:
            pytest.skip("needs a Chromium (playwright install chromium, or GODWIT_CHROMIUM=/path/to/one)")
        opened = playwright.chromium.launch(executable_path=program, timeout=MAX_WAIT_MS)
        yield opened
        opened.close()


@contextmanager
def serving() -> Iterator[Server]:
    with Server() as opened:
        thread = threading.Thread(target=opened.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield opened
        opened.shutdown()
        thread.join()


@contextmanager
def visiting(browser: Browser) -> Iterator[Callable[[str], Page]]:
    """Opens a page with an empty storage; nothing may go wrong in it, nor be refused by its policy."""
    context = browser.new_context(color_scheme="light", reduced_motion="reduce")
    context.set_default_timeout(MAX_WAIT_MS)
    problems: list[str] = []

    def opened(url: str) -> Page:
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
        page.goto(url)
        return page

    yield opened
    context.close()
    assert [line for line in problems if not line.startswith("Failed to load resource")] == []


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as opened:
        yield opened


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[[str], Page]]:
    with visiting(browser) as opened:
        yield opened


@pytest.fixture(scope="package")
def canvas(browser: Browser) -> Iterator[Page]:
    """A page for tests that draw Markdown and leave no trace; `renderMarkdown` is a global there."""
    with serving() as server, visiting(browser) as opened:
        page = opened(server.url)
        load(page)
        yield page


@pytest.fixture
def page(visit: Callable[[str], Page], server: Server) -> Page:
    """The page of a server that plays its answers."""
    return visit(server.url)
