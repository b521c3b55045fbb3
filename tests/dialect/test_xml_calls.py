"""Calls as tags: where values end, which parameters count, and what their texts mean."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest

from godwit.dialect.parser import Text
from godwit.dialect.values import read_value
from tests.dialect.parsing import call_of, calls_of, parse, text_of
from tests.dialect.test_parser import XML

TWO = {
    "f": {
        "type": "object",
        "properties": {"a": {"type": "string"}, "b": {"type": "string"}, "n": {"type": ["integer", "array"]}},
    }
}


def xml(**values: str) -> str:
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function=f>\n{body}</function>\n</tool_call>"


def read(text: str, schemas: Any = TWO) -> list[tuple[str, Any]]:
    """The calls in a text, which are the same however it is cut."""
    whole = parse([text], "xml", schemas=schemas)
    assert parse(list(text), "xml", schemas=schemas) == whole
    return calls_of(whole)


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
        ("lines", "140.0", 140),
        ("lines", "null", None),
        ("share", "1e3", 1000),
        ("tags", "('a', -1, {'b': None})", ["a", -1, {"b": None}]),
        ("tags", "{1, 2}", "{1, 2}"),
        ("tags", "[1e999]", "[1e999]"),
        ("tags", "[b'a', ...]", "[b'a', ...]"),
        ("tags", "[" * 5000, "[" * 5000),
        ("tags", "['\\d']", ["\\d"]),
        ("path", "null", "null"),
        ("path", "", ""),
        ("path", '"\\\n\x00', '"\\\n\x00'),
    ],
)
def test_values_get_the_types_of_the_schema(key: str, text: str, value: Any) -> None:
    call = f"<function=write>\n<parameter={key}>\n{text}\n</parameter>\n</function>"
    name, arguments, complete = call_of(parse([f"<tool_call>\n{call}\n</tool_call>"], "xml"))
    assert (name, json.loads(arguments), complete) == ("write", {key: value}, True)


PATH = "<parameter=path>\nx\n</parameter>\n"


@pytest.mark.parametrize(
    "text",
    [
        f"<function=write>\n{PATH}</function>",
        "<tool_call>\n<function=write>\n<parameter=path>\nx\n</function>\n</tool_call>",
        "<tool_call><function=write><parameter=path>x</parameter></tool_call>",
        "<tool_call><function=write><parameter=path>x</parameter><parameter=path>y</parameter></function>",
        f"<tool_call>\n<function=write>\n<parameter path>\ny\n</parameter>\n{PATH}</function>",
        f"<tool_call>\n<function=write>\n{PATH}<parameter=lines\n3\n</parameter>\n</function>",
        f"<tool_call>\n<function=write>\n<parameter=mode>\ny\n</parameter>\n{PATH}</function>",
        f"<tool_call>\n<function=write>\n{PATH}<parameter=mode>\ny\n</parameter>\n</function>",
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
        "<function=other>\n</function>",
        "<function=write>\n is how a call begins",
        "To call it, write `<function=write>` and its parameters.",
        "def x():\n  # <function=foo at 0x7f>\n  pass",
        " <function=write>\n</function>",
        "<tool_call>\n<function=write>... as in the docs",
    ],
)
def test_what_is_no_xml_call_is_text(text: str) -> None:
    assert parse([text], "xml") == [Text(text)]


def test_a_call_without_its_end_is_not_complete() -> None:
    for end in range(XML.index("<parameter=path>") + 16, XML.index("</function>")):
        _, arguments, complete = call_of(parse([XML[:end]], "xml"))
        assert not complete
        with pytest.raises(ValueError):
            json.loads(arguments)


@pytest.mark.parametrize(
    "value",
    [
        "use <parameter=x> then",
        "a </parameter> b",
        "end </function> x",
        "x\n</function>\ny",
        "x</parameter><parameter=c>y",
        "<tool_call>",
        "<function=g>\n<parameter=c>\n1\n</parameter>\n<parameter=d>\n2",
        "\n\n",
        "</param",
        "<",
        "\n<parameter=c>\n",
        "see <parameter=b>",
        "</parameter> <parameter=b",
    ],
)
def test_a_value_ends_where_the_call_goes_on(value: str) -> None:
    assert read(xml(a=value)) == [("f", {"a": value})]
    assert read(xml(a=value, b="y")) == [("f", {"a": value, "b": "y"})]
    assert read(f"{xml(b=value)}\n{xml(a='x')}") == [("f", {"b": value}), ("f", {"a": "x"})]


def test_a_parameter_that_the_schema_does_not_know_is_none() -> None:
    known = {"properties": {"a": {"type": "string"}}}
    for schema, kept in (
        (known, {"a": "x"}),
        ({**known, "additionalProperties": False}, {"a": "x"}),
        ({**known, "additionalProperties": True}, {"a": "x", "zz": "1"}),
        ({"type": "object"}, {"a": "x", "zz": "1"}),
        ({"type": "object", "properties": {}}, {}),
        ({"$ref": "#/$defs/A", "$defs": {"A": known}}, {"a": "x"}),
        ({"allOf": [known, {"properties": {"zz": {"type": "integer"}}}]}, {"a": "x", "zz": 1}),
        ({"anyOf": [known, {"properties": {"zz": {"type": "string"}}}]}, {"a": "x", "zz": "1"}),
    ):
        assert read(xml(a="x", zz="1"), {"f": schema}) == [("f", kept)]


def test_a_tag_within_a_json_string_is_a_part_of_it() -> None:
    value = '["</parameter></function>", "</parameter><parameter=b>", "\\"</function></tool_call>"]'
    assert read(xml(n=value)) == [("f", {"n": json.loads(value)})]
    assert read(xml(n='["x', b="y")) == [("f", {"n": '["x', "b": "y"})]


def test_names_with_all_characters_that_tools_may_have() -> None:
    schemas = {"a.b-c:d/e_1": {"properties": {"x.y-z é": {"type": "string"}}}}
    call = "<function=a.b-c:d/e_1>\n<parameter=x.y-z é>\nü\n</parameter>\n</function>"
    for text in (call, f"<tool_call>\n{call}\n</tool_call>"):
        assert read(text, schemas) == [("a.b-c:d/e_1", {"x.y-z é": "ü"})]


def test_a_bare_call_stands_at_the_start_of_a_line() -> None:
    call = "<function=write>\n<parameter=path>\nx\n</parameter>\n</function>"
    for text in (f"Well.\n{call}", f"{call}\n{call}\nWell."):
        deltas = parse([text], "xml")
        assert calls_of(deltas) == [("write", {"path": "x"})] * text.count("<function")
        assert text_of(deltas).strip() == "Well."
    assert parse([f"Well. {call}"], "xml") == [Text(f"Well. {call}")]


ROOT = {
    "$defs": {
        "N": {"type": "integer"},
        "P": {"properties": {"a": {"type": "integer"}}},
        "Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}, {"type": "integer"}]},
    }
}
LISTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": ["string", "null"]}, "null", None),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "None", None),
        ({"type": ["string", "null"]}, "nothing", "nothing"),
        ({"type": "string"}, "null", "null"),
        ({"type": "string"}, "03106", "03106"),
        ({"type": "string"}, '{"a": 1}', '{"a": 1}'),
        ({"enum": [1, 2, 3]}, "2", 2),
        ({"enum": [1, 2, 3]}, "4", 4),
        ({"enum": ["a", "b"]}, '"a"', "a"),
        ({"enum": ["a", "b"]}, " 'b' ", "b"),
        ({"enum": ["1", 1]}, "1", "1"),
        ({"enum": [" a"]}, " a", " a"),
        ({"const": 2}, "2", 2),
        ({"enum": [True, False]}, "true", True),
        ({"enum": [1]}, "True", "True"),
        ({"allOf": [{"$ref": "#/$defs/N"}], "default": 1}, "2", 2),
        ({"$ref": "#/$defs/P"}, '{"a": 1}', {"a": 1}),
        ({"$ref": "#/$defs/Loop"}, "7", "7"),
        ({"$ref": "#/$defs/none"}, "7", "7"),
        ({"items": {"type": "string"}}, '["a"]', ["a"]),
        ({"type": "integer"}, "140.0", 140),
        ({"type": "integer"}, "1.5", "1.5"),
        ({"type": "number"}, " 1.50 ", 1.5),
        ({"type": "array"}, "['a', 'b']", ["a", "b"]),
        ({"type": "object"}, "{'a': True, 'b': None}", {"a": True, "b": None}),
        ({"type": ["string", "integer"]}, "12", "12"),
        ({"type": ["integer", "string"]}, "12", 12),
        (LISTS, '["a", "b"]', ["a", "b"]),
        (LISTS, "[1, 2]", "[1, 2]"),
        ({"oneOf": [{"type": "integer", "maximum": 5}, {"type": "string"}]}, "7", "7"),
        ({"type": "integer", "minimum": 5}, "3", 3),
        ({"type": "array", "items": {"type": "integer"}}, '["a"]', ["a"]),
        ({"type": "object", "required": ["b"]}, '{"a": 1}', {"a": 1}),
        ({}, "7", "7"),
        (True, "null", "null"),
    ],
)
def test_a_text_means_what_fits_the_schema(schema: Any, text: str, value: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_value(text, schema, ROOT)
    assert found == value and type(found) is type(value)
    (call,) = read(xml(n=text), {"f": {"properties": {"n": schema}, **ROOT}})
    assert call == ("f", {"n": value})


def test_a_hostile_schema_costs_little() -> None:
    bomb: dict[str, Any] = {"$defs": {"l0": {"type": "string"}}, "$ref": "#/$defs/l40"}
    for level in range(1, 41):
        below = {"$ref": f"#/$defs/l{level - 1}"}
        bomb["$defs"][f"l{level}"] = {"allOf": [{"anyOf": [below, below]}] * 2}
    assert read_value("[1]", bomb, bomb) == "[1]"
    assert read(xml(a="[1]"), {"f": {"properties": {"a": bomb}, **bomb}}) == [("f", {"a": "[1]"})]
