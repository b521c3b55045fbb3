"""Talking on the chat page: answers, thinking, tools, stopping, editing, errors."""

from __future__ import annotations

import json
import re
import threading
from typing import TYPE_CHECKING, Any

import pytest

from tests.server.page.actor import Server, call, delta, end, text
from tests.server.page.steps import FOCUSED, message_box, open_settings, say, settled, shown

if TYPE_CHECKING:
    from playwright.sync_api import Page

WEATHER = {"name": "get_weather", "description": "Weather", "parameters": {"type": "object"}}


def test_an_answer_streams_and_says_what_it_cost(page: Page, server: Server) -> None:
    more = threading.Event()
    server.replies.append(
        [delta(role="assistant", content=""), delta(content="Good"), more, *text(" mor", "ning")]
    )
    say(page, "Hello")
    assert shown(page, "Good").get_attribute("aria-busy") == "true"
    more.set()
    answer = settled(page)
    assert answer.get_attribute("aria-busy") == "false"
    assert answer.locator(".markdown").inner_text() == "Good morning"
    cost = r"5 tokens · [\d.]+ tok/s · first after [\d.]+ s · 16 of 20 prompt tokens cached"
    assert re.search(cost, answer.inner_text())
    streaming = {"stream": True, "stream_options": {"include_usage": True}}
    messages = [{"role": "user", "content": "Hello"}]
    assert server.requests == [{"model": "tiny", "messages": messages, **streaming}]
    assert "Good morning" in page.get_by_role("status").inner_text()


def test_the_end_stays_in_sight_unless_the_user_looks_elsewhere(page: Page, server: Server) -> None:
    more, rest, last = (threading.Event() for _ in range(3))
    lines = "line\n" * 100
    parts = [delta(content=lines), more, delta(content=f"{lines}half\n"), rest, delta(content="late "), last]
    server.replies.append([*parts, *text("end")])
    say(page, "Count")
    below = "(e) => e.scrollHeight - e.scrollTop - e.clientHeight"
    messages = page.locator("#messages")
    for go, words in ((None, "line"), (more, "half")):
        if go:
            go.set()
        shown(page, words)
        assert messages.evaluate(below) < 2
    messages.evaluate("(e) => { e.scrollTop = 0; }")
    for go, words in ((rest, "late"), (last, "end")):
        go.set()
        shown(page, words)
        assert messages.evaluate("(e) => e.scrollTop") == 0
    settled(page)
    assert messages.evaluate("(e) => e.scrollTop") == 0


def test_thinking_is_folded(page: Page, server: Server) -> None:
    more = threading.Event()
    thoughts = [delta(reasoning_content="Hm, "), more, delta(reasoning_content="yes.")]
    server.replies.extend([[*thoughts, *text("Yes")], text("Sure")])
    say(page, "Is it?")
    shown(page, "Thinking …")
    more.set()
    answer = settled(page)
    assert re.fullmatch(r"Thought for [\d.]+ s", answer.locator("summary").inner_text())
    assert answer.get_by_text("Hm, yes.").is_hidden()
    answer.locator("summary").press("Enter")
    assert answer.get_by_text("Hm, yes.").is_visible()
    say(page, "Sure?")
    settled(page)
    thought = {"role": "assistant", "content": "Yes", "reasoning_content": "Hm, yes."}
    assert server.requests[1]["messages"][1] == thought


@pytest.mark.parametrize("by_key", [True, False])
def test_stop_keeps_what_came_and_frees_the_server(page: Page, server: Server, by_key: bool) -> None:
    server.replies.append([delta(content="Once upon"), "hang"])
    say(page, "Tell me")
    shown(page, "Once upon")
    if by_key:
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop").click()
    answer = settled(page)
    assert answer.locator(".markdown").inner_text() == "Once upon"
    assert "stopped" in answer.inner_text()
    assert server.left.wait(60)
    assert message_box(page).evaluate(FOCUSED)
    assert page.locator("#failure").is_hidden()


def test_regenerate_replaces_the_answer(page: Page, server: Server) -> None:
    server.replies.extend([text("first"), text("second")])
    say(page, "Hello")
    settled(page).get_by_role("button", name="Regenerate").click()
    shown(page, "second")
    assert settled(page).locator(".markdown").inner_text() == "second"
    assert page.locator("article").count() == 2
    assert server.requests[0] == server.requests[1]


