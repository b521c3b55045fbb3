"""Answers taken apart: the same whichever way the stream is cut."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from godwit.server.tools import (
    AnswerParser,
    CallArguments,
    CallEnd,
    CallStart,
    Delta,
    Format,
    Text,
    Thinking,
    format_of,
)

SCHEMAS: dict[str, dict[str, Any]] = {
    "write": {
        "type": "object",
        "properties": {
            "path": {"type": "string"},
            "lines": {"type": "integer"},
            "share": {"type": ["null", "number"]},
            "force": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
            "tags": {"$ref": "#/$defs/Tags"},
            "loop": {"$ref": "#/$defs/Loop"},
        },
        "$defs": {"Tags": {"type": "array"}, "Loop": {"$ref": "#/$defs/Loop"}},
    }
}


def merged(deltas: Iterable[Delta]) -> list[Delta]:
    """Neighbours of one kind joined."""
    result: list[Delta] = []
    for delta in deltas:
        last = result[-1] if result else None
        if isinstance(delta, Text) and isinstance(last, Text):
            result[-1] = Text(last.text + delta.text)
        elif isinstance(delta, Thinking) and isinstance(last, Thinking):
            result[-1] = Thinking(last.text + delta.text)
        elif isinstance(delta, CallArguments) and isinstance(last, CallArguments):
            result[-1] = CallArguments(last.index, last.text + delta.text)
        else:
            result.append(delta)
    return result


def parse(
    pieces: Sequence[str],
    format: Format | None = "hermes",
    *,
    thinking: bool = False,
    cut: bool = False,
    only_calls: bool = False,
) -> list[Delta]:
    parser = AnswerParser(format, SCHEMAS, thinking=thinking, only_calls=only_calls)
    deltas = [delta for piece in pieces for delta in parser.push(piece)]
    return merged([*deltas, *parser.flush(cut=cut)])


def call_of(deltas: list[Delta], index: int = 0) -> tuple[str, str, bool]:
    """(name, arguments, complete) of one call."""
    (name,) = (d.name for d in deltas if isinstance(d, CallStart) and d.index == index)
    arguments = "".join(d.text for d in deltas if isinstance(d, CallArguments) and d.index == index)
    (end,) = (d for d in deltas if isinstance(d, CallEnd) and d.index == index)
    return name, arguments, end.complete


HERMES = (
    '<tool_call>\n{"name": "write", "arguments": {"path": "</tool_call>", "n": [1, {"a": "}\\""}]}}\n'
    "</tool_call>"
)
XML = (
    "<tool_call>\n<function=write>\n<parameter=path>\na <b>\n\n</parameter>\n"
    "<parameter=lines>\n12\n</parameter>\n"
    "<parameter=share>\n0.5\n</parameter>\n<parameter=force>\nTrue\n</parameter>\n"
    '<parameter=tags>\n["x", 1]\n</parameter>\n</function>\n</tool_call>'
)


def test_text_without_tags_is_passed_on_at_once() -> None:
    parser = AnswerParser()
    assert parser.push("a <tool_call>") == [Text("a <tool_call>")]
    assert parser.push("\n\n") == [Text("\n\n")]
    assert parser.flush() == []


def test_text_before_a_call_is_not_held_back_longer_than_needed() -> None:
    parser = AnswerParser("hermes")
    assert parser.push("Hello <b") == [Text("Hello <b")]
    assert parser.push("> <tool_") == [Text("> ")]
    assert parser.push("box>") == [Text("<tool_box>")]


def test_arguments_stream() -> None:
    parser = AnswerParser("hermes")
    assert parser.push('<tool_call>{"name": "write", "arg') == []
    assert parser.push('uments": {"pa') == [CallStart(0, "write"), CallArguments(0, '{"pa')]
    assert parser.push('th": 1') == [CallArguments(0, 'th": 1')]
    assert parser.push("}") == [CallArguments(0, "}")]
    assert parser.push("}")[0] == CallEnd(0, True, '<tool_call>{"name": "write", "arguments": {"path": 1}}')


@pytest.mark.parametrize("format", ["hermes", "xml"])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_what_looks_like_a_call_within_a_form_is_text(format: Format, size: int) -> None:
    call = XML if format == "xml" else HERMES
    said = json.dumps({"a": call})
    for text, thoughts in ((said, ""), (f"<think>hm</think>\n\n{said}", "hm")):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        expected = [Thinking(thoughts), Text(said)] if thoughts else [Text(said)]
        assert parse(pieces, format, only_calls=True) == expected
    calls = f"\n{call}\n{call}"
    pieces = [calls[i : i + size] for i in range(0, len(calls), size)]
    assert parse(pieces, format, only_calls=True) == parse(pieces, format)
    assert call_of(parse(pieces, format, only_calls=True), 1)[0] == "write"


def test_a_hermes_call_with_text_around() -> None:
    deltas = parse([f"Let me see.\n\n{HERMES}\nDone.\n"])
    assert deltas[0] == Text("Let me see.")
    assert call_of(deltas) == ("write", '{"path": "</tool_call>", "n": [1, {"a": "}\\""}]}', True)
    assert deltas[-1] == Text("Done.")


def test_parallel_calls() -> None:
    second = '<tool_call>{"name": "other", "arguments": {}}</tool_call>'
    deltas = parse([f"{HERMES}\n{second}"])
    assert call_of(deltas, 0)[0] == "write"
    assert call_of(deltas, 1) == ("other", "{}", True)
    assert not [delta for delta in deltas if isinstance(delta, Text)]


@pytest.mark.parametrize(
    "body",
    [
        '{"arguments": {"a": 1}, "name": "f"}',
        '{"name": "f", "arguments": "{\\"a\\": 1}"}',
        '{"name": "f", "id": 3, "arguments": {"a": 1}, "more": [null, {}]}',
        '{"name": "f", "arguments": {"a": 1}}}',
        '{"name": "f", "arguments": {"a": 1}',
    ],
)
def test_hermes_calls_that_deviate_and_are_clear(body: str) -> None:
    deltas = parse([f"<tool_call>\n{body}\n</tool_call>"])
    name, arguments, complete = call_of(deltas)
    assert (name, json.loads(arguments), complete) == ("f", {"a": 1}, True)
    assert not [delta for delta in deltas if isinstance(delta, Text)] or body.endswith("1}")


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{}",
        "[1]",
        "f(a=1)",
        '{"name": 3}',
        '{"name": "", "arguments": {}}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": "no"}',
        '{"name": "f", "arguments": null}',
        '{"name": "f" "arguments": {}}',
        '{"name": NaN}',
    ],
)
def test_what_is_no_hermes_call_is_text(body: str) -> None:
    text = f"A\n<tool_call>\n{body}\n</tool_call>\nB"
    assert parse([text]) == [Text(text)]


def test_a_call_without_arguments() -> None:
    assert call_of(parse(['<tool_call>{"name": "f"}</tool_call>'])) == ("f", "{}", True)


@pytest.mark.parametrize("bad", ['{"a": 1</tool_call>', '{"a": [1}}</tool_call>', "{'a': 1}}</tool_call>"])
def test_broken_arguments_are_never_an_object(bad: str) -> None:
    deltas = parse([f'<tool_call>{{"name": "f", "arguments": {bad}And text.'])
    name, arguments, complete = call_of(deltas)
    assert name == "f" and not complete
    with pytest.raises(ValueError):
        json.loads(arguments)
    assert deltas[-1] == Text("And text.")
    (end,) = (delta for delta in deltas if isinstance(delta, CallEnd))
    assert bad in end.raw


def test_a_call_that_was_cut_off_is_not_complete() -> None:
    for end in range(HERMES.index('"path"'), HERMES.rindex("}}") + 1):
        _, arguments, complete = call_of(parse([HERMES[:end]], cut=True))
        assert not complete
        with pytest.raises(ValueError):
            json.loads(arguments)


def test_an_xml_call() -> None:
    deltas = parse([f"I write.\n{XML}"], "xml")
    name, arguments, complete = call_of(deltas)
    expected = {"path": "a <b>\n", "lines": 12, "share": 0.5, "force": True, "tags": ["x", 1]}
    assert (name, json.loads(arguments), complete) == ("write", expected, True)
    assert deltas[0] == Text("I write.")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("lines", "1.5", "1.5"),
        ("lines", "9" * 5000, "9" * 5000),
        ("share", "2", 2),
        ("share", "nan", "nan"),
        ("share", "1e999", "1e999"),
        ("share", "None", None),
        ("force", "FALSE", False),
        ("force", "maybe", "maybe"),
        ("tags", "__import__('os')", "__import__('os')"),
        ("tags", "[NaN]", "[NaN]"),
        ("loop", "7", "7"),
        ("unknown", "7", "7"),
        ("path", "null", "null"),
        ("path", "", ""),
        ("path", '"\\\n\x00', '"\\\n\x00'),
    ],
)
def test_values_get_the_types_of_the_schema(key: str, text: str, value: Any) -> None:
    call = f"<function=write>\n<parameter={key}>\n{text}\n</parameter>\n</function>"
    name, arguments, complete = call_of(parse([f"<tool_call>\n{call}\n</tool_call>"], "xml"))
    assert (name, json.loads(arguments), complete) == ("write", {key: value}, True)


@pytest.mark.parametrize(
    "text",
    [
        "<function=write>\n<parameter=path>\nx\n</parameter>\n</function>",
        "<tool_call>\n<function=write>\n<parameter=path>\nx\n</function>\n</tool_call>",
        "<tool_call><function=write><parameter=path>x</parameter></tool_call>",
        "<tool_call><function=write>\nhm < b<parameter=path>x",
        "<tool_call><function=write><parameter=path>x</parameter><parameter=path>y</parameter></function>",
    ],
)
def test_xml_calls_that_deviate_and_are_clear(text: str) -> None:
    deltas = parse([text], "xml")
    name, arguments, complete = call_of(deltas)
    assert (name, json.loads(arguments), complete) == ("write", {"path": "x"}, True)
    assert not [delta for delta in deltas if isinstance(delta, Text)]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\nno\n</tool_call>",
        "<tool_call>\n<function=>\n",
        "<function=" + "x" * 300 + ">",
        "<function=a",
    ],
)
def test_what_is_no_xml_call_is_text(text: str) -> None:
    assert parse([text], "xml") == [Text(text)]


def test_an_xml_call_that_was_cut_off_is_not_complete() -> None:
    for end in range(XML.index("<parameter=path>") + 16, XML.index("</function>")):
        assert not call_of(parse([XML[:end]], "xml", cut=True))[2]


def test_thinking() -> None:
    assert parse(["<think>\nhm\n</think>\n\nYes.\n"]) == [Thinking("hm"), Text("Yes.")]
    assert parse(["hm</think>Yes."], None, thinking=True) == [Thinking("hm"), Text("Yes.")]
    assert parse(["\n<think>hm"], None) == [Thinking("hm")]
    assert parse(["<think>\n\n</think>\n\nYes."], None) == [Text("Yes.")]
    assert parse(["Say <think>hm</think>"], None) == [Text("Say <think>hm</think>")]
    assert parse(["a</think>\n</think>\n\nYes."], None, thinking=True) == [Thinking("a"), Text("Yes.")]
    assert parse(["a\n</think>\n<think>\nb</think>Yes."], None, thinking=True) == [
        Thinking("a\nb"),
        Text("Yes."),
    ]
    assert parse(["a</think>Say </think>"], None, thinking=True) == [Thinking("a"), Text("Say </think>")]


def test_tokens_of_thinking_are_told_from_the_first_on() -> None:
    parser, thinks = AnswerParser(None, thinking=True), []
    for piece in ("Let", " me", " see", ".</think>", "Yes"):
        thinks.append(parser.thinks)
        parser.push(piece)
    assert thinks == [True] * 4 + [False]


def test_a_call_in_unclosed_thinking() -> None:
    deltas = parse([f"hm\n{XML}"], "xml", thinking=True)
    assert deltas[0] == Thinking("hm")
    assert call_of(deltas)[2]


def test_the_format_follows_from_the_template() -> None:
    assert format_of("{% for m in messages %}{{ m.content }}{% endfor %}") is None
    assert format_of("{% if tools %}<tool_call>{% endif %}") == "hermes"
    assert format_of("{% if tools %}<tool_call><function=name>{% endif %}") == "xml"


FRAGMENTS = st.sampled_from(
    [
        *(
            "<tool_call>",
            "</tool_call>",
            "<think>",
            "</think>",
            "<function=",
            "write>",
            "<function=write>",
            "</function>",
        ),
        *(
            "<parameter=",
            "path>",
            "<parameter=path>",
            "<parameter=lines>",
            "</parameter>",
            "\n",
            "\n\n",
            " ",
            "12",
        ),
        *(
            '{"name": "f", "arguments": {',
            '"a": 1',
            "}",
            "}}",
            '"',
            "\\",
            ", ",
            ": ",
            "[",
            "]",
            '"name"',
            '"arguments"',
        ),
        *("<", ">", "/", "é", "💡", "text", HERMES, XML),
    ]
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.one_of(FRAGMENTS, st.text(max_size=3)), max_size=14).map("".join),
    st.data(),
    st.sampled_from(["hermes", "xml", None]),
    st.booleans(),
    st.booleans(),
)
def test_every_cut_gives_the_same(
    text: str, data: st.DataObject, format: Format | None, thinking: bool, cut: bool
) -> None:
    whole = parse([text], format, thinking=thinking, cut=cut)
    assert parse(list(text), format, thinking=thinking, cut=cut) == whole
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=6).map(sorted))
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    assert parse(pieces, format, thinking=thinking, cut=cut) == whole


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.one_of(FRAGMENTS, st.text(max_size=3)), max_size=14).map("".join),
    st.sampled_from(["hermes", "xml"]),
)
def test_complete_calls_are_objects_and_calls_are_in_order(text: str, format: Format) -> None:
    deltas = parse([text], format)
    ends = [delta for delta in deltas if isinstance(delta, CallEnd)]
    assert [end.index for end in ends] == list(range(len(ends)))
    for end in ends:
        name, arguments, complete = call_of(deltas, end.index)
        assert name
        if complete:
            assert isinstance(json.loads(arguments), dict)
