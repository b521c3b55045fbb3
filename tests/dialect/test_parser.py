"""Answers taken apart: the same whichever way the stream is cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from godwit.dialect.parser import AnswerParser, CallArguments, CallEnd, CallStart, Text, Thinking
from tests.dialect.parsing import BY_NAME, call_of, calls_of, parse, text_of

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
    parser = AnswerParser(BY_NAME["hermes"])
    assert parser.push("Hello <b") == [Text("Hello <b")]
    assert parser.push("> <tool_") == [Text("> ")]
    assert parser.push("box>") == [Text("<tool_box>")]


def test_arguments_stream() -> None:
    parser = AnswerParser(BY_NAME["hermes"])
    assert parser.push('<tool_call>{"name": "write", "arg') == []
    assert parser.push('uments": {"pa') == [CallStart(0, "write"), CallArguments(0, '{"pa')]
    assert parser.push('th": 1') == [CallArguments(0, 'th": 1')]
    assert parser.push("}") == [CallArguments(0, "}")]
    assert parser.push("}")[0] == CallEnd(0, True, '<tool_call>{"name": "write", "arguments": {"path": 1}}')


@pytest.mark.parametrize("format", ["hermes", "xml"])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_what_looks_like_a_call_within_a_form_is_text(format: str, size: int) -> None:
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
    assert deltas[-1] == Text("\n\nDone.")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("Sure!\n", "\nDone", "Sure!\nDone"),
        ("Sure!", "Done", "Sure!\nDone"),
        ("Sure!\n", "\n\nDone", "Sure!\n\nDone"),
        ("Sure!\n\n", f"\n{HERMES}\nDone\n", "Sure!\n\nDone"),
        ("\n", "\nDone", "\nDone"),
        ("Sure!\n", "\n\n", "Sure!"),
        ("<think>\nhm\n</think>\n\n", "\nDone", "Done"),
    ],
)
@pytest.mark.parametrize("size", [1, 5, 10_000])
def test_text_around_a_call_keeps_its_lines(before: str, after: str, said: str, size: int) -> None:
    text = before + HERMES + after
    assert text_of(parse([text[i : i + size] for i in range(0, len(text), size)])) == said.lstrip("\n")


FENCED = [
    "Example:\n```\n{}\n```\nThat is all.",
    "~~~text\n```\n{}\n~~~\n",
    "  ````\n```\n{}\n````",
    "```\n{}",
    "``` {}",
]


@pytest.mark.parametrize("fenced", FENCED)
@pytest.mark.parametrize(
    "call", [HERMES, XML, "<function=write>\n</function>"], ids=["hermes", "xml", "bare"]
)
def test_a_call_in_fenced_code_is_an_example(fenced: str, call: str) -> None:
    text = fenced.replace("{}", call)
    for pieces in ([text], list(text)):
        assert parse(pieces, "hermes" if call == HERMES else "xml") == [Text(text)]


def test_a_call_behind_fenced_code_is_a_call() -> None:
    for said in ("```\ncode\n```", "```a``` is code", "a ``` b", "~~~\ncode\n~~~~  "):
        deltas = parse([f"{said}\n{HERMES}"])
        assert text_of(deltas) == said and calls_of(deltas)[0][0] == "write"


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
        '{"name": "f", "arguments": 0}',
        '{"name": "f", "args": [1]}',
        '{"name": "f" "arguments": {}}',
        '{"name": NaN}',
    ],
)
def test_what_is_no_hermes_call_is_text(body: str) -> None:
    text = f"A\n<tool_call>\n{body}\n</tool_call>\nB"
    assert parse([text]) == [Text(text)]


@pytest.mark.parametrize(
    "arguments", ["", ', "arguments": null', ', "arguments": ""', ', "parameters": " \\n"', ', "args": {}']
)
def test_a_call_without_arguments(arguments: str) -> None:
    deltas = parse([f'<tool_call>{{"name": "f"{arguments}}}</tool_call>'])
    assert call_of(deltas) == ("f", "{}", True) and not text_of(deltas)


@pytest.mark.parametrize("key", ["arguments", "parameters", "args"])
def test_arguments_under_the_names_that_models_give_them(key: str) -> None:
    text = f'<tool_call>{{"name": "f", "{key}": {{"a": [1, "{{"]}}}}</tool_call>'
    for pieces in ([text], list(text)):
        assert calls_of(parse(pieces)) == [("f", {"a": [1, "{"]})]
    before = f'<tool_call>{{"{key}": {{"a": 1}}, "name": "f"}}</tool_call>'
    assert calls_of(parse([before])) == [("f", {"a": 1})]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("line 1\nline 2\tend\r\x01", "line 1\nline 2\tend\r\x01"),
        ("a\\\nb", "a\nb"),
        (r"\d+\.txt", r"\d+\.txt"),
        (r"it\'s", "it's"),
        (r"\"\\\u00e9\n", '"\\é\n'),
    ],
)
def test_strings_are_mended_where_it_is_clear_what_was_meant(written: str, value: str) -> None:
    text = f'<tool_call>{{"name": "f", "arguments": {{"a\tb": "{written}"}}}}</tool_call>'
    for pieces in ([text], list(text)):
        assert calls_of(parse(pieces)) == [("f", {"a\tb": value})]


def test_arguments_within_a_string_may_have_line_breaks() -> None:
    text = '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"x\ny\\"}"}</tool_call>'
    assert calls_of(parse([text])) == [("f", {"a": "x\ny"})]


@pytest.mark.parametrize("bad", ['{"a": 1</tool_call>', '{"a": [1}}</tool_call>', "{'a': 1}}</tool_call>"])
def test_broken_arguments_are_never_an_object(bad: str) -> None:
    deltas = parse([f'<tool_call>{{"name": "f", "arguments": {bad}And text.'])
    name, arguments, complete = call_of(deltas)
    assert name == "f" and not complete
    with pytest.raises(ValueError):
        json.loads(arguments)
    assert deltas[-1] == Text("And text.")  # nothing was said before
    (end,) = (delta for delta in deltas if isinstance(delta, CallEnd))
    assert bad in end.raw


def test_a_call_that_was_cut_off_is_not_complete() -> None:
    for end in range(HERMES.index('"path"'), HERMES.rindex("}}") + 1):
        _, arguments, complete = call_of(parse([HERMES[:end]]))
        assert not complete
        with pytest.raises(ValueError):
            json.loads(arguments)


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


@pytest.mark.parametrize("format", ["hermes", "xml"])
def test_a_call_in_unclosed_thinking(format: str) -> None:
    call = XML if format == "xml" else HERMES
    for text in (f"hm\n{call}", f"hm\n{call}\n{call}\n"):
        for pieces in ([text], list(text)):
            deltas = parse(pieces, format, thinking=True)
            assert deltas[0] == Thinking("hm") and not text_of(deltas)
            assert len(calls_of(deltas)) == text.count("<tool_call>")


@pytest.mark.parametrize(
    "thought",
    [
        "I would write\n{}\nfor that.",
        "I would write {}",
        "```\n{}\n```",
        "The form is\n<tool_call>\n<function=write>... as in the docs",
        "The form is\n<tool_call>\n<function=write>\n<parameter=path>\nx",
        '<tool_call>\n{"name": "write"',
        "<tool_call>\n<function=other>\n</function>\n</tool_call>",
        '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>',
        "{}",
    ],
)
@pytest.mark.parametrize("format", ["hermes", "xml"])
def test_a_call_that_is_only_thought_of(thought: str, format: str) -> None:
    thought = thought.replace("{}", XML if format == "xml" else HERMES)
    for end, said in (("\n</think>\nHello", [Text("Hello")]), ("\nNo.", [])):
        for pieces in ([thought + end], list(thought + end)):
            expected = thought if said else thought + end
            assert parse(pieces, format, thinking=True) == [Thinking(expected), *said]


def test_thoughts_on_calls_are_not_held_back_longer_than_needed() -> None:
    parser = AnswerParser(BY_NAME["xml"], {"f": {}}, thinking=True)
    assert parser.push("The tag is\n<tool_call>") == [Thinking("The tag is")]
    assert parser.push(" and") == [Thinking("\n<tool_call> and")]
    parser.push("\n</think>\n<tool_call>")
    assert not parser.thinks


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
        *("<", ">", "/", "é", "💡", "text", HERMES, XML, "```", "\n```\n", "\n<function=write>\n", ";"),
        *("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", '\n{"name": "write", "parameters": {'),
        *(
            '"parameters"',
            '{"name": "write", "arguments": {}}',
            "\x01",
            "'",
            "</parameter>\n<parameter=lines>",
        ),
    ]
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(FRAGMENTS, st.text(max_size=3)), max_size=14).map("".join),
    st.data(),
    st.sampled_from(["hermes", "xml", "llama", "mistral", None]),
    st.booleans(),
    st.booleans(),
)
def test_every_cut_gives_the_same(
    text: str, data: st.DataObject, format: str | None, thinking: bool, only_calls: bool
) -> None:
    whole = parse([text], format, thinking=thinking, only_calls=only_calls)
    assert parse(list(text), format, thinking=thinking, only_calls=only_calls) == whole
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=6).map(sorted))
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    assert parse(pieces, format, thinking=thinking, only_calls=only_calls) == whole


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.one_of(FRAGMENTS, st.text(max_size=3)), max_size=14).map("".join),
    st.sampled_from(["hermes", "xml", "llama", "mistral"]),
)
def test_complete_calls_are_objects_and_calls_are_in_order(text: str, format: str) -> None:
    deltas = parse([text], format)
    ends = [delta for delta in deltas if isinstance(delta, CallEnd)]
    assert [end.index for end in ends] == list(range(len(ends)))
    for end in ends:
        name, arguments, complete = call_of(deltas, end.index)
        assert name
        if complete:
            assert isinstance(json.loads(arguments), dict)