def test_editing_a_message_answers_it_anew(page: Page, server: Server) -> None:
    server.replies.extend([text("one"), text("two"), text("three")])
    for words in ("A", "B"):
        say(page, words)
        settled(page)
    page.locator(".user").first.get_by_role("button", name="Edit").click()
    page.keyboard.type("?")
    page.keyboard.press("Escape")
    assert page.locator(".user .bubble").all_inner_texts() == ["A", "B"]
    page.keyboard.press("Enter")  # the focus is back on the button
    page.get_by_label("Edit your message").fill("C")
    page.keyboard.press("Enter")
    shown(page, "three")
    settled(page)
    assert page.locator("article .bubble, article .markdown").all_inner_texts() == ["C", "three"]
    assert server.requests[2]["messages"] == [{"role": "user", "content": "C"}]


def test_tool_calls_wait_for_results_that_the_user_types(page: Page, server: Server) -> None:
    cities = [*call("get_weather", '{"city": "Oslo"}'), *call("get_weather", '{"city": "Rome"}', 1)]
    server.replies.extend([[*cities, *end("tool_calls")], text("Cold, warm."), text("Warm in both.")])
    open_settings(page)
    page.get_by_label("Tools").fill(json.dumps([WEATHER]))
    say(page, "Weather?")
    answer = settled(page)
    assert answer.locator("details").filter(visible=True).count() == 2
    assert answer.locator("details[open]").count() == 0
    say(page, "Go on")
    assert "waits for the result" in page.locator("#failure").inner_text()
    assert message_box(page).input_value() == "Go on"
    answer.get_by_label("Result of get_weather").first.fill("-5")
    answer.get_by_role("button", name="Send results").click()
    shown(page, "Cold, warm.")
    settled(page)
    assert server.requests[0]["tools"] == [{"type": "function", "function": WEATHER}]
    _, asked, *results = server.requests[1]["messages"]
    assert [json.loads(each["function"]["arguments"])["city"] for each in asked["tool_calls"]] == [
        "Oslo",
        "Rome",
    ]
    assert asked["content"] is None
    assert results == [
        {"role": "tool", "tool_call_id": "call_0", "content": "-5"},
        {"role": "tool", "tool_call_id": "call_1", "content": '{"success": true}'},
    ]
    page.get_by_label("Tool", exact=True).first.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit the result").fill("25")
    page.keyboard.press("Enter")
    shown(page, "Warm in both.")
    contents = [message["content"] for message in server.requests[2]["messages"]]
    assert contents == ["Weather?", None, "25", '{"success": true}']


def test_a_call_cut_off_is_not_kept(page: Page, server: Server) -> None:
    started = call("get_weather", '{"city": "Oslo"}')[0]
    server.replies.append([delta(content="Let me see."), started, *end("length")])
    say(page, "Weather?")
    answer = settled(page)
    assert "cut off at the length limit" in answer.inner_text()
    assert answer.locator("details").filter(visible=True).count() == 0
    assert page.get_by_role("button", name="Send result").count() == 0


def test_settings_go_with_the_request(page: Page, server: Server) -> None:
    server.replies.append(text("Aye"))
    given = {
        **{"temperature": 0.25, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 64, "seed": 7},
        **{"repetition_penalty": 1.1, "presence_penalty": -0.5, "frequency_penalty": 0.5},
    }
    open_settings(page)
    page.get_by_label("System prompt").fill("Be brief.")
    for name, value in given.items():
        page.get_by_label(name.replace("_", " ").capitalize()).fill(str(value))
    page.get_by_label("Model", exact=True).select_option("other")
    say(page, "Hello")
    settled(page)
    request = server.requests[0]
    assert {name: request[name] for name in given} == given
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    assert request["model"] == "other"
    assert "tools" not in request


