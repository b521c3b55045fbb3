from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from godwit.engine.answer import Segmenter, StopMatcher, ToolCall, opens_thinking, parse_answer, parse_call

CALL = '{"name": "get_time", "arguments": {"city": "Oslo"}}'


# stop texts


def cut_naively(text: str, stops: list[str]) -> tuple[str, bool]:
    """What is left of a text: up to the stop text that is complete first."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


pieces = st.lists(st.text(alphabet="ab\n", max_size=5), max_size=12)
stops = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=4)


@given(pieces, stops)
def test_stops_do_not_depend_on_the_pieces_and_never_show(pieces: list[str], stops: list[str]) -> None:
    wanted, stopped = cut_naively("".join(pieces), stops)
    matcher, shown = StopMatcher(stops), ""
    for piece in pieces:
        shown += matcher.push(piece)
        assert wanted.startswith(shown)  # nothing that would have to be taken back
        if matcher.matched is not None:
            break
    assert shown + matcher.flush() == wanted
    assert (matcher.matched is not None) == stopped


def test_only_what_may_become_a_stop_is_held() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("the E") == "the "
    assert matcher.push("N") == ""
    assert matcher.push("T") == "ENT"
    assert matcher.push("EN") == ""
    assert matcher.flush() == "EN"
    assert matcher.push("D") == "D"
    assert StopMatcher([]).push("all") == "all"


def test_after_a_stop_nothing_comes() -> None:
    matcher = StopMatcher(["b", "abc"])
    assert matcher.push("xabc") == "xa" and matcher.matched == "b"
    assert matcher.push("more") == "" and matcher.flush() == ""


# thinking and calls


TEXTS = [
    "plain",
    f"<think>\nhm\n</think>\n\nIt is late.\n<tool_call>\n{CALL}\n</tool_call>",
    f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>",
    "a < b <thin air> </think> <tool_call>broken</tool_call> rest <think>never closed",
    f"<tool_call>{CALL}",
    '<tool_call>{"name": "x", "argu',
    "",
    "<think></think>",
]


@pytest.mark.parametrize("text", TEXTS)
def test_segments_do_not_depend_on_the_pieces(text: str) -> None:
    def segments(pieces: list[str]) -> list[tuple[str, str]]:
        segmenter = Segmenter()
        parts = [part for piece in pieces for part in segmenter.push(piece)] + segmenter.flush()
        joined: list[tuple[str, str]] = []
        for kind, part in parts:
            if kind != "tool_call" and joined and joined[-1][0] == kind:
                joined[-1] = (kind, joined[-1][1] + part)
            else:
                joined.append((kind, part))
        return joined

    whole = segments([text])
    for size in (1, 2, 5):
        assert segments([text[i : i + size] for i in range(0, len(text), size)]) == whole


def test_an_answer_is_taken_apart() -> None:
    answer = parse_answer(TEXTS[1])
    assert answer.content == "It is late." and answer.thinking == "hm"
    assert answer.tool_calls == (ToolCall("get_time", {"city": "Oslo"}),)
    assert answer.as_message() == {
        "role": "assistant",
        "content": "It is late.",
        "reasoning_content": "hm",
        "tool_calls": [{"type": "function", "function": {"name": "get_time", "arguments": {"city": "Oslo"}}}],
    }
    assert len(parse_answer(TEXTS[2]).tool_calls) == 2


def test_a_plain_answer_stays_as_it_is() -> None:
    assert parse_answer("\n hi \n").as_message() == {"role": "assistant", "content": "\n hi \n"}


def test_what_is_no_call_stays_text() -> None:
    answer = parse_answer(TEXTS[3])
    assert answer.content == "a < b <thin air> </think> <tool_call>broken</tool_call> rest "
    assert answer.thinking == "never closed" and not answer.tool_calls
    assert parse_answer(TEXTS[5]).content == TEXTS[5]


def test_a_complete_call_needs_no_closing_tag() -> None:
    assert parse_answer(TEXTS[4]).tool_calls == (ToolCall("get_time", {"city": "Oslo"}),)


def test_thinking_may_begin_in_the_prompt() -> None:
    answer = parse_answer("hm\n</think>\n\nYes.", thinking=True)
    assert (answer.thinking, answer.content) == ("hm", "Yes.")
    assert opens_thinking("<|im_start|>assistant\n<think>\n") and not opens_thinking("</think>\n\n")


@pytest.mark.parametrize(
    "text",
    ["", "x", "[]", "null", '{"name": 1}', '{"name": ""}', '{"arguments": {}}',
     '{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": {"x": NaN}}',
     '{"name": "f", "arguments": "x"}', "[" * 100_000,
     '{"name": "f", "arguments": {"x": ' + "9" * 5000 + "}}"],
)  # fmt: skip
def test_calls_that_cannot_be_read(text: str) -> None:
    assert parse_call(text) is None


def test_arguments_may_be_a_string_or_absent() -> None:
    text = json.dumps({"name": "f", "arguments": '{"x": 1}'})
    assert parse_call(f"\n{text}\n") == ToolCall("f", {"x": 1})
    assert parse_call('{"name": "f"}') == ToolCall("f", {})
