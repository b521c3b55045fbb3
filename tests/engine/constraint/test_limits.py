"""Hostile and costly forms, what is kept of them, and other vocabularies."""

from __future__ import annotations

import itertools
import random
import sys
from typing import Any

import pytest
import torch

from godwit.dialect.lark import MAX_REGEX_CHARS, MAX_SCHEMA_CHARS, json_rule
from godwit.dialect.schema import MAX_DEPTH, MAX_VALUES
from godwit.engine.constraint import constraints as module
from godwit.engine.constraint import worker
from godwit.engine.constraint.constraints import (
    ANSWER_SECONDS,
    FREE_SECONDS,
    LIMITS,
    Constraints,
    GrammarConstraint,
    UntriedGrammar,
    explained,
)
from godwit.engine.constraint.text_cache import TextCache
from godwit.engine.constraint.trials import Abandon
from godwit.engine.constraint.vocabulary import Tags
from godwit.errors import BusyError, GodwitError, UsageError
from godwit.text.tokenizer import Tokenizer
from godwit.worker import Worker
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
        ("schema", {"enum": ["x" * MAX_SCHEMA_CHARS]}, "characters, but may have"),
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
        ("choice", ["\ud800"], "not a character"),
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
    with pytest.raises(UsageError, match="the grammar takes more than 0 seconds"):
        held(forms, "schema", slow)
    forms._trials.seconds = 60
    assert held(forms, "schema", slow).allowed() is not None  # what took too long may be tried again


def test_trials_beyond_the_workers_are_refused_in_the_end(tokenizer: Tokenizer) -> None:
    forms = Constraints(tokenizer, seconds=0.01)
    workers = [forms._trials._free.get() for _ in range(module.NUM_WORKERS)]
    with pytest.raises(BusyError, match="too many grammars"):
        held(forms, "object")
    for one in workers:
        forms._trials._free.put(one)
        assert one.process is None  # nothing was started for a form that was never tried


COSTLY: list[tuple[Any, Any]] = [
    ("grammar", "start: s\ns: s s | s s s | /[a-z ]/ |"),
    ("grammar", "start: s\ns: s s | /(?s:.)/"),
    ("grammar", "start: a b c | a\na: s s\nb: s |\nc: s s s |\ns: s s | /[a-z ]/ |"),
    ("regex", "(a{1,100}){1,100}"),
    ("regex", "(([a-z ]{1,100}){1,100}){1,100}"),
]


@pytest.mark.parametrize(("kind", "value"), COSTLY, ids=[str(number) for number in range(len(COSTLY))])
def test_forms_that_are_too_costly_to_follow_are_refused(kind: Any, value: Any, forms: Constraints) -> None:
    with pytest.raises(UsageError, match=r"cannot be used: .*[Tt]oo many") as refused:
        held(forms, kind, value)
    assert "\n" not in str(refused.value)


def test_large_forms_that_are_cheap_to_follow_are_not_refused(
    forms: Constraints, tokenizer: Tokenizer
) -> None:
    names = [f"choice number {number}" for number in range(10_000)]
    assert walk(tokenizer, held(forms, "choice", names), names[7654]) == "complete"
    properties = {"properties": {f"p{i}": {"type": "integer"} for i in range(400)}}
    assert walk(tokenizer, held(forms, "schema", properties), '{"p3": 1, "p399": 5}') == "complete"
    assert walk(tokenizer, held(forms, "schema", {"enum": names}), '"choice number 98"') == "complete"


@pytest.mark.parametrize("text", ["a|b", "(a)[b]{2}.*+?^$/\\", "a\nb\tc", "1 & ~2", "日本 é 🎉", '"', "#-"])
def test_any_text_can_be_a_choice(text: str, forms: Constraints, tokenizer: Tokenizer) -> None:
    assert walk(tokenizer, held(forms, "choice", [text, "other"]), text) == "complete"
    assert walk(tokenizer, held(forms, "choice", [text, "", "other"]), "") == "complete"
    assert walk(tokenizer, held(forms, "choice", [text, "other"]), "zzz") == "zzz"


def test_a_form_is_tried_once(forms: Constraints) -> None:
    wanted: list[tuple[Any, Any]] = [("schema", FLAG), ("grammar", 'root ::= "a" | "b"')]
    first = [held(forms, kind, value) for kind, value in wanted]
    with pytest.raises(UsageError, match="unclosed"):
        held(forms, "regex", "(b")
    known = forms.only_known()
    again = [held(known, kind, value) for kind, value in wanted]
    with pytest.raises(UsageError, match="unclosed"):
        held(known, "regex", "(b")
    for kind in ("regex", "grammar"):
        with pytest.raises(UntriedGrammar):
            held(known, kind, 'root ::= "never seen"')
    for one, other in zip(first, again, strict=True):
        one.accept(int(one.allowed().nonzero()[0]))  # type: ignore[union-attr]
        assert not torch.equal(one.allowed(), other.allowed())  # type: ignore[arg-type]


def test_an_answer_uses_up_no_other_one_s_limits(forms: Constraints) -> None:
    """Copies of a matcher would share the states of its lexer, which are limited."""
    grammar = forms._make("start: answer\nanswer: /(?s:.*)a(?s:.{18})b(?s:.*)/", "it", LIMITS, "none")

    def followed(form: GrammarConstraint) -> int:
        chance = random.Random(5)
        for count in range(400):
            mask = form.allowed()
            assert mask is not None
            try:
                form.accept(chance.choice(mask[97:500].nonzero().flatten().tolist()) + 97)
            except UsageError:
                return count
        return 400

    counts = {followed(form) for form in (grammar, grammar.again(), grammar.again())}
    assert len(counts) == 1