def test_defaults_are_shown(page: Page) -> None:
    open_settings(page)
    page.get_by_role("option", name="tiny").wait_for(state="attached")
    hints = {"Temperature": "0.6", "Top k": "20", "Top p": "0.95", "Presence penalty": "0"}
    more = {"Min p": "0", "Max tokens": "no limit", "Seed": "random"}
    for label, hint in {**hints, **more}.items():
        page.get_by_label(label).and_(page.get_by_placeholder(hint, exact=True)).wait_for()
    page.get_by_label("Model", exact=True).select_option("other")
    assert page.get_by_label("Temperature").get_attribute("placeholder") == "default"


WRONG = [
    ("Tools", "[{", "not valid JSON"),
    ("Tools", "{}", "have to be a list"),
    ("Tools", "[1]", "Tool 1 has no name"),
    *(("Top p", "1.5", ""), ("Top k", "0.5", ""), ("Max tokens", "0", ""), ("Temperature", "-1", "")),
    *(("Min p", "2", ""), ("Presence penalty", "3", "")),
]


@pytest.mark.parametrize(("label", "value", "problem"), WRONG)
def test_wrong_settings_are_not_sent(
    page: Page, server: Server, label: str, value: str, problem: str
) -> None:
    open_settings(page)
    page.get_by_label(label).fill(value)
    assert problem in page.locator("#tools-problem").inner_text()
    page.get_by_role("button", name="Close settings").click()
    say(page, "Hello")
    assert page.get_by_label(label).evaluate(FOCUSED)
    assert message_box(page).input_value() == "Hello"
    assert server.requests == []


CUT = "The connection ended before the answer was complete."
ERRORS: list[tuple[Any, str, list[str]]] = [
    (
        (400, {"error": {"message": "top_k has to be <b>positive</b>."}}),
        "top_k has to be <b>positive</b>.",
        [],
    ),
    ((500, ["no JSON object"]), "The server answered with status 500.", []),
    (
        [delta(content="Hal"), {"error": {"message": "The engine has stopped."}}],
        "The engine has stopped.",
        ["Hal"],
    ),
    ([delta(content="Hal")], CUT, ["Hal"]),
    ([], CUT, []),
    (["{nonsense"], "The server sent something that is not JSON.", []),
]


@pytest.mark.parametrize(("reply", "words", "kept"), ERRORS)
def test_errors_are_one_sentence(page: Page, server: Server, reply: Any, words: str, kept: list[str]) -> None:
    server.replies.extend([reply, text("Better")])
    say(page, "Hello")
    settled(page)
    assert page.get_by_role("alert").filter(visible=True).all_inner_texts()[0] == words
    assert page.locator(".markdown").all_inner_texts() == kept
    again = page.get_by_role("button", name="Regenerate" if kept else "Answer", exact=True)
    again.filter(visible=True).click()
    shown(page, "Better")
    assert page.locator("#failure").is_hidden()
    assert page.locator("article").count() == 2


def test_a_server_that_is_gone_is_said_to_be(page: Page) -> None:
    page.route("**/v1/chat/completions", lambda route: route.abort())
    say(page, "Hello")
    settled(page)
    assert page.locator("#failure").inner_text() == "The server cannot be reached; check that it is running."


def test_a_broken_connection_keeps_what_came(page: Page, server: Server) -> None:
    cut = threading.Event()
    server.promised = 10_000
    server.replies.append([delta(content="Hal"), cut])
    say(page, "Hello")
    shown(page, "Hal")
    cut.set()
    assert settled(page).locator(".markdown").inner_text() == "Hal"
    assert page.locator("#failure").inner_text() == "The connection broke before the answer was complete."


def test_an_api_key_is_asked_for_and_stays_in_the_tab(page: Page, server: Server) -> None:
    server.key = "secret"
    server.replies.append(text("Welcome"))
    say(page, "Hello")
    field = page.get_by_label("This server wants an API key")
    field.wait_for()
    problem = page.locator("#key-problem")
    assert field.evaluate(FOCUSED)
    assert problem.inner_text() == ""
    field.fill("wrong")
    page.keyboard.press("Enter")
    problem.get_by_text("Wrong key: the server does not accept it.").wait_for()
    assert field.evaluate(FOCUSED)
    assert field.input_value() == ""
    assert page.locator("#failure").is_hidden()
    field.fill("secret")
    page.keyboard.press("Enter")
    shown(page, "Welcome")
    assert field.is_hidden()
    assert page.evaluate("sessionStorage['godwit.key']") == "secret"
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")


