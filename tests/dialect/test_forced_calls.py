"""What the grammars of calls let through, the readers read back as the value that was meant."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from godwit.dialect.schema import fits, prepared
from godwit.engine.constraint.constraints import Constraints
from godwit.errors import UsageError
from godwit.text.tokenizer import Tokenizer
from tests.dialect.parsing import BY_NAME, calls_of, parse, text_of
from tests.engine.forms import FOLDER, walk

pytest.importorskip("llguidance")
TOKENIZER = Tokenizer.from_dir(FOLDER)
FORMS = Constraints(TOKENIZER, seconds=60)
FORMATS = ["hermes", "xml", "llama", "mistral", "mistral_args"]


def held(parameters: Mapping[str, Any], form: str, choice: str = "required") -> Any:
    return FORMS.tool_calls(
        [{"name": "f", "parameters": parameters}], choice, dialect=BY_NAME[form], parallel=False
    )


def call(arguments: Mapping[str, Any], form: str) -> str:
    """A call as the template of such a model writes it."""
    whole = json.dumps(arguments, ensure_ascii=False)
    if form == "xml":
        values = {
            k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in arguments.items()
        }
        body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
        return f"<tool_call>\n<function=f>\n{body}</function>\n</tool_call>"
    return {
        "hermes": f'<tool_call>\n{{"name": "f", "arguments": {whole}}}\n</tool_call>',
        "llama": f'{{"name": "f", "parameters": {whole}}}',
        "mistral": f'[TOOL_CALLS] [{{"name": "f", "arguments": {whole}}}]',
        "mistral_args": f"[TOOL_CALLS]f[ARGS]{whole}",
    }[form]


def one(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"c": schema}, "required": ["c"], **more}


BITS = ["</parameter>", "</function>", "<parameter=c>", "<parameter=x>", "<tool_call>", "</tool_call>", "</"]
BITS += ["<function=f>", "null", "[1]", "12", '"', "\\", "```", "a", "é", "[TOOL_CALLS]", "{", "\n", " "]
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=4),
        st.sampled_from(BITS),
    ),
    max_size=5,
).map("".join)
NUMBERS = st.integers(-200, 200)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda below: st.lists(below, max_size=3),
    max_leaves=5,
)
#: Schemas of one parameter, with values that may fit.
SCHEMAS: list[tuple[Any, Any]] = [
    ({"type": "string"}, TEXTS),
    ({"type": "string", "maxLength": 5, "minLength": 2}, TEXTS),
    ({"enum": ["a", "null", "</parameter>", "b\nc", ""]}, st.sampled_from(["a", "null", "b\nc", ""])),
    ({"type": ["string", "null"]}, st.one_of(st.none(), TEXTS)),
    ({"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "string"}]}, JSON),
    ({"type": ["integer", "string"], "minimum": 0}, st.one_of(NUMBERS, TEXTS)),
    ({"enum": ["x", 12, None, True]}, st.sampled_from(["x", 12, None, True, "12", 1])),
    ({"type": "integer", "minimum": -3, "maximum": 150}, NUMBERS),
    ({"type": "boolean"}, st.booleans()),
    ({"type": "array", "items": {"type": "string"}, "maxItems": 3}, st.lists(TEXTS, max_size=3)),
    ({"properties": {"a": {"type": "string"}}, "required": ["a"]}, st.fixed_dictionaries({"a": TEXTS})),
    ({"allOf": [{"type": "string"}, {"maxLength": 3}]}, TEXTS),
    ({}, TEXTS),
]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(FORMATS), st.sampled_from(range(len(SCHEMAS))))
def test_what_a_grammar_lets_through_is_read_back(data: st.DataObject, form: str, which: int) -> None:
    schema, values = SCHEMAS[which]
    value = data.draw(values)
    text = call({"c": value}, form)
    if walk(TOKENIZER, held(one(schema), form), text) != "complete":
        return
    ((_, arguments),) = calls_of(parse([text], form, schemas={"f": one(schema)}))
    # in tags a text and what it may stand for are written alike, and then either fits
    written = {json.dumps(value), json.dumps(value, ensure_ascii=False)} if form == "xml" else set()
    alike = [value, *written]
    assert arguments["c"] in alike or isinstance(value, str)
    assert fits(arguments["c"], prepared(schema), {})


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "string"}, 'a "b" \\ é\n\n<b></b> <parameter=x> </function> {'),
        ({"type": "string"}, ""),
        ({"type": ["string", "null"]}, None),
        ({"type": ["integer", "string"]}, 12),
        ({"anyOf": [{"type": "string"}, {"type": "array"}]}, ["a"]),
        ({"type": "string", "pattern": "^a+$"}, "aaa"),
        ({"type": "string", "pattern": "b/c|^x$", "maxLength": 5}, "ab/cd"),
        ({"type": "string", "format": "date"}, "2024-02-29"),
        ({"type": "string", "format": "binary"}, "x"),
        ({"const": "x"}, "x"),
        ({"$ref": "#/$defs/T"}, "xy"),
        ({"type": "integer", "minimum": 3}, 4),
        ({"type": "array", "items": {"type": "string"}}, ["</parameter></function>", "\n<b>"]),
        ({"properties": {"format": {"type": "string", "format": "uuid4"}}}, {"format": "x"}),
    ],
)  # fmt: skip
def test_values_that_fit_can_be_written(form: str, schema: Any, value: Any) -> None:
    parameters = one(schema, **{"$defs": {"T": {"type": "string", "minLength": 2}}})
    text = call({"c": value}, form)
    assert walk(TOKENIZER, held(parameters, form), text) == "complete"
    assert calls_of(parse(list(text), form, schemas={"f": parameters})) == [("f", {"c": value})]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "string", "maxLength": 3}, "abcd"),
        ({"type": "string", "minLength": 3}, "ab"),
        ({"type": "string", "pattern": "^a+$"}, "ab"),
        ({"type": "string", "format": "date"}, "tomorrow"),
        ({"type": "string", "enum": ["a", "b"]}, "c"),
        ({"const": 3}, 4),
        ({"type": "integer", "maximum": 9}, 10),
        ({"type": "number", "exclusiveMinimum": 0}, 0),
        ({"properties": {"a": {"type": "integer"}}}, {"a": 1, "b": 2}),
        ({"type": "array", "items": {"properties": {}}}, [{"b": 2}]),
        ({"anyOf": [{"type": "null"}, {"$ref": "#/$defs/O"}]}, {"b": 2}),
    ],
)
def test_values_that_do_not_fit_cannot_be_written(form: str, schema: Any, value: Any) -> None:
    parameters = one(schema, **{"$defs": {"O": {"properties": {"a": {"type": "integer"}}}}})
    assert walk(TOKENIZER, held(parameters, form), call({"c": value}, form)) not in ("complete", "open")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("parameters", [None, {}, {"type": "object", "properties": {}}])
def test_a_tool_without_parameters_takes_none(form: str, parameters: Any) -> None:
    tool = {"name": "f"} if parameters is None else {"name": "f", "parameters": parameters}
    text = call({}, form)
    assert walk(TOKENIZER, FORMS.tool_calls([tool], dialect=BY_NAME[form]), text) == "complete"
    filled = call({"a": " "}, form)
    assert walk(TOKENIZER, FORMS.tool_calls([tool], dialect=BY_NAME[form]), filled) not in (
        "complete",
        "open",
    )


def test_objects_are_closed_only_where_one_schema_knows_all_properties() -> None:
    a: dict[str, Any] = {"properties": {"a": {}}}
    b: dict[str, Any] = {"properties": {"b": {}}}
    closed = {"additionalProperties": False}
    for schema, expected in (
        (a, {**a, **closed}),
        ({"allOf": [a]}, {"allOf": [{**a, **closed}]}),
        ({"allOf": [a, b]}, {"allOf": [a, b]}),
        ({**a, "anyOf": [b]}, {**a, "anyOf": [b]}),
        ({"anyOf": [a, b]}, {"anyOf": [{**a, **closed}, {**b, **closed}]}),
        ({"not": a}, {"not": a}),
        ({**a, "additionalProperties": True}, {**a, "additionalProperties": True}),
        ({"type": "object"}, {"type": "object"}),
        ({}, {}),
    ):
        assert prepared(schema) == expected
    shared = {
        "$defs": {"A": a, "B": a},
        "anyOf": [{"allOf": [{"$ref": "#/$defs/A"}, b]}, {"$ref": "#/$defs/B"}],
    }
    found = prepared(shared)
    assert found["$defs"] == {"A": a, "B": {**a, **closed}} and found["anyOf"] == shared["anyOf"]


def test_formats_that_nobody_checks_are_dropped_wherever_they_are() -> None:
    field = {"type": "string", "format": "password"}
    schema = {
        "properties": {"format": field, "a": {"items": field}, "b": {"enum": [{"format": "password"}]}},
        "$defs": {"format": {"anyOf": [field, {"format": "date"}]}},
        "additionalProperties": field,
    }
    plain = {"type": "string"}
    assert prepared(schema) == {
        "properties": {"format": plain, "a": {"items": plain}, "b": {"enum": [{"format": "password"}]}},
        "$defs": {"format": {"anyOf": [plain, {"format": "date"}]}},
        "additionalProperties": plain,
    }


ANYTHING = {
    "type": "object",
    "properties": {
        "s": {"type": "string", "maxLength": 6},
        "w": {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]},
        "m": {"type": ["string", "integer", "boolean"], "maxLength": 4, "minimum": 0, "maximum": 20},
        "i": {"type": "integer", "minimum": -5, "maximum": 5},
        "l": {"type": "array", "items": {"enum": ["a", 1]}, "maxItems": 2},
        "o": {"properties": {"a": {"type": "string", "maxLength": 3}}, "required": ["a"]},
    },
    "required": ["s", "w", "m", "i", "l", "o"],
}


@pytest.mark.parametrize("form", FORMATS)
def test_whatever_is_written_within_a_grammar_fits(form: str) -> None:
    stops = sorted(TOKENIZER.stop_ids)
    for seed in range(3):
        chance = random.Random(seed)
        constraint, ids = held(ANYTHING, form), list[int]()
        while not (constraint.complete and chance.random() < 0.9):
            allowed = constraint.allowed()
            allowed[stops] = False
            if not (choices := allowed.nonzero().flatten()).numel():
                break
            ids.append(int(choices[chance.randrange(choices.numel())]))
            constraint.accept(ids[-1])
        text = TOKENIZER.decode(ids)
        deltas = parse(list(text), form, schemas={"f": ANYTHING})
        ((name, arguments),) = calls_of(deltas)
        assert name == "f" and not text_of(deltas)
        assert fits(arguments, prepared(ANYTHING), {}), text


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (one({"type": "string", "pattern": "a^b"}), "in its middle"),
        (one({"type": "string", "pattern": "(?=a)b"}), "look-around"),
        (one({"type": "string", "if": {"minLength": 1}}), "`if` cannot be checked"),
        ({**one({}), "anyOf": [{"required": ["c"]}]}, "`anyOf` of all parameters"),
        ({**one({}), "minProperties": 1}, "`minProperties` of all parameters"),
        (one({"$ref": "#/$defs/L"}, **{"$defs": {"L": {"anyOf": [{"$ref": "#/$defs/L"}] * 2}}}), "circles"),
        ({"properties": {"a>b": {}}}, "the name 'a>b'"),
        (one({"type": "string", "enum": ["</parameter>"]}), "cannot be written between"),
    ],
)
def test_what_tags_cannot_be_held_to_is_refused(schema: Any, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        held(schema, "xml")


LLAMA = call({"c": "x"}, "llama")


@pytest.mark.parametrize(
    ("form", "text", "passes"),
    [
        ("xml", "Well.\n<function=f>\n", False),
        ("xml", "<function=f>\n", False),
        ("xml", "Write `<function=f>` or\n<function=g>", True),
        ("xml", f"Well.\n{call({'c': 'x'}, 'xml')}\nDone.", True),
        ("llama", LLAMA, True),
        ("llama", "In C:\n{\n  x;\n}", True),
        ("llama", f"Well.\n{LLAMA}", False),
        ("llama", LLAMA.replace("x", "x" * 9), False),
        ("mistral", f"Well.{call({'c': 'x'}, 'mistral')}", True),
        ("mistral", call({"c": "x" * 9}, "mistral"), False),
        ("mistral_args", f"Well.{call({'c': 'x'}, 'mistral_args')}", True),
        ("mistral_args", "Well.", True),
    ],
)
def test_free_text_holds_no_call_that_is_not_held_to_its_tool(form: str, text: str, passes: bool) -> None:
    schema = one({"type": "string", "maxLength": 3})
    reached = walk(TOKENIZER, held(schema, form, "auto"), text)
    assert (reached == "complete") == passes
    if passes:
        called = any(sign in text for sign in ('"f"', "=f>\n<", "]f["))
        assert len(calls_of(parse([text], form, schemas={"f": schema}))) == called