def test_what_is_kept_of_forms_is_bounded_by_number_and_by_size() -> None:
    known = TextCache(max_entries=3, max_bytes=4000)
    for name in "abcd":
        known.put(name, name)
        known.get("a")  # what is used stays
    assert [name for name in "abcd" if known.get(name) is not None] == ["a", "c", "d"]
    known.put("e", "x" * 3200)
    assert len(known) < 3 and known.get("e") is not None and known.num_bytes <= 4000
    known.put("f", "x" * 5000)
    assert len(known) == 0 == known.num_bytes
    known.put("g", "1")
    before = known.num_bytes
    known.put("g", "2")
    assert known.get("g") == "2" and known.num_bytes == before


def test_costly_masks_are_counted_against_their_answer(forms: Constraints) -> None:
    def used(seconds: float, calls: int) -> None:
        now = itertools.count()
        form = GrammarConstraint(
            lambda: forms._compile("start: /[a-z]*/", LIMITS),
            forms.vocab_size,
            Tags({}, None),
            clock=lambda: (next(now) + 1) // 2 * seconds,
        )
        for _ in range(calls):
            form.allowed()

    used(FREE_SECONDS, 1000)
    slow = 0.05
    allowed = int(ANSWER_SECONDS / (slow - FREE_SECONDS))
    used(slow, allowed)
    with pytest.raises(UsageError, match="takes too much time to follow"):
        used(slow, allowed + 1)


class Walked:
    """A grammar that allows three tokens at each step, 8 being a stop token, and goes wrong after some."""

    def __init__(self, length: int, error: str) -> None:
        self.length, self.error = length, error
        self.taken: list[int] = []
        self.copies: list[Walked] = []

    def deep_copy(self) -> Walked:
        self.copies.append(Walked(self.length, self.error))
        return self.copies[-1]

    def compute_bitmask(self) -> bytes:
        return bytes([0b101, 0b1])

    def consume_token(self, token: int) -> None:
        self.taken.append(token)

    def is_error(self) -> bool:
        return len(self.taken) >= self.length

    def get_error(self) -> str:
        return self.error if self.is_error() else ""


def test_a_trial_follows_a_form() -> None:
    fine = Walked(10**6, "")
    assert worker.walk(fine, [8], 1.0, lambda: 0.0) == ""
    assert [len(one.taken) for one in fine.copies] == [worker.WALK_TOKENS] * worker.NUM_WALKS
    assert all(set(one.taken) == {0, 2} for one in fine.copies)
    assert worker.walk(Walked(5, "too many items"), [8], 1.0, lambda: 0.0) == "too many items"
    assert worker.walk(Walked(5, "NoExtension"), [8], 1.0, lambda: 0.0) == ""
    assert worker.walk(Walked(0, "NoExtension"), [8], 1.0, lambda: 0.0) == "NoExtension"
    clock = itertools.count().__next__
    assert "too much time" in worker.walk(Walked(10**6, ""), [8], 9.5, clock)
    assert worker.pick(b"\0\1", [8], random.Random(1)) is None


def test_a_trial_that_nobody_waits_for_is_ended(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms = Constraints(tokenizer, seconds=60)
    held(forms, "object")
    abandon = Abandon()
    exchange = Worker._exchange

    def leave(worker: Worker, request: Any, files: Any, seconds: float) -> Any:
        if "grammar" in request.get("value", ""):  # the client leaves while the process works
            abandon.give_up()
        return exchange(worker, request, files, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "_exchange", leave)
        with pytest.raises(BusyError, match="given up"):
            held(forms.until(abandon), "regex", "abc")
    with pytest.raises(BusyError, match="given up"):
        held(forms.until(abandon), "regex", "abc")
    with pytest.raises(UntriedGrammar):
        held(forms.only_known(), "regex", "abc")
    assert forms._trials._free.qsize() == module.NUM_WORKERS
    assert held(forms, "regex", "abc").allowed() is not None


def test_a_token_that_does_not_fit_is_an_error(forms: Constraints) -> None:
    form = held(forms, "choice", ["yes"])
    with pytest.raises(GodwitError, match="no longer fits its grammar"):
        form.accept(0)
    with pytest.raises(GodwitError, match="no longer fits its grammar"):
        form.allowed()


def test_a_panic_of_the_library_is_an_ordinary_error() -> None:
    class Panic(BaseException):
        pass

    class Matcher:
        def is_error(self) -> bool:
            return False

        def compute_bitmask(self) -> bytes:
            raise Panic("index out of bounds\nbacktrace")

        def consume_token(self, token: int) -> bool:
            raise KeyboardInterrupt

    form = GrammarConstraint(Matcher, 10, Tags({}, None))
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


def test_a_schema_of_too_many_values_is_refused() -> None:
    wide = {"anyOf": [{"enum": list(range(400))} for _ in range(MAX_VALUES // 400 + 1)]}
    with pytest.raises(UsageError, match=f"more than {MAX_VALUES} values"):
        json_rule(wide)
    wide["anyOf"] = wide["anyOf"][:40]
    assert json_rule(wide).startswith("%json ")
