"""Answers of a given form: what a grammar lets through, what a model makes of it, and hostile forms."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from godwit.cli.reply import parse_reply
from godwit.dialect import xml_calls
from godwit.dialect.grammar import MAX_CALLS
from godwit.engine import Engine, GenerationRequest, SamplingParams
from godwit.engine.constraint.constraints import Constraints, GrammarConstraint
from godwit.engine.stream import Finish, Stream
from godwit.errors import UsageError
from godwit.models.loader import load_model
from godwit.models.native import pack_model
from godwit.text.tokenizer import Tokenizer
from tests.engine.forms import FLAG, FOLDER, NOTHING, TOOLS, WEATHER, held, walk

pytest.importorskip("llguidance")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", 3]}, "minItems": 1, "maxItems": 3},
        "home": {"$ref": "#/$defs/place"},
        "note": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    },
    "required": ["name", "age", "tags", "home"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["zip"],
            "additionalProperties": False,
        }
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
XML = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
    "<parameter=unit>\nC\n</parameter>\n</function>\n</tool_call>"
)
COSTLY = r"(?s:.*)a(?s:.{200})b(?s:.*)"  # has more states than an answer may take
COSTLY_GRAMMAR = f"start: answer\nanswer: /{COSTLY}/"
GREEDY = SamplingParams(temperature=0, max_tokens=300)


@pytest.fixture(scope="module")
def engine(tokenizer: Tokenizer) -> Iterator[Engine]:
    model = pack_model(load_model(FOLDER), "q4")
    with Engine(model, tokenizer, max_context=1024, max_sequences=16) as one:
        yield one
        one.check_integrity()
        assert one.health.num_failures == 0


@pytest.fixture
def ask(engine: Engine, tokenizer: Tokenizer) -> Any:
    def submit(
        form: GrammarConstraint | None, params: SamplingParams = GREEDY, text: str = "Tell me about Ada."
    ) -> Stream:
        ids = tokenizer.encode_chat([{"role": "user", "content": text}])
        return engine.submit(GenerationRequest(tuple(ids), params, constraint=form))

    return submit


def fits(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any] | None = None) -> bool:
    """Whether a value is valid, by the keywords that the schemas of these tests have."""
    root = root or schema
    if "$ref" in schema:
        return fits(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "anyOf" in schema:
        return any(fits(value, option, root) for option in schema["anyOf"])
    if "enum" in schema and value not in schema["enum"]:
        return False
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "boolean": bool,
        "null": type(None),
    }
    kind = schema.get("type")
    if kind is None:
        return True
    if not isinstance(value, kinds[kind]) or (kind == "integer" and isinstance(value, bool)):
        return False
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        extra = set(value) - set(properties)
        return (
            set(schema.get("required", ())) <= set(value)
            and not (extra and schema.get("additionalProperties") is False)
            and all(fits(value[key], properties[key], root) for key in set(value) & set(properties))
        )
    if isinstance(value, list):
        size = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        return size and all(fits(item, schema.get("items", {}), root) for item in value)
    if isinstance(value, str):
        digits = "pattern" not in schema or (len(value) == 5 and value.isdecimal())
        return len(value) <= schema.get("maxLength", len(value)) and digits
    return value is None or schema.get("minimum", value) <= value <= schema.get("maximum", value)


def test_the_validator_of_these_tests_can_say_no() -> None:
    good = {"name": "Ada", "age": 36, "tags": ["red", 3], "home": {"zip": "12345"}, "note": None}
    assert fits(good, PERSON)
    wrong: dict[str, Any]
    for wrong in (
        {"age": 151}, {"age": "36"}, {"tags": []}, {"tags": ["blue"]}, {"home": {"zip": "1234"}}, {"note": 1},
        {"name": "a" * 13}, {"more": 1}, {"age": True},
    ):  # fmt: skip
        assert not fits({**good, **wrong}, PERSON), wrong
    assert not fits({"name": "Ada"}, PERSON)


@pytest.mark.parametrize(
    ("kind", "arguments", "text", "result"),
    [
        ("object", {}, '{"a": [1, 2,\n  {"b": null}]}', "complete"),
        ("object", {}, '{"a": [1, 2', "open"),
        ("object", {}, "[1]", "[1]"),
        ("schema", {"value": FLAG}, '{"ok": true, "count": 12}', "complete"),
        ("schema", {"value": FLAG}, '{"ok":\n' + 60 * " " + 'true, "count": 12}', None),
        ("schema", {"value": {**FLAG, "x-guidance": 5}}, '{"ok": true, "count": 1}', "complete"),
        ("object", {"thinking": "opened"}, 'hm, {"b": \n</think>\n\n{"a": 1}', "complete"),
        ("object", {"thinking": "opened"}, '{"a": 1}', "open"),
        ("object", {"thinking": "optional"}, '<think>\nhm\n</think>\n\n{"a": 1}', "complete"),
        ("object", {"thinking": "optional"}, '{"a": 1}', "complete"),
        ("object", {"thinking": "none"}, "<think>", "<think>"),
        ("regex", {"value": r'a/b"\d+\n'}, 'a/b"12\n', "complete"),
        ("regex", {"value": "a\nb|c"}, "a\nb", "complete"),
        ("regex", {"value": "[ab]{3}"}, "ab", "open"),
        ("choice", {"value": ["yes", 'no "é" \\']}, 'no "é" \\', "complete"),
        ("choice", {"value": ["only this"]}, "only this", "complete"),
        ("grammar", {"value": 'start: "a" b\nb: "x" | "y" b'}, "ayyx", "complete"),
        ("grammar", {"value": 'root ::= "a" [0-9]+ b\nb ::= "x" | "y" b'}, "a12yx", "complete"),
        ("grammar", {"value": 'start: "a"', "thinking": "opened"}, "hm</think>a", "complete"),
        ("calls", {}, f"{CALL}\n{NOW}", "complete"),
        ("calls", {}, "Well", "Well"),
        ("calls", {"thinking": "opened"}, f"hm\n</think>\n\n{CALL}", "complete"),
        ("calls", {"parallel": False}, f"{CALL}\n", "\n"),
        ("calls", {"choice": "now"}, NOW, "complete"),
        ("calls", {"choice": "auto"}, f"Well <b>. {CALL} and\n{NOW}\n\nthat", "complete"),
        ("calls", {"choice": "auto"}, "Well, no.", "complete"),
        ("calls", {"choice": "auto"}, "a <tool_call>", "open"),
        ("calls", {"choice": "auto", "parallel": False}, f"{CALL}\n<tool_call>", "<tool_call>"),
        ("calls", {"dialect": xml_calls.XML}, f"{XML}\n{XML}", "complete"),
        ("calls", {"dialect": xml_calls.XML}, XML.replace("\n2\n", "\ntwo\n"), None),
        ("calls", {"dialect": xml_calls.XML, "choice": "auto"}, f"Well. {XML}", "complete"),
        ("calls", {"dialect": xml_calls.XML, "thinking": "opened"}, f"hm</think>\n\n{XML}", "complete"),
    ],
)  # fmt: skip
def test_what_a_form_lets_through(
    kind: Any,
    arguments: dict[str, Any],
    text: str,
    result: str | None,
    forms: Constraints,
    tokenizer: Tokenizer,
) -> None:
    calls = kind == "calls"
    form = forms.tool_calls(TOOLS, **arguments) if calls else held(forms, kind, **arguments)
    reached = walk(tokenizer, form, text)
    assert reached == result if result is not None else reached not in ("open", "complete")


@pytest.mark.parametrize(
    "layout", [{}, {"separators": (",", ":")}, {"indent": 2}, {"indent": 4}, {"indent": "\t"}]
)
def test_json_may_be_laid_out_as_models_do(
    layout: dict[str, Any], forms: Constraints, tokenizer: Tokenizer
) -> None:
    value = {"name": "Ada", "age": 36, "tags": ["red", 3], "home": {"zip": "12345"}, "note": None}
    text = json.dumps(value, **layout)
    assert walk(tokenizer, held(forms, "schema", PERSON), text) == "complete"


@pytest.mark.parametrize("blanks", ["  ", "\n\n", " \n", "\n \t", "\n" + 18 * " ", "\n" + 9 * "\t", "\r"])
def test_blanks_cannot_go_on_for_ever(blanks: str, forms: Constraints, tokenizer: Tokenizer) -> None:
    for text in (f'{{"ok":{blanks}true, "count": 1}}', f'{{"ok": true,{blanks}"count": 1}}'):
        assert walk(tokenizer, held(forms, "schema", FLAG), text) not in ("open", "complete")
    for text in (f"{blanks}1", f"1{blanks}"):
        assert walk(tokenizer, held(forms, "schema", {"type": "integer"}), text) not in ("open", "complete")


@pytest.mark.parametrize(
    ("arguments", "text", "result"),
    [
        ({}, '{"ok": true, "count": 12}', "complete"),
        ({}, f"{CALL}\n{NOW}", "complete"),
        ({}, "Well", "Well"),
        ({}, f'{{"ok": true, "count": 12}}\n{CALL}', f"\n{CALL}"),
        ({}, f'{CALL}\n{{"ok": true, "count": 12}}', None),
        ({}, CALL.replace("Rome", "Rome, Italy"), None),
        ({"parallel": False}, f"{CALL}\n", "\n"),
        ({"choice": "now"}, '{"ok": true, "count": 12}', '{"ok": true, "count": 12}'),
        ({"choice": "required"}, NOW, "complete"),
        ({"dialect": xml_calls.XML}, f"{XML}\n{XML}", "complete"),
        ({"dialect": xml_calls.XML}, '{"ok": true, "count": 12}', "complete"),
        ({"thinking": "opened"}, 'so {"ok" <tool_call>\n</think>\n\n{"ok": true, "count": 1}', "complete"),
        ({"thinking": "opened"}, f"hm</think>\n\n{NOW}", "complete"),
        ({"thinking": "opened"}, NOW, "open"),
        ({"thinking": "optional"}, f"<think>\nhm\n</think>\n\n{NOW}", "complete"),
        ({"thinking": "optional"}, '{"ok": true, "count": 1}', "complete"),
    ],
)  # fmt: skip
def test_an_answer_is_calls_or_fits_another_form(
    arguments: dict[str, Any], text: str, result: str | None, forms: Constraints, tokenizer: Tokenizer
) -> None:
    form = forms.tool_calls(TOOLS, **{"choice": "auto", **arguments}, otherwise=forms.rule("schema", FLAG))
    reached = walk(tokenizer, form, text)
    assert reached == result if result is not None else reached not in ("open", "complete")


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("object", None, '{"a": "b"}'),
        ("regex", "[ab]{3}", "aba"),
        ("choice", ["yes", "no"], "no"),
        ("grammar", 'root ::= "a" [0-9]+ call\ncall ::= "x" | "y" call', "a12yx"),
    ],
)
def test_calls_go_with_every_other_form(
    kind: Any, value: Any, text: str, forms: Constraints, tokenizer: Tokenizer
) -> None:
    for answer in (text, f"{CALL}\n{NOW}"):
        form = forms.tool_calls(TOOLS, "auto", otherwise=forms.rule(kind, value), thinking="optional")
        assert walk(tokenizer, form, answer) == "complete"


@pytest.mark.parametrize("tag", ["<think>", "</think>", "<tool_call>", "</tool_call>"])
def test_tags_are_no_way_to_write_a_text(tag: str, forms: Constraints, tokenizer: Tokenizer) -> None:
    text = {"type": "object", "properties": {"s": {"type": "string"}}, "required": ["s"]}
    note: Any = {"name": "note", "parameters": text}
    json_call = f'<tool_call>\n{{"name": "note", "arguments": {{"s": "a{tag}'
    xml_call = f"<tool_call>\n<function=note>\n<parameter=s>\na\n{tag}"
    ways = [
        (held(forms, "schema", text), f'{{"s": "a{tag}'),
        (held(forms, "schema", text, thinking="optional"), f'{{"s": "a{tag}'),
        (held(forms, "schema", text, thinking="opened"), f'h{tag}m</think>\n{{"s": "a{tag}'),
        (held(forms, "regex", "(?s:.*)"), f"a{tag}"),
        (forms.tool_calls([note], "required"), json_call),
        (forms.tool_calls([note], "required", dialect=xml_calls.XML), xml_call),
        (forms.tool_calls([note], "auto"), "Now " + json_call),
        (forms.tool_calls([note], "auto", otherwise=forms.rule("schema", text)), f'{{"s": "{tag}'),
    ]
    for form, written in ways:
        if tag != "</think>" or "</think>\n" not in written:
            assert walk(tokenizer, form, written).startswith(tag)
    spelled = tokenizer.encode(tag)
    form = held(forms, "regex", "(?s:.*)")
    for id in spelled:
        mask = form.allowed()
        assert mask is not None and mask[id]
        form.accept(id)


def test_of_two_forms_one_that_costs_too_much_is_named(forms: Constraints) -> None:
    costly = {"type": "integer", "multipleOf": 999_999_937}
    with pytest.raises(UsageError, match=r"the schema or a tool's cannot be used: .*fuel exhausted"):
        forms.tool_calls(TOOLS, "auto", otherwise=forms.rule("schema", costly))


def test_answers_are_calls_or_fit_another_form_in_a_batch_as_alone(
    forms: Constraints, ask: Any, tokenizer: Tokenizer
) -> None:
    schemas = {"weather": WEATHER, "now": NOTHING}
    opener = tokenizer.token_to_id("<tool_call>")
    assert opener is not None
    biases = {seed: {opener: 8.0 if seed % 2 else -8.0} for seed in range(8)}
    ways = [SamplingParams(seed=seed, max_tokens=600, logit_bias=bias) for seed, bias in biases.items()]

    def form() -> GrammarConstraint:
        return forms.tool_calls(TOOLS, "auto", otherwise=forms.rule("schema", FLAG))

    together = [stream.result() for stream in [ask(form(), params) for params in ways]]
    answers = [parse_reply(text) for text, _ in together]
    for answer, (_, finish) in zip(answers, together, strict=True):
        assert finish.reason == "stop" and bool(answer.text) != bool(answer.calls)
        assert not answer.text or fits(json.loads(answer.text), FLAG)
        assert all(fits(call.arguments, schemas[call.name]) for call in answer.calls)
    assert {bool(answer.calls) for answer in answers} == {False, True}
    assert [ask(form(), params).result()[0] for params in ways[:3]] == [text for text, _ in together[:3]]


def test_the_other_tool_cannot_be_called(forms: Constraints, tokenizer: Tokenizer) -> None:
    assert walk(tokenizer, forms.tool_calls(TOOLS, "now"), CALL).startswith("weather")
    assert walk(tokenizer, forms.tool_calls(TOOLS), CALL.replace("Rome", "Rome, Italy")) != "complete"
    calls = "\n".join([NOW] * (MAX_CALLS + 1))
    assert walk(tokenizer, forms.tool_calls(TOOLS), calls).startswith("\n<tool_call>")


@pytest.mark.parametrize("schema", [PERSON, FLAG], ids=["person", "flag"])
def test_answers_fit_their_schema_in_a_batch_as_alone(
    schema: dict[str, Any], forms: Constraints, ask: Any
) -> None:
    ways = [GREEDY, *(SamplingParams(temperature=1.3, seed=seed, max_tokens=300) for seed in range(5))]
    free = ask(None, SamplingParams(temperature=0, max_tokens=40))
    streams = [ask(held(forms, "schema", schema), params) for params in ways]
    together = [stream.result() for stream in streams]
    for text, finish in together:
        assert finish.reason == "stop" and fits(json.loads(text), schema), text
    assert len({text for text, _ in together}) > 1
    for params, (text, _) in zip(ways[:3], together, strict=False):
        assert ask(held(forms, "schema", schema), params).result()[0] == text
    assert free.result()[0] == ask(None, SamplingParams(temperature=0, max_tokens=40)).result()[0]


def test_stop_texts_and_lengths_end_an_answer_before_its_form(forms: Constraints, ask: Any) -> None:
    whole, _ = ask(held(forms, "schema", FLAG)).result()
    text, finish = ask(held(forms, "schema", FLAG), SamplingParams(temperature=0, stop=(":",))).result()
    assert (finish.reason, text) == ("stop", whole.split(":")[0])
    text, finish = ask(held(forms, "schema", FLAG), SamplingParams(temperature=0, max_tokens=2)).result()
    assert finish.reason == "length" and whole.startswith(text) and len(finish.token_ids) == 2


def test_a_stop_token_cannot_end_an_answer_before_its_form(
    forms: Constraints, ask: Any, tokenizer: Tokenizer
) -> None:
    eager = dict.fromkeys(tokenizer.stop_ids, 1000.0)
    text, _ = ask(held(forms, "schema", FLAG), SamplingParams(temperature=0, logit_bias=eager)).result()
    assert fits(json.loads(text), FLAG)
    text, _ = ask(
        held(forms, "choice", ["a", "abc"]), SamplingParams(temperature=0, logit_bias=eager)
    ).result()
    assert text == "a"


def test_thinking_is_free_until_it_ends(forms: Constraints, ask: Any, tokenizer: Tokenizer) -> None:
    close = tokenizer.token_to_id("</think>")
    assert close is not None
    eager = {**dict.fromkeys(tokenizer.stop_ids, 1000.0), close: 14.0}
    for seed in range(3):
        params = SamplingParams(seed=seed, logit_bias=eager, max_tokens=400)
        text, finish = ask(held(forms, "schema", FLAG, thinking="opened"), params).result()
        assert finish.reason == "stop" and text.count("</think>") == 1
        assert fits(json.loads(text.partition("</think>")[2]), FLAG)
    text, _ = ask(
        held(forms, "schema", FLAG, thinking="opened"), SamplingParams(temperature=0, max_tokens=8)
    ).result()
    assert not text.startswith("{")  # the greedy answer begins as it would without a form


@pytest.mark.parametrize("choice", ["required", "weather", "now"])
def test_tools_are_called_as_their_schemas_say(choice: str, forms: Constraints, ask: Any) -> None:
    schemas = {"weather": WEATHER, "now": NOTHING}
    for seed in range(3):
        form = forms.tool_calls(TOOLS, choice, parallel=choice == "required" and seed > 0)
        text, finish = ask(form, SamplingParams(seed=seed, max_tokens=800)).result()
        answer = parse_reply(text)
        assert finish.reason == "stop" and answer.text == "" and answer.calls
        assert len(answer.calls) == text.count("<tool_call>")
        for call in answer.calls:
            assert choice in ("required", call.name)
            assert fits(call.arguments, schemas[call.name])


def test_a_form_that_gets_too_costly_ends_only_its_own_answer(
    forms: Constraints, ask: Any, engine: Engine
) -> None:
    alone = ask(held(forms, "schema", PERSON)).result()[0]
    assert forms.rule("regex", COSTLY).text in COSTLY_GRAMMAR
    forms._verdicts.put(COSTLY_GRAMMAR, "")  # as if the trial had not found out
    costly = ask(held(forms, "regex", COSTLY), SamplingParams(seed=1, max_tokens=600))
    other = ask(held(forms, "schema", PERSON))
    _, finish = costly.result()
    assert isinstance(finish, Finish) and finish.reason == "error" and finish.error is not None
    assert finish.error.startswith(
        "the grammar of this answer is too costly to follow (lexer error: too many states"
    )
    assert finish.refused and "\n" not in finish.error
    assert other.result()[0] == alone
    assert engine.health.ok
