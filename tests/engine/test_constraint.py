"""Answers of a given form: what a grammar lets through, what a model makes of it, and hostile forms."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from godwit.engine import Engine, GenerationRequest, SamplingParams, parse_answer
from godwit.engine import constraint as module
from godwit.engine.constraint import Constraints, GrammarConstraint, explained
from godwit.engine.constraint_grammar import MAX_CALLS, MAX_DEPTH, MAX_REGEX_CHARS, MAX_SCHEMA_CHARS
from godwit.engine.stream import Finish, Stream
from godwit.errors import GodwitError, UsageError
from godwit.models.loader import load_model
from godwit.models.native import pack_model
from godwit.tokenizer import Tokenizer
from tests.engine.tiny import tiny_tokenizer

pytest.importorskip("llguidance")

FOLDER = Path(module.__file__).parents[1] / "default_model"
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
FLAG = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["ok", "count"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 10},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"type": "string", "enum": ["C", "F"]},
    },
    "required": ["city"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"name": "now", "parameters": NOTHING},
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
XML = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
    "<parameter=unit>\nC\n</parameter>\n</function>\n</tool_call>"
)
COSTLY = r"(?s:.*)a(?s:.{200})b(?s:.*)"  # has more states than an answer may take
GREEDY = SamplingParams(temperature=0, max_tokens=300)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(FOLDER)


@pytest.fixture(scope="module")
def forms(tokenizer: Tokenizer) -> Constraints:
    return Constraints(tokenizer, seconds=60)


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


def walk(tokenizer: Tokenizer, form: GrammarConstraint, text: str) -> str:
    """How far a form lets a text through: "complete", "open", or what is left when it is refused."""
    ids = tokenizer.encode(text, allow_special=True, add_special_tokens=False)
    for place, id in enumerate(ids):
        mask = form.allowed()
        assert mask is not None and mask.dtype == torch.bool and mask.shape == (tokenizer.vocab_size,)
        specials = tokenizer.special_ids - tokenizer.stop_ids
        assert not mask[sorted(specials)].any()
        assert mask[sorted(tokenizer.stop_ids)].tolist() == [form.complete] * len(tokenizer.stop_ids)
        if not mask[id]:
            return tokenizer.decode(ids[place:])
        form.accept(id)
    return "complete" if form.complete else "open"


@pytest.mark.parametrize(
    ("method", "arguments", "text", "result"),
    [
        ("json_object", {}, '{"a": [1, 2,\n  {"b": null}]}', "complete"),
        ("json_object", {}, '{"a": [1, 2', "open"),
        ("json_object", {}, "[1]", "[1]"),
        ("json_schema", {"schema": FLAG}, '{"ok": true, "count": 12}', "complete"),
        ("json_schema", {"schema": FLAG}, '{"ok":\n' + 60 * " " + 'true, "count": 12}', None),
        ("json_schema", {"schema": {**FLAG, "x-guidance": 5}}, '{"ok": true, "count": 1}', "complete"),
        ("json_object", {"thinking": "opened"}, 'hm, {"b": \n</think>\n\n{"a": 1}', "complete"),
        ("json_object", {"thinking": "opened"}, '{"a": 1}', "open"),
        ("json_object", {"thinking": "optional"}, '<think>\nhm\n</think>\n\n{"a": 1}', "complete"),
        ("json_object", {"thinking": "optional"}, '{"a": 1}', "complete"),
        ("json_object", {"thinking": "none"}, "<think>", "<think>"),
        ("regex", {"pattern": r'a/b"\d+\n'}, 'a/b"12\n', "complete"),
        ("regex", {"pattern": "a\nb|c"}, "a\nb", "complete"),
        ("regex", {"pattern": "[ab]{3}"}, "ab", "open"),
        ("choice", {"options": ["yes", 'no "é" \\']}, 'no "é" \\', "complete"),
        ("choice", {"options": ["only this"]}, "only this", "complete"),
        ("grammar", {"text": 'start: "a" b\nb: "x" | "y" b'}, "ayyx", "complete"),
        ("grammar", {"text": 'root ::= "a" [0-9]+ b\nb ::= "x" | "y" b'}, "a12yx", "complete"),
        ("grammar", {"text": 'start: "a"', "thinking": "opened"}, "hm</think>a", "complete"),
        ("tool_calls", {}, f"{CALL}\n{NOW}", "complete"),
        ("tool_calls", {}, "Well", "Well"),
        ("tool_calls", {"thinking": "opened"}, f"hm\n</think>\n\n{CALL}", "complete"),
        ("tool_calls", {"parallel": False}, f"{CALL}\n", "\n"),
        ("tool_calls", {"choice": "now"}, NOW, "complete"),
        ("tool_calls", {"choice": "auto"}, f"Well <b>. {CALL} and\n{NOW}\n\nthat", "complete"),
        ("tool_calls", {"choice": "auto"}, "Well, no.", "complete"),
        ("tool_calls", {"choice": "auto"}, "a <tool_call>", "open"),
        ("tool_calls", {"choice": "auto", "parallel": False}, f"{CALL}\n<tool_call>", "<tool_call>"),
        ("tool_calls", {"form": "xml"}, f"{XML}\n{XML}", "complete"),
        ("tool_calls", {"form": "xml"}, XML.replace("\n2\n", "\ntwo\n"), None),
        ("tool_calls", {"form": "xml", "choice": "auto"}, f"Well. {XML}", "complete"),
        ("tool_calls", {"form": "xml", "thinking": "opened"}, f"hm</think>\n\n{XML}", "complete"),
    ],
)  # fmt: skip
def test_what_a_form_lets_through(
    method: str,
    arguments: dict[str, Any],
    text: str,
    result: str | None,
    forms: Constraints,
    tokenizer: Tokenizer,
) -> None:
    given = {"tools": TOOLS, **arguments} if method == "tool_calls" else arguments
    reached = walk(tokenizer, getattr(forms, method)(**given), text)
    assert reached == result if result is not None else reached not in ("open", "complete")


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
    streams = [ask(forms.json_schema(schema), params) for params in ways]
    together = [stream.result() for stream in streams]
    for text, finish in together:
        assert finish.reason == "stop" and fits(json.loads(text), schema), text
    assert len({text for text, _ in together}) > 1
    for params, (text, _) in zip(ways[:3], together, strict=False):
        assert ask(forms.json_schema(schema), params).result()[0] == text
    assert free.result()[0] == ask(None, SamplingParams(temperature=0, max_tokens=40)).result()[0]


def test_stop_texts_and_lengths_end_an_answer_before_its_form(forms: Constraints, ask: Any) -> None:
    whole, _ = ask(forms.json_schema(FLAG)).result()
    text, finish = ask(forms.json_schema(FLAG), SamplingParams(temperature=0, stop=(":",))).result()
    assert (finish.reason, text) == ("stop", whole.split(":")[0])
    text, finish = ask(forms.json_schema(FLAG), SamplingParams(temperature=0, max_tokens=2)).result()
    assert finish.reason == "length" and whole.startswith(text) and len(finish.token_ids) == 2


def test_a_stop_token_cannot_end_an_answer_before_its_form(
    forms: Constraints, ask: Any, tokenizer: Tokenizer
) -> None:
    eager = dict.fromkeys(tokenizer.stop_ids, 1000.0)
    text, _ = ask(forms.json_schema(FLAG), SamplingParams(temperature=0, logit_bias=eager)).result()
    assert fits(json.loads(text), FLAG)
    text, _ = ask(forms.choice(["a", "abc"]), SamplingParams(temperature=0, logit_bias=eager)).result()
    assert text == "a"


def test_thinking_is_free_until_it_ends(forms: Constraints, ask: Any, tokenizer: Tokenizer) -> None:
    close = tokenizer.token_to_id("</think>")
    assert close is not None
    eager = {**dict.fromkeys(tokenizer.stop_ids, 1000.0), close: 14.0}
    for seed in range(3):
        params = SamplingParams(seed=seed, logit_bias=eager, max_tokens=400)
        text, finish = ask(forms.json_schema(FLAG, thinking="opened"), params).result()
        assert finish.reason == "stop" and text.count("</think>") == 1
        assert fits(json.loads(text.partition("</think>")[2]), FLAG)
    text, _ = ask(
        forms.json_schema(FLAG, thinking="opened"), SamplingParams(temperature=0, max_tokens=8)
    ).result()
    assert not text.startswith("{")  # the greedy answer begins as it would without a form


@pytest.mark.parametrize("choice", ["required", "weather", "now"])
def test_tools_are_called_as_their_schemas_say(choice: str, forms: Constraints, ask: Any) -> None:
    schemas = {"weather": WEATHER, "now": NOTHING}
    for seed in range(3):
        form = forms.tool_calls(TOOLS, choice, parallel=choice == "required" and seed > 0)
        text, finish = ask(form, SamplingParams(seed=seed, max_tokens=800)).result()
        answer = parse_answer(text)
        assert finish.reason == "stop" and answer.content == "" and answer.tool_calls
        assert len(answer.tool_calls) == text.count("<tool_call>")
        for call in answer.tool_calls:
            assert choice in ("required", call.name)
            assert fits(call.arguments, schemas[call.name])


def test_a_form_that_gets_too_costly_ends_only_its_own_answer(
    forms: Constraints, ask: Any, engine: Engine
) -> None:
    alone = ask(forms.json_schema(PERSON)).result()[0]
    costly = ask(forms.regex(COSTLY), SamplingParams(seed=1, max_tokens=600))
    other = ask(forms.json_schema(PERSON))
    _, finish = costly.result()
    assert isinstance(finish, Finish) and finish.reason == "error" and finish.error is not None
    assert "any longer (lexer error: too many states" in finish.error and "\n" not in finish.error
    assert other.result()[0] == alone
    assert engine.health.ok


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def bomb(levels: int) -> dict[str, Any]:
    names = [f"l{i}" for i in range(levels)]
    defs: dict[str, Any] = {"l0": {"type": "string"}}
    for below, name in itertools.pairwise(names):
        inner = {"$ref": f"#/$defs/{below}"}
        defs[name] = {"allOf": [{"anyOf": [inner, {"properties": {"a": inner}}]}] * 2}
    return {"$ref": f"#/$defs/{names[-1]}", "$defs": defs}


@pytest.mark.parametrize(
    ("method", "argument", "message"),
    [
        ("json_schema", {"$ref": "http://127.0.0.1:9/schema"}, "it refers to another document"),
        ("json_schema", {"properties": {"a": {"$ref": "file:///etc/passwd"}}}, "another document"),
        ("json_schema", {"$ref": "#/$defs/none"}, "does not exist"),
        ("json_schema", {"$ref": "#"}, "nothing can fit it"),
        ("json_schema", {"type": "array", "uniqueItems": True}, "Unimplemented keys"),
        ("json_schema", {"type": 5}, "type must be"),
        ("json_schema", deep(MAX_DEPTH + 1), f"more than {MAX_DEPTH} levels"),
        ("json_schema", deep(100_000), f"more than {MAX_DEPTH} levels"),
        ("json_schema", bomb(25), "too large"),
        ("json_schema", {"enum": list(range(MAX_SCHEMA_CHARS // 4))}, "characters, but may have"),
        ("json_schema", {"properties": {f"p{i}": {} for i in range(10_000)}}, "too much memory"),
        ("json_schema", {"type": "integer", "multipleOf": 999_999_937}, "fuel exhausted"),
        ("json_schema", {"minimum": float("nan")}, "plain JSON"),
        ("json_schema", {"const": object()}, "plain JSON"),
        ("regex", "a" * (MAX_REGEX_CHARS + 1), "may have"),
        ("regex", "(" * 4000 + "a" + ")" * 4000, "nested"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", "(a", "unclosed group"),
        ("regex", "[a&&b]", "nothing can fit it"),
        ("grammar", "start: " + "(" * 20_000, "nested"),
        ("grammar", "root ::= (", "cannot be used"),
        ("grammar", "start: @other", "unknown grammar"),
        ("grammar", "a" * 100_000, "may have"),
        ("grammar", "start: start", "nothing can fit it"),
        ("choice", [], "between 1 and"),
        ("choice", ["a"] * 20_000, "between 1 and"),
        ("choice", ["\ud800"], "no character"),
        ("choice", ["a" * (MAX_SCHEMA_CHARS + 1)], "characters in all"),
        ("tool_calls", [], "no such tool"),
        ("tool_calls", [{"name": 'a"b'}], "needs a name"),
        ("tool_calls", [{"name": "a", "parameters": [1]}], "have to be a JSON schema"),
        ("tool_calls", [{"name": "a", "parameters": deep(1000)}], f"more than {MAX_DEPTH} levels"),
    ],
)  # fmt: skip
def test_hostile_forms_are_refused_in_one_sentence(
    method: str, argument: Any, message: str, forms: Constraints
) -> None:
    with pytest.raises(UsageError) as refused:
        getattr(forms, method)(argument)
    assert message in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 400
    assert forms.json_object().allowed() is not None


@pytest.mark.parametrize("pattern", ["(a*)*" * 20 + "b", "(x+x+)+y", "(a|aa)+$"])
def test_patterns_that_take_other_engines_forever_are_no_matter(
    pattern: str, forms: Constraints, tokenizer: Tokenizer
) -> None:
    assert walk(tokenizer, forms.regex(pattern), ("x" if "x" in pattern else "a") * 50) in (
        "open",
        "complete",
    )


def test_a_trial_that_takes_too_long_is_ended_and_the_next_one_works(tokenizer: Tokenizer) -> None:
    forms = Constraints(tokenizer, seconds=60)
    forms.json_object()
    forms._trials.seconds = 0.0
    slow = {"enum": [f"v{i}" for i in range(20_000)]}
    with pytest.raises(UsageError, match="the form takes more than 0 seconds"):
        forms.json_schema(slow)
    forms._trials.seconds = 60
    assert forms.json_schema(slow).allowed() is not None  # what took too long may be tried again


def test_trials_beyond_the_workers_are_refused_in_the_end(tokenizer: Tokenizer) -> None:
    forms = Constraints(tokenizer, seconds=0.01)
    workers = [forms._trials._free.get() for _ in range(module.NUM_WORKERS)]
    with pytest.raises(UsageError, match="too many grammars"):
        forms.json_object()
    for worker in workers:
        forms._trials._free.put(worker)
        assert worker.child.process is None  # nothing was started for a form that was never tried


def test_a_form_is_compiled_once_and_not_kept_for_ever(
    forms: Constraints, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = forms.json_schema(FLAG)
    with pytest.raises(UsageError, match="unclosed"):
        forms.regex("(b")
    with monkeypatch.context() as patch:
        patch.setattr(forms._trials, "ask", lambda request: pytest.fail("it is known"))
        again = forms.json_schema(FLAG)
        with pytest.raises(UsageError, match="unclosed"):
            forms.regex("(b")
    first.accept(int(first.allowed().nonzero()[0]))  # type: ignore[union-attr]
    assert not torch.equal(first.allowed(), again.allowed())  # type: ignore[arg-type]
    monkeypatch.setattr(module, "MAX_CACHED_CHARS", 40)
    forms.regex("abc")
    assert list(forms._known) == ["start: answer\nanswer: /abc/"]


def test_a_token_that_does_not_fit_is_an_error(forms: Constraints) -> None:
    form = forms.choice(["yes"])
    with pytest.raises(GodwitError, match="held to its form"):
        form.accept(0)
    with pytest.raises(GodwitError, match="held to its form"):
        form.allowed()


def test_a_panic_of_the_library_is_an_ordinary_error() -> None:
    class Panic(BaseException):
        pass

    class Matcher:
        def compute_bitmask(self) -> bytes:
            raise Panic("index out of bounds\nbacktrace")

        def consume_token(self, token: int) -> bool:
            raise KeyboardInterrupt

    form = GrammarConstraint(Matcher(), 10)
    with pytest.raises(GodwitError, match=r"\(index out of bounds\)$"):
        form.allowed()
    with pytest.raises(KeyboardInterrupt):
        form.accept(1)


def test_forced_text_is_written_as_the_model_would(forms: Constraints, tokenizer: Tokenizer) -> None:
    mask = forms.tool_calls(TOOLS).allowed()
    assert mask is not None and mask.nonzero().flatten().tolist() == [tokenizer.token_to_id("<tool_call>")]
    text = "<|im_end|>"
    form = forms.choice([text])
    ids = tokenizer.encode(text, add_special_tokens=False)
    for id in ids:
        mask = form.allowed()
        assert mask is not None and not mask[sorted(tokenizer.special_ids)].any()
        form.accept(id)
    assert form.complete


def test_other_vocabularies(tokenizer: Tokenizer) -> None:
    tiny = tiny_tokenizer()
    form = Constraints(tiny, 300, seconds=60).regex("é|b")
    mask = form.allowed()
    assert mask is not None and mask.shape == (300,)
    assert mask.nonzero().flatten().tolist() == sorted(tiny.encode(c)[0] for c in "éb")
    with pytest.raises(UsageError, match="no stop token"):
        Constraints(tiny_tokenizer(stop_tokens=()))
    with pytest.raises(UsageError, match="no stop token"):
        Constraints(tiny, 200)


def test_the_library_is_needed_only_here(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UsageError, match=r"godwit-llm\[serve\]"):
        Constraints(tokenizer)


@pytest.mark.parametrize(
    ("message", "point"),
    [
        ("at 1(8): failed to compile JSON schema: Unknown format: x\n  1 | start", "Unknown format: x"),
        ("bad regex:\n  (a\n  ^\nerror: unclosed group\n", "unclosed group"),
        ("", "it is not valid"),
        ("x" * 1000, "x" * 300),
    ],
)
def test_messages_come_to_the_point(message: str, point: str) -> None:
    assert explained(message) == point
