"""Whatever a dialect's grammar lets through, its reader takes apart as the grammar meant it."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from godwit.dialect import fences
from godwit.dialect.detect import DIALECTS
from godwit.dialect.dialect import Dialect
from godwit.dialect.fences import Fences
from godwit.dialect.parser import CallEnd, Delta
from godwit.dialect.schema import fits, prepared
from godwit.engine.constraint.constraints import Constraints, GrammarConstraint
from godwit.text.tokenizer import Tokenizer
from tests.dialect.parsing import calls_of, parse, text_of
from tests.engine.forms import FOLDER

pytest.importorskip("llguidance")
TOKENIZER = Tokenizer.from_dir(FOLDER)
CONSTRAINTS = Constraints(TOKENIZER, seconds=60)
SCHEMA = {
    "type": "object",
    "properties": {
        "c": {"type": "string", "maxLength": 3},
        "n": {"type": ["integer", "null"], "minimum": 0, "maximum": 20},
    },
    "required": ["c"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [{"name": name, "parameters": SCHEMA} for name in ("f", "get_it")]
SCHEMAS = {tool["name"]: SCHEMA for tool in TOOLS}
LONG = '{"name": "f", "arguments": {"c": "long"}}'
#: Calls that do not fit the schema, so they have to be refused or be text, and what may make them text.
SNIPPETS = {
    "hermes": [f"<tool_call>\n{LONG}\n</tool_call>", f"<tool_call>{LONG}</tool_call>"],
    "xml": [
        "<tool_call>\n<function=f>\n<parameter=c>\nlong\n</parameter>\n</function>\n</tool_call>",
        "<function=f>\n<parameter=c>\nlong\n</parameter>\n</function>",
    ],
    "llama": [LONG.replace("arguments", "parameters"), f"<|python_tag|>{LONG}", f"<|python_tag|> {LONG}"],
    "mistral": [f"[TOOL_CALLS] [{LONG}]", f"[TOOL_CALLS]{LONG}"],
    "mistral_args": ['[TOOL_CALLS]f[ARGS]{"c": "long"}', f"[TOOL_CALLS] [{LONG}]"],
}
SIGNS = {"xml": "<function=", "mistral_args": "[ARGS]"}
FENCES = [
    "```",
    "```\n",
    "```py\n",
    "\n```\n",
    "\n````\n",
    "\n~~~\n",
    "~~~~~~~~\n",
    "\n``` `\n",
    "  ```  \n",
    "~",
]
TEXTS = [*FENCES, *FENCES, "\n", "\n", " ", "`", "x", "Well.", "</tool_call>", "<tool_call>", "<function=f>"]
BY_DIALECT = pytest.mark.parametrize("dialect", DIALECTS, ids=[dialect.name for dialect in DIALECTS])


def write(
    constraint: GrammarConstraint, chance: random.Random, snippets: list[str], length: int
) -> str | None:
    """A text that the constraint lets through, made of snippets and of any tokens; None if it has no end."""
    stops, ids = sorted(TOKENIZER.stop_ids), list[int]()
    wanted: list[int] = []
    for _ in range(400):
        allowed = constraint.allowed()
        assert allowed is not None
        if constraint.complete and len(ids) >= length:
            return TOKENIZER.decode(ids)
        allowed[stops] = False
        if not wanted and snippets and chance.random() < 0.9:
            wanted = TOKENIZER.encode(chance.choice(snippets), allow_special=True, add_special_tokens=False)
        if wanted and allowed[wanted[0]]:
            ids.append(wanted.pop(0))
        else:
            wanted = []
            choices = allowed.nonzero().flatten()
            if not choices.numel():
                return TOKENIZER.decode(ids) if constraint.complete else None
            ids.append(int(choices[chance.randrange(choices.numel())]))
        constraint.accept(ids[-1])
    return None


def read(text: str, dialect: Dialect, chance: random.Random) -> list[Delta]:
    """What the reader finds, however the text is cut."""
    cuts = sorted(chance.randrange(len(text) + 1) for _ in range(4))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    deltas = parse([text], dialect.name, schemas=SCHEMAS)
    assert parse(pieces, dialect.name, schemas=SCHEMAS) == deltas, pieces
    return deltas


def check(deltas: list[Delta], text: str) -> int:
    """Every call is whole and fits its tool; how many there are."""
    calls = calls_of(deltas)
    assert len(calls) == sum(isinstance(delta, CallEnd) for delta in deltas), text
    for name, arguments in calls:
        assert name in SCHEMAS and fits(arguments, prepared(SCHEMA), {}), text
    return len(calls)


@BY_DIALECT
def test_free_text_has_no_calls_but_those_that_the_grammar_holds_to_their_tools(dialect: Dialect) -> None:
    called = mentioned = 0
    for seed in range(25):
        chance = random.Random(seed)
        constraint = CONSTRAINTS.tool_calls(TOOLS, "auto", dialect=dialect)
        text = write(constraint, chance, [*TEXTS, *3 * SNIPPETS[dialect.name]], 60)
        if text is None:
            continue
        deltas = read(text, dialect, chance)
        called += check(deltas, text)
        mentioned += any(snippet in text_of(deltas) for snippet in SNIPPETS[dialect.name])
    assert called and (mentioned or dialect.name == "llama")  # this grammar refuses them in fences, too


@BY_DIALECT
def test_forced_calls_are_read_back(dialect: Dialect) -> None:
    found = 0
    for seed in range(8):
        chance = random.Random(seed)
        constraint = CONSTRAINTS.tool_calls(TOOLS, "required", dialect=dialect)
        text = write(constraint, chance, [], 50)
        if text is None:
            continue
        deltas = read(text, dialect, chance)
        assert not text_of(deltas).strip()
        count = check(deltas, text)
        found += count
        assert count == text.count(SIGNS.get(dialect.name, '{"name": '))
    assert found > 8


CODE = "".join(f"|{fences._code(*one)}" for one in fences._FENCES)
LINES = re.compile(f"([ \\t]*({fences._PLAIN})?\\n|{fences._TICKS}\\n{CODE})*")
LAST = re.compile(f"[ \\t]*({fences._PLAIN})?")


@given(
    st.lists(st.sampled_from(["`", "```", "~~~", "~~~~~~~", "\n", "\n", "\n", " ", "\r", "x"])).map("".join)
)
def test_the_expressions_of_fences_say_what_their_reader_says(text: str) -> None:
    followed = Fences()
    followed.push(text)
    lines, last = text[: text.rfind("\n") + 1], text[text.rfind("\n") + 1 :]
    outside = LINES.fullmatch(lines) is not None and LAST.fullmatch(last) is not None
    assert outside == (not followed.inside)
