"""Answers taken apart for the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from godwit.cli.reply import Reply, ReplyFormat, ReplyText, ToolCall, parse_reply, with_call_ids
from godwit.dialect.detect import detect
from godwit.engine import ThinkingRules
from godwit.engine.chat_prompt import opens_thinking
from godwit.text.chat_template import ChatTemplate
from godwit.text.tokenizer import Tokenizer
from tests.engine.tiny import tiny_tokenizer, tokenizer_json

CALL = '{"name": "get_time", "arguments": {"city": "Oslo"}}'
OSLO = ToolCall("get_time", {"city": "Oslo"})
TOOL = {"type": "function", "function": {"name": "get_time", "parameters": {"properties": {"city": {}}}}}
#: For each family: what its chat template says about calls, and a call in an answer.
DIALECTS = {
    "hermes": (
        '{% if tools %}<tool_call>{"name": "x", "arguments": {}}</tool_call>{% endif %}',
        f"<tool_call>\n{CALL}\n</tool_call>",
    ),
    "xml": (
        "{% if tools %}<tool_call><function=x>{% endif %}",
        "<tool_call>\n<function=get_time>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>",
    ),
    "llama": (
        '{% if tools %}{"name": "x", "parameters": {}}{% endif %}',
        '{"name": "get_time", "parameters": {"city": "Oslo"}}',
    ),
    "mistral": ("{% if tools %}[TOOL_CALLS]{% endif %}", f"[TOOL_CALLS] [{CALL}]"),
    "mistral_args": (
        "{% if tools %}[TOOL_CALLS]x[ARGS]{% endif %}",
        '[TOOL_CALLS]get_time[ARGS]{"city": "Oslo"}',
    ),
}
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


def format_for(template: str) -> ReplyFormat:
    return ReplyFormat(Tokenizer(tokenizer_json(["[ARGS]"]), chat_template=ChatTemplate(template)))


def parts_of(reply: Reply, pieces: list[str]) -> Iterator[ReplyText | ToolCall]:
    for piece in pieces:
        yield from reply.push(piece)
    yield from reply.flush()


@pytest.mark.parametrize("text", TEXTS)
def test_parts_do_not_depend_on_the_pieces(text: str) -> None:
    def joined(pieces: list[str]) -> list[ReplyText | ToolCall]:
        result: list[ReplyText | ToolCall] = []
        for part in parts_of(ReplyFormat(tiny_tokenizer()).reply([]), pieces):
            last = result[-1] if result else None
            if isinstance(part, ReplyText) and isinstance(last, ReplyText) and last.kind == part.kind:
                result[-1] = ReplyText(part.kind, last.text + part.text)
            else:
                result.append(part)
        return result

    whole = joined([text])
    for size in (1, 2, 5):
        assert joined([text[i : i + size] for i in range(0, len(text), size)]) == whole


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_is_read(name: str) -> None:
    template, call = DIALECTS[name]
    for pieces in ([call], list(call)):
        reply = format_for(template).reply([TOOL])
        assert list(parts_of(reply, pieces)) == [OSLO]
        assert reply.calls == [OSLO] and reply.text == ""


def test_marks_are_the_special_tokens_of_calls() -> None:
    tokenizer = Tokenizer(tokenizer_json(["[ARGS]", "[TOOL_CALLS]"]))
    marks = {tokenizer.token_to_id(mark) for mark in ("[ARGS]", "[TOOL_CALLS]")}
    assert ReplyFormat(tokenizer).marks == marks and None not in marks


def test_a_template_that_takes_one_call_gets_one() -> None:
    template, call = DIALECTS["llama"]
    reply = format_for(template + "{# This model only supports single tool-calls at once! #}").reply([TOOL])
    assert list(parts_of(reply, [f"{call}; ", f"{call} and so on"])) == [OSLO] and reply.ended
    both = format_for(template).reply([TOOL])
    assert list(parts_of(both, [f"{call}; {call}"])) == [OSLO, OSLO] and not both.ended


def test_what_ends_thinking_depends_on_the_dialect() -> None:
    for template, _ in DIALECTS.values():
        rules = format_for(template).rules(ThinkingRules(budget=7), [TOOL])
        assert rules.dialect is detect(template) and rules.budget == 7
        assert list(rules.schemas) == [OSLO.name]


def test_an_answer_is_taken_apart() -> None:
    answer = parse_reply(TEXTS[1])
    assert (answer.text, answer.thinking, answer.calls) == ("It is late.", "hm", [OSLO])
    assert answer.as_message() == {
        "role": "assistant",
        "content": "It is late.",
        "reasoning_content": "hm",
        "tool_calls": [{"type": "function", "function": {"name": "get_time", "arguments": {"city": "Oslo"}}}],
    }
    assert len(parse_reply(TEXTS[2]).calls) == 2


def test_a_plain_answer_stays_as_it_is() -> None:
    assert parse_reply("\n hi \n").as_message() == {"role": "assistant", "content": "\n hi \n"}
    raw = Reply()
    assert raw.empty and list(parts_of(raw, [TEXTS[1]])) == [ReplyText("text", TEXTS[1])]
    assert raw.text == TEXTS[1] and not (raw.thinking or raw.calls or raw.empty)


def test_what_is_no_call_stays_text() -> None:
    answer = parse_reply(TEXTS[3])
    assert answer.text == TEXTS[3] and not answer.calls
    assert parse_reply(TEXTS[5]).text == TEXTS[5]
    unclosed = '<tool_call>{"name": "f", "arguments": {"x": 1</tool_call>'
    assert parse_reply(unclosed).text == unclosed and not parse_reply(unclosed).calls


def test_a_complete_call_needs_no_closing_tag() -> None:
    assert parse_reply(TEXTS[4]).calls == [OSLO]


def test_thinking_may_begin_in_the_prompt() -> None:
    answer = parse_reply("hm\n</think>\n\nYes.", thinking=True)
    assert (answer.thinking, answer.text) == ("hm", "Yes.")
    assert opens_thinking("<|im_start|>assistant\n<think>\n") and not opens_thinking("</think>\n\n")
    assert parse_reply("<think>never closed").thinking == "never closed"


def test_a_second_closing_tag_is_left_out_on_the_terminal() -> None:
    told = "a</think>\n</think>\n\nYes </think>"
    for pieces in ([told], list(told)):
        reply = ReplyFormat(tiny_tokenizer()).reply([], thinking=True)
        parts = list(parts_of(reply, pieces))
        assert "".join(p.text for p in parts if isinstance(p, ReplyText) and p.kind == "thinking") == "a"
        assert reply.thinking == "a" and reply.text.strip() == "Yes </think>"


@pytest.mark.parametrize(
    "text",
    ["", "x", "[]", "null", '{"name": 1}', '{"name": ""}', '{"arguments": {}}',
     '{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": {"x": NaN}}',
     '{"name": "f", "arguments": "x"}', "[" * 100_000,
     '{"name": "f", "arguments": {"x": ' + "9" * 5000 + "}}"],
)  # fmt: skip
def test_calls_that_cannot_be_read(text: str) -> None:
    answer = parse_reply(f"<tool_call>{text}</tool_call>")
    assert not answer.calls and answer.text == f"<tool_call>{text}</tool_call>"


def test_arguments_may_be_a_string_or_absent() -> None:
    text = json.dumps({"name": "f", "arguments": '{"x": 1}'})
    assert parse_reply(f"<tool_call>\n{text}\n</tool_call>").calls == [ToolCall("f", {"x": 1})]
    assert parse_reply('<tool_call>{"name": "f"}</tool_call>').calls == [ToolCall("f", {})]


def test_calls_and_results_get_ids_in_order() -> None:
    message = parse_reply(TEXTS[2]).as_message()
    talk = [{"role": "user", "content": "?"}, message, *[{"role": "tool", "content": "1"}] * 2, message]
    numbered = list(with_call_ids(talk))
    ids = [call["id"] for message in numbered for call in message.get("tool_calls", [])]
    assert ids == ["000000000", "000000001", "000000002", "000000003"]
    assert [message.get("tool_call_id") for message in numbered] == [None, None, *ids[:2], None]
    assert "id" not in message["tool_calls"][0] and numbered[0] == talk[0]
