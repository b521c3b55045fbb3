"""Calls as Llama 3 and Mistral write them, and which form a template has."""

from __future__ import annotations

from typing import Any

import pytest

from godwit.dialect.detect import detect
from godwit.dialect.parser import AnswerParser, CallArguments, CallStart, Text
from tests.dialect.parsing import BY_NAME, calls_of, parse, text_of

LLAMA = '{"name": "write", "parameters": {"path": "a;b", "n": [1, {"é": "}"}]}}'
MEANT = ("write", {"path": "a;b", "n": [1, {"é": "}"}]})
LIST = (
    '[TOOL_CALLS] [{"name": "write", "arguments": {"path": "x"}}, {"arguments": {}, "name": "g", "id": "1"}]'
)


def read(text: str, format: str) -> tuple[str, list[tuple[str, Any]]]:
    """Text and calls of an answer, which are the same however it is cut."""
    whole = parse([text], format)
    assert parse(list(text), format) == whole
    return text_of(whole), calls_of(whole)


@pytest.mark.parametrize(
    ("text", "said", "count"),
    [
        (LLAMA, "", 1),
        (f"<|python_tag|>{LLAMA}", "", 1),
        (f"\n\n{LLAMA}\n", "\n\n", 1),
        (f"{LLAMA}; {LLAMA}", "", 2),
        (f"<|python_tag|>{LLAMA};\n{LLAMA}", "", 2),
        (f"{LLAMA}\n{LLAMA}\n\nDone.", "\n\nDone.", 2),
        (f"[{LLAMA}, {LLAMA}]", f"[{LLAMA}, {LLAMA}]", 0),
        (f"I write.\n{LLAMA}", "I write.", 1),
        (LLAMA.replace("{", '{"type": "function", ', 1), "", 1),
        (LLAMA.replace("parameters", "arguments"), "", 1),
        (LLAMA + "}", "", 1),
    ],
)
def test_calls_of_llama(text: str, said: str, count: int) -> None:
    found, calls = read(text, "llama")
    assert calls == [MEANT] * count
    assert found == said or (found.strip(), said.strip()) == ("Done.", "Done.") or not said.strip()


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Ann", "age": 3}',
        '{"name": "other", "parameters": {}}',
        '{"name": "write"}',
        '{"name": "write", "age": 3}',
        '{"city": "Rome", "name": "write", "parameters": {}}',
        f"Call it with {LLAMA}",
        f"```json\n{LLAMA}\n```",
        "{}",
        "{\n  x\n}\n{",
        "<|python_tag|>print('a')",
        '{"name": "write", "parameters": "no"}',
        '{"na',
    ],
)
def test_other_json_is_no_call_of_llama(text: str) -> None:
    for pieces in ([text], list(text)):
        assert parse(pieces, "llama") == [Text(text)]


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (LIST, [("write", {"path": "x"}), ("g", {})]),
        ('[TOOL_CALLS][{"name": "g", "arguments": "{\\"a\\": 1}"}]', [("g", {"a": 1})]),
        ('[TOOL_CALLS]{"name": "g", "arguments": {"a": 1}}', [("g", {"a": 1})]),
        ('[TOOL_CALLS]a.b-c[ARGS]{"a": {"b": "}"}}', [("a.b-c", {"a": {"b": "}"}})]),
        ('[TOOL_CALLS]g{"a": 1}[TOOL_CALLS]h[ARGS]{}', [("g", {"a": 1}), ("h", {})]),
        ('[TOOL_CALLS]g[CALL_ID]Ab3[ARGS] {"a": 1}', [("g", {"a": 1})]),
        ('[TOOL_CALLS] g [ARGS]{"a": "x\ny"}', [("g", {"a": "x\ny"})]),
    ],
)
@pytest.mark.parametrize("format", ["mistral", "mistral_args"])
def test_calls_of_mistral(text: str, calls: Any, format: str) -> None:
    assert read(text, format) == ("", calls)
    assert read(f"So:\n{text}", format) == ("So:", calls)


@pytest.mark.parametrize(
    "rest", ["", " is a mark", "g(a=1)", "[1]", "g[ARGS]1", 'g[OTHER]{"a": 1}', "[ARGS]{}"]
)
def test_what_is_no_call_of_mistral_is_text(rest: str) -> None:
    text = f"[TOOL_CALLS]{rest}"
    for pieces in ([text], list(text)):
        assert parse(pieces, "mistral") == [Text(text)]


def test_arguments_that_break_off_are_not_complete() -> None:
    for text, format in ((LLAMA, "llama"), ('[TOOL_CALLS]g[ARGS]{"a": {}}', "mistral")):
        for end in range(text.index('{"', 5) + 2, len(text) - 2):
            assert read(text[:end], format) == ("", [])


def test_they_stream() -> None:
    parser = AnswerParser(BY_NAME["llama"], {"f": {}})
    assert parser.push('{"name": "f"') == []
    assert parser.push(', "parameters": {"a') == [CallStart(0, "f"), CallArguments(0, '{"a')]
    parser = AnswerParser(BY_NAME["mistral"], {"f": {}})
    assert parser.push("[TOOL_CALLS]f[ARGS]") == []
    assert parser.push('{"a": 1') == [CallStart(0, "f"), CallArguments(0, '{"a": 1')]


IN_TAGS = r"""{% if tools %}...<tool_call>\n{\"name\": <function-name>, \"arguments\": <args>}{% endif %}"""
LLAMA_TEMPLATE = (
    """{% if tools %}Respond in the format {"name": function name, "parameters": dictionary}.{% endif %}"""
)


@pytest.mark.parametrize(
    ("template", "format"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        (IN_TAGS, "hermes"),
        ("""{% if tools %}'<tool_call>{"name": "' + n + '", "arguments": '{% endif %}""", "hermes"),
        ("{% if tools %}<tool_call><function=name>{% endif %}", "xml"),
        ("{% if tools %}<tool_call>{{ name }}\n<arg_key>k</arg_key>{{ tc.arguments }}{% endif %}", None),
        (LLAMA_TEMPLATE, "llama"),
        ("""{% if tools %}"[TOOL_CALLS] [" '{"name": "f", "arguments": '{% endif %}""", "mistral"),
        ("""{% if tools %}"[TOOL_CALLS]" + name + "[ARGS]" + arguments{% endif %}""", "mistral_args"),
        ("{% if tools %}<|tool_calls_section_begin|>{{ tools | tojson }}{% endif %}", None),
        ("{% if tools %}<|start|>assistant to=functions.f{{ tools | tojson }}{% endif %}", None),
    ],
)
def test_the_format_follows_from_the_template(template: str, format: str | None) -> None:
    assert (found := detect(template)) == (None if format is None else BY_NAME[format]), found
