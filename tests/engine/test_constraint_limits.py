"""Hostile and costly forms, what is kept of them, and other vocabularies."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest
import torch

from godwit.engine import constraint as module
from godwit.engine.constraint import Constraints, GrammarConstraint, Tags, explained
from godwit.engine.constraint_grammar import MAX_REGEX_CHARS, MAX_SCHEMA_CHARS
from godwit.engine.constraint_schema import MAX_DEPTH
from godwit.errors import BusyError, GodwitError, UsageError
from godwit.tokenizer import Tokenizer
from tests.engine.forms import FLAG, TOOLS, held, walk
from tests.engine.tiny import tiny_tokenizer

pytest.importorskip("llguidance")


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
    ("kind", "argument", "message"),
    [
        ("schema", {"$ref": "http://127.0.0.1:9/schema"}, "it refers to another document"),
        ("schema", {"properties": {"a": {"$ref": "file:///etc/passwd"}}}, "another document"),
        ("schema", {"$ref": "#/$defs/none"}, "does not exist"),
        ("schema", {"$ref": "#"}, "nothing can fit it"),
        ("schema", {"type": "array", "uniqueItems": True}, "Unimplemented keys"),
        ("schema", {"type": 5}, "type must be"),
        ("schema", deep(MAX_DEPTH + 1), f"more than {MAX_DEPTH} levels"),
        ("schema", deep(100_000), f"more than {MAX_DEPTH} levels"),
        ("schema", bomb(25), "too large"),
        ("schema", {"enum": list(range(MAX_SCHEMA_CHARS // 4))}, "characters, but may have"),
        ("schema", {"properties": {f"p{i}": {} for i in range(10_000)}}, "too much memory"),
        ("schema", {"type": "integer", "multipleOf": 999_999_937}, "fuel exhausted"),
        ("schema", {"minimum": float("nan")}, "plain JSON"),
        ("schema", {"const": object()}, "plain JSON"),
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
        ("calls", [], "no such tool"),
        ("calls", [{"name": 'a"b'}], "needs a name"),
        ("calls", [{"name": "a", "parameters": [1]}], "have to be a JSON schema"),
        ("calls", [{"name": "a", "parameters": deep(1000)}], f"more than {MAX_DEPTH} levels"),
    ],
)  # fmt: skip
def test_hostile_forms_are_refused_in_one_sentence(
    kind: Any, argument: Any, message: str, forms: Constraints
) -> None:
    with pytest.raises(UsageError) as refused:
        forms.tool_calls(argument) if kind == "calls" else held(forms, kind, argument)
    assert message in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 400
    assert held(forms, "object").allowed() is not None


@pytest.mark.parametrize("pattern", ["(a*)*" * 20 + "b", "(x+x+)+y", "(a|aa)+$"])
def test_patterns_that_take_other_engines_forever_are_no_matter(
    pattern: str, forms: Constraints, tokenizer: Tokenizer
) -> None:
    assert walk(tokenizer, held(forms, "regex", pattern), ("x" if "x" in pattern else "a") * 50) in (
        "open",
        "complete",
    )


def test_a_trial_that_takes_too_long_is_ended_and_the_next_one_works(tokenizer: Tokenizer) -> None:
    forms = Constraints(tokenizer, seconds=60)
    held(forms, "object")
    forms._trials.seconds = 0.0
    slow = {"enum": [f"v{i}" for i in range(20_000)]}
    with pytest.raises(UsageError, match="the form takes more than 0 seconds"):
        held(forms, "schema", slow)
    forms._trials.seconds = 60
    assert held(forms, "schema", slow).allowed() is not None  # what took too long may be tried again


def test_trials_beyond_the_workers_are_refused_in_the_end(tokenizer: Tokenizer) -> None:
    forms = Constraints(tokenizer, seconds=0.01)
    workers = [forms._trials._free.get() for _ in range(module.NUM_WORKERS)]
    with pytest.raises(BusyError, match="too many grammars"):
        held(forms, "object")
    for worker in workers:
        forms._trials._free.put(worker)
        assert worker.child.process is None  # nothing was started for a form that was never tried


def test_a_form_is_compiled_once_and_not_kept_for_ever(
    forms: Constraints, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = held(forms, "schema", FLAG)
    with pytest.raises(UsageError, match="unclosed"):
        held(forms, "regex", "(b")
    with monkeypatch.context() as patch:
        patch.setattr(forms._trials, "ask", lambda request: pytest.fail("it is known"))
        again = held(forms, "schema", FLAG)
        with pytest.raises(UsageError, match="unclosed"):
            held(forms, "regex", "(b")
    first.accept(int(first.allowed().nonzero()[0]))  # type: ignore[union-attr]
    assert not torch.equal(first.allowed(), again.allowed())  # type: ignore[arg-type]
    monkeypatch.setattr(module, "MAX_CACHED_CHARS", 40)
    held(forms, "regex", "abc")
    assert list(forms._known) == ["start: answer\nanswer: /abc/"]


def test_a_token_that_does_not_fit_is_an_error(forms: Constraints) -> None:
    form = held(forms, "choice", ["yes"])
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

    form = GrammarConstraint(Matcher(), 10, Tags({}, None))
    with pytest.raises(GodwitError, match=r"\(index out of bounds\)$"):
        form.allowed()
    with pytest.raises(KeyboardInterrupt):
        form.accept(1)


def test_forced_text_is_written_as_the_model_would(forms: Constraints, tokenizer: Tokenizer) -> None:
    mask = forms.tool_calls(TOOLS).allowed()
    assert mask is not None and mask.nonzero().flatten().tolist() == [tokenizer.token_to_id("<tool_call>")]
    text = "<|im_end|>"
    form = held(forms, "choice", [text])
    ids = tokenizer.encode(text, add_special_tokens=False)
    for id in ids:
        mask = form.allowed()
        assert mask is not None and not mask[sorted(tokenizer.special_ids)].any()
        form.accept(id)
    assert form.complete


def test_other_vocabularies(tokenizer: Tokenizer) -> None:
    tiny = tiny_tokenizer()
    form = held(Constraints(tiny, 300, seconds=60), "regex", "é|b")
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
