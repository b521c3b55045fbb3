"""Grammars for llguidance, in its variant of Lark.

A grammar's rule ``answer`` is what was asked for; ``start`` may put thinking before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from godwit.dialect.schema import check_depth, prepared
from godwit.dialect.tags import END_THINK, THINK
from godwit.errors import UsageError

#: What may come before the answer: nothing, a thought, or the rest of one that the prompt has begun.
ThinkingBefore = Literal["none", "optional", "opened"]

MAX_SCHEMA_CHARS = 1 << 18
MAX_REGEX_CHARS = 1 << 13
MAX_GRAMMAR_CHARS = 1 << 16
MAX_CHOICES = 10_000

#: Characters that need no escape in a regular expression.
_PLAIN = re.compile(r"[0-9A-Za-z ]|[^\W\d_]")

#: White space allowed between the parts of a JSON text: none, one blank, or a new line, indented by up to
#: eight steps. All models write one of these; without a limit small models would write blanks for ever.
_BLANKS = r" |\n(  ){0,8}|\n\t{0,8}"


@dataclass(frozen=True)
class GrammarRule:
    """What an answer, or a part of it, has to look like.

    Attributes:
        text: the right side of a rule in Lark.
        what: names what asked for it, for errors.
        inner: another grammar, to which the text refers as ``@inner``; "" for none.
    """

    text: str
    what: str
    inner: str = ""


def quoted(text: str) -> str:
    """A text as a literal of a grammar.

    Raises:
        UsageError: it cannot be encoded.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("a text holds half of a surrogate pair, which is not a character") from None
    return json.dumps(text)


def json_rule(schema: Mapping[str, Any], *, lenient: bool = False) -> str:
    """The right side of a rule for JSON that fits a schema, as :func:`prepared` changes it.

    Args:
        schema: its ``x-guidance``, which has a meaning to the library, is ignored.
        lenient: ignore what a grammar cannot check, instead of refusing it.

    Raises:
        UsageError: the schema is not JSON, too large, or too deep.
    """
    how = {"whitespace_pattern": _BLANKS, "lenient": lenient}
    text = checked_json({**prepared(schema), "x-guidance": how}, MAX_SCHEMA_CHARS)
    return f"%json {text}"


def choice_rule(options: Sequence[str]) -> str:
    """The right side of a rule for one of some texts: one expression, since thousands of rules slow down each
    mask.

    Raises:
        UsageError: there are none, or too many.
    """
    if not 0 < len(options) <= MAX_CHOICES or not all(isinstance(option, str) for option in options):
        raise UsageError(f"a choice is between 1 and {MAX_CHOICES} texts")
    if sum(map(len, options)) > MAX_SCHEMA_CHARS:
        raise UsageError(f"the texts of a choice may have {MAX_SCHEMA_CHARS} characters in all")
    return f"/(?:{'|'.join(map(_literal, options))})/"


def _literal(text: str) -> str:
    """A text, escaped for a regular expression."""
    quoted(text)  # refuses what cannot be encoded
    return "".join(sign if _PLAIN.fullmatch(sign) else f"\\x{{{ord(sign):x}}}" for sign in text)


def whole(rule: GrammarRule, more: Iterable[str] = (), *, thinking: ThinkingBefore = "none") -> str:
    """A grammar whose ``answer`` is ``rule``, after the thinking that is allowed; ``more``: further rules."""
    start, lines = "answer", [f"answer: {rule.text}", *more]
    if thinking != "none":
        start = "thoughts blanks answer"
        lines += [
            f"thoughts[suffix={quoted(END_THINK)}]: THOUGHTS",
            "THOUGHTS: /(?s:.*)/",
            "blanks: /\\n{0,4}/",
        ]
    if thinking == "optional":
        start = f"answer | {quoted(THINK)} {start}"
    text = "\n".join([f"start: {start}", *lines])
    if not rule.inner:
        return text
    outer = {"name": "outer", "lark_grammar": text}
    return json.dumps({"grammars": [outer, {"name": "inner", "lark_grammar": rule.inner}]})


def checked_json(value: object, max_chars: int) -> str:
    """The JSON text of a value.

    Raises:
        UsageError: it is not JSON, or too large, or too deep.
    """
    check_depth(value)
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise UsageError("the schema must be plain JSON") from None
    if len(text) > max_chars:
        raise UsageError(f"the schema has {len(text)} characters, but may have {max_chars}")
    return text
