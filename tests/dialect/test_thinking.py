"""Where thinking is in a text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from godwit.dialect.dialect import Dialect
from godwit.dialect.hermes_calls import HERMES
from godwit.dialect.mistral_calls import MISTRAL
from godwit.dialect.parser import AnswerParser
from godwit.dialect.thinking import ThinkingTracker
from godwit.dialect.xml_calls import XML

TOOLS: dict[str, Any] = {"f": {}}
CALLS = {
    "xml": "<tool_call>\n<function=f></function>\n</tool_call>",
    "hermes": '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
}


def places(*pieces: str, **how: Any) -> list[tuple[str, str]]:
    tracker, result = ThinkingTracker(**how), list[tuple[str, str]]()
    for place, part in (both for piece in pieces for both in tracker.push(piece)):
        if result and result[-1][0] == place:
            part = result.pop()[1] + part
        result.append((place, part))
    return result


def test_where_thinking_is() -> None:
    assert places("hm</think>\n\nYes", opened=True) == [
        ("thinking", "hm"),
        ("tag", "</think>"),
        ("gap", "\n\n"),
        ("said", "Yes"),
    ]
    assert places("\n", "<think>", "hm") == [("said", "\n"), ("tag", "<think>"), ("thinking", "hm")]
    assert places("Say <think>hm</think>") == [("said", "Say <think>hm</think>")]
    assert places("a</think>", "</think>", "<think>b", opened=True) == [
        ("thinking", "a"),
        ("tag", "</think></think><think>"),
        ("thinking", "b"),
    ]
    assert places("<tool_call>{}</tool_call>\n", "<think>hm") == [
        ("call", "<tool_call>{}</tool_call>"),
        ("said", "\n"),
        ("tag", "<think>"),
        ("thinking", "hm"),
    ]
    assert places("hm\n<tool_call>\n<function=f>", opened=True, dialect=XML, schemas=TOOLS) == [
        ("thinking", "hm\n"),
        ("call", "<tool_call>\n<function=f>"),
    ]
    for dialect in (None, MISTRAL):
        assert places("<tool_call>a</tool_call><think>", dialect=dialect)[0][0] == "said"


@pytest.mark.parametrize("dialect", [HERMES, XML], ids=["hermes", "xml"])
def test_a_call_that_is_only_thought_of(dialect: Dialect) -> None:
    call = CALLS[dialect.name]
    how: dict[str, Any] = {"opened": True, "dialect": dialect, "schemas": TOOLS}
    mentioned = [("thinking", "hm\n"), ("call", call), ("gap", "\n"), ("thinking", "or not")]
    assert places(f"hm\n{call}\nor not", **how) == mentioned
    assert places(f"hm\n{call}\n", "o", "r not", **how) == mentioned
    twice = places(f"hm\n{call}\n{call}", **how)
    assert [place for place, _ in twice] == ["thinking", "call", "gap", "call"]
    assert places(f"hm\n{call}\n{call}no", **how)[-1] == ("said", "no")
    assert places(f"hm\n{call}</think>no", **how)[-1] == ("said", "no")
    assert places(f"hm</think>{call}no", **how)[-1] == ("said", "no")


@pytest.mark.parametrize("dialect", [HERMES, XML], ids=["hermes", "xml"])
@pytest.mark.parametrize(
    "thought", ["hm {}", "```\n{}\n```", "<tool_call>\nno", "<tool_call>\n{{\n<function=g>"]
)
def test_what_is_not_a_call_is_thinking(dialect: Dialect, thought: str) -> None:
    tracker = ThinkingTracker(opened=True, dialect=dialect, schemas=TOOLS)
    tracker.push(thought.format(CALLS[dialect.name]) + "\nand so on")
    assert tracker.place == "thinking" and tracker.num_calls == 0
    assert tracker.push("</think>") == [("tag", "</think>")]


def test_only_calls_that_are_made_count() -> None:
    call = CALLS["hermes"]
    for text, count in (
        (f"hm\n{call}\nor not", 0),
        (f"hm\n{call}\n{call}", 2),
        (f"hm</think>{call}", 1),
        (f"hm</think>```\n{call}\n```", 0),
    ):
        tracker = ThinkingTracker(opened=True, schemas=TOOLS)
        tracker.push(text)
        assert tracker.num_calls == count


PARTS = st.sampled_from(["<think>", "</think>", "\n", "\n", "a", "<", "\n```\n", "CALL", "CALL"])


@pytest.mark.parametrize("dialect", [HERMES, XML], ids=["hermes", "xml"])
@settings(deadline=None)
@given(parts=st.lists(PARTS), opened=st.booleans())
def test_the_tracker_agrees_with_the_parser(dialect: Dialect, parts: list[str], opened: bool) -> None:
    whole = "".join(parts).replace("CALL", CALLS[dialect.name]) + "\nThe end."
    tracker = ThinkingTracker(opened=opened, dialect=dialect, schemas=TOOLS)
    tracker.push(whole)
    parser = AnswerParser(dialect, TOOLS, thinking=opened)
    parser.push(whole)
    assert parser.thinks == (tracker.place == "thinking")


TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]


@settings(deadline=None)
@given(parts=st.lists(st.sampled_from([*TAGS, "\n", "a", "<", CALLS["hermes"]])), opened=st.booleans())
def test_places_do_not_depend_on_the_pieces(parts: list[str], opened: bool) -> None:
    whole = "".join(parts)
    tracker, by_letter = (ThinkingTracker(opened=opened, schemas=TOOLS) for _ in range(2))
    tracker.push(whole)
    assert "".join(part for letter in whole for _, part in by_letter.push(letter)) == whole
    assert (tracker.place, tracker.num_closed, tracker.num_calls) == (
        by_letter.place,
        by_letter.num_closed,
        by_letter.num_calls,
    )
