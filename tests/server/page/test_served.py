"""The chat page with Godwit's own server behind it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.server.conftest import Engines, Running, Servers, running
from tests.server.page.steps import open_settings, say, settled, shown

if TYPE_CHECKING:
    from playwright.sync_api import Page

Visit = Callable[[str], "Page"]
TOOL = '[{"name": "get_time", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]'


def test_a_conversation_with_the_packaged_model(visit: Visit, real: Running) -> None:
    page = visit(real.url)
    open_settings(page)
    page.get_by_label("Seed").fill("1")
    page.get_by_label("Max tokens").fill("24")
    for words in ("Hello!", "Who are you?"):
        say(page, words)
        answer = settled(page)
        assert answer.locator(".markdown").inner_text().strip()
    cached = re.search(r"(\d+) of \d+ prompt tokens cached", answer.inner_text())
    assert cached and int(cached[1]) > 0
    assert page.locator("#failure").is_hidden()


def test_defaults_of_the_model_are_shown(visit: Visit, engines: Engines) -> None:
    with running(engines("hello"), names=("m",), sampling={"temperature": 0.25, "top_k": 7}) as server:
        page = visit(server.url)
        open_settings(page)
        page.get_by_role("option", name="m").wait_for(state="attached")
        for label, value in (("Temperature", "0.25"), ("Top k", "7"), ("Top p", "1"), ("Min p", "0")):
            assert page.get_by_label(label).get_attribute("placeholder") == value


def test_a_tool_is_called_and_its_result_used(visit: Visit, servers: Servers) -> None:
    page = visit(servers("tool").url)
    open_settings(page)
    page.get_by_label("Tools").fill(TOOL)
    page.get_by_label("Max tokens").fill("3")  # this model would not stop after one call
    say(page, "What time is it?")
    result = settled(page).get_by_label("Result of get_time")
    result.fill("12:00")
    page.keyboard.press("Enter")
    shown(page, "Done.")


def test_thinking_and_answer_come_apart(visit: Visit, servers: Servers) -> None:
    page = visit(servers("thinking").url)
    say(page, "Hello")
    answer = settled(page)
    assert answer.locator(".markdown").inner_text() == "Yes."
    assert answer.locator(".thinking pre").text_content() == "hm"


def test_stopping_frees_the_engine(visit: Visit, engines: Engines) -> None:
    with running(engines("endless", max_context=4096), names=("m",)) as server:
        page = visit(server.url)
        say(page, "Sing")
        shown(page, "la la")
        page.keyboard.press("Escape")
        assert "stopped" in settled(page).inner_text()
        end = time.monotonic() + 60
        while server.engine.stats().num_running and time.monotonic() < end:
            time.sleep(0.01)
        assert not server.engine.stats().num_running
        server.engine.check_integrity()


def test_a_key_is_asked_for(visit: Visit, engines: Engines) -> None:
    with running(engines("hello"), names=("m",), keys=("secret",)) as server:
        page = visit(server.url)
        page.get_by_label("This server wants an API key").fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_text("Wrong key").wait_for()
        page.get_by_label("This server wants an API key").fill("secret")
        page.keyboard.press("Enter")
        page.get_by_role("option", name="m").wait_for(state="attached")
        say(page, "Hello")
        shown(page, "Hello there.")