def test_a_key_that_no_longer_counts(page: Page, server: Server) -> None:
    """Said at the start as well as in a conversation; the answer comes once the key is right."""
    page.evaluate("sessionStorage['godwit.key'] = 'old'")
    server.key = "new"
    page.reload()
    wrong = page.get_by_text("Wrong key: the server does not accept it.")
    wrong.wait_for()
    page.get_by_label("This server wants an API key").fill("new")
    page.keyboard.press("Enter")
    page.get_by_role("option", name="tiny").wait_for(state="attached")
    server.key = "newer"
    server.replies.append(text("Welcome"))
    say(page, "Hello")
    wrong.wait_for()
    assert page.locator("article").count() == 1
    server.key = "newest"
    page.get_by_label("This server wants an API key").fill("newest")
    page.keyboard.press("Enter")
    shown(page, "Welcome")


def test_an_answer_that_was_cut_off_goes_on(page: Page, server: Server) -> None:
    server.replies.extend([[delta(content="Once upon"), *end("length")], text(" a time"), text("Yes")])
    say(page, "Tell me")
    answer = settled(page)
    answer.get_by_role("button", name="Continue").click()
    shown(page, "Once upon a time")
    answer = settled(page)
    assert page.locator("article").count() == 2
    assert "10 tokens" in answer.inner_text()
    assert "cut off" not in answer.inner_text()
    assert answer.get_by_role("button", name="Continue").is_hidden()
    request = server.requests[1]
    assert request["messages"][-1] == {"role": "assistant", "content": "Once upon"}
    assert request["continue_final_message"] is True
    assert request["add_generation_prompt"] is False
    say(page, "And then?")
    shown(page, "Yes")
    assert server.requests[2]["messages"][1]["content"] == "Once upon a time"
    assert "continue_final_message" not in server.requests[2]


@pytest.mark.parametrize("late", [False, True])
def test_an_answer_that_cannot_go_on_is_kept(page: Page, server: Server, late: bool) -> None:
    refused = (400, {"error": {"message": "This answer cannot be continued."}})
    failed = [delta(content=" a"), {"error": {"message": "This answer cannot be continued."}}]
    server.replies.extend([[delta(content="Once upon"), "hang"], failed if late else refused, text(" time")])
    say(page, "Tell me")
    shown(page, "Once upon")
    page.keyboard.press("Escape")
    settled(page).get_by_role("button", name="Continue").click()
    page.get_by_text("This answer cannot be continued.").wait_for()
    answer = settled(page)
    assert answer.locator(".markdown").inner_text() == ("Once upon a" if late else "Once upon")
    assert ("stopped" in answer.inner_text()) is not late
    answer.get_by_role("button", name="Continue").click()
    shown(page, "time")
    assert page.locator("#failure").is_hidden()


def test_a_long_answer_does_not_hold_up_the_page(page: Page, server: Server) -> None:
    """Keys are heard while it comes, and all of it is there in the end."""
    parts = [f"Paragraph {i} of **many** with $x_{i}$.\n\n- one\n- two\n\n" for i in range(400)]
    more = threading.Event()
    server.replies.append([*(delta(content=part) for part in parts[:200]), more, *text(*parts[200:])])
    say(page, "Go on")
    shown(page, "Paragraph 190 of many")
    message_box(page).press_sequentially("typed")
    more.set()
    answer = settled(page)
    assert message_box(page).input_value() == "typed"
    assert answer.locator(".markdown > p").count() == answer.locator(".markdown > ul").count() == 400
    assert answer.locator(".formula").count() == 400


def test_two_answers_at_once_do_not_mix(page: Page, server: Server) -> None:
    more = threading.Event()
    server.replies.extend([[delta(content="slow"), more, *text(" one")], text("quick one")])
    say(page, "First")
    shown(page, "slow")
    page.get_by_role("button", name="New conversation").click()
    say(page, "Second")
    assert settled(page).locator(".markdown").inner_text() == "quick one"
    more.set()
    page.get_by_role("button", name="First").click()
    shown(page, "slow one")
    assert page.locator(".markdown").all_inner_texts() == ["slow one"]
