"""Strings that a schema allows, as they are written between tags: without quotes and escapes.

Each function returns a terminal of llguidance's Lark, which combines regular expressions by ``&``, ``|``,
``~``.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from godwit.dialect.schema import resolved
from godwit.errors import UsageError

ANY = "/(?s:.*)/"
#: Texts in which the reader would find the end of a value; valid for Python and for a grammar.
WITH_END = "|".join((
    r"(?s:.*)(<\/parameter>|<\/tool_call>|\n<\/function>|\n<parameter=)(?s:.*)",
    r"(<\/function>|<parameter=)(?s:.*)",
))  # fmt: skip
MAX_STEPS = 200
#: Keywords that could restrict a string and are not supported here.
_UNKNOWN = ("if", "then", "else", "$dynamicRef")

_MONTHS = (
    "(0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8])"
)
_LEAP = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)-02-29"
_DATE = f"([0-9]{{4}}-({_MONTHS})|{_LEAP})"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"({_BYTE}\.){{3}}{_BYTE}"
_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = rf"{_LABEL}(\.{_LABEL})*"
_GROUP = "[0-9A-Fa-f]{1,4}"
_CLOCK = "([0-9]+H([0-9]+M)?([0-9]+S)?|[0-9]+M([0-9]+S)?|[0-9]+S)"
_DAYS = "([0-9]+Y([0-9]+M)?([0-9]+D)?|[0-9]+M([0-9]+D)?|[0-9]+D)"
_MAILBOX = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_IN_URI = r"([A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-Fa-f]{2})"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}[Tt]{_TIME}",
    "duration": f"P({_DAYS}(T{_CLOCK})?|T{_CLOCK}|[0-9]+W)",
    "email": rf"{_MAILBOX}(\.{_MAILBOX})*@{_HOST}",
    "hostname": _HOST,
    "ipv4": _IPV4,
    "ipv6": "|".join(
        [f"({_GROUP}:){{7}}({_GROUP}|:)"]
        + [
            f"({_GROUP}(:{_GROUP}){{0,{left - 1}}})?::({_GROUP}(:{_GROUP}){{0,{6 - left}}})?"
            if left
            else f"::({_GROUP}(:{_GROUP}){{0,6}})?"
            for left in range(7)
        ]
    ),
    "uuid": "[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",
    "uri": rf"[A-Za-z][A-Za-z0-9+.-]*:{_IN_URI}+(#{_IN_URI}*)?",
}


def text_expression(schema: Any, root: Mapping[str, Any]) -> str | None:
    """The strings that fit a schema; None if none does.

    Raises:
        UsageError: it asks for something that cannot be checked while the string is written.
    """
    return _expression(schema, root, itertools.count())


def _expression(schema: Any, root: Mapping[str, Any], steps: Iterator[int]) -> str | None:
    if isinstance(schema, bool):
        return ANY if schema else None
    if next(steps) > MAX_STEPS:
        raise UsageError("a string of the schema has too many subschemas, or references in circles")
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping):
        return ANY
    if unknown := next((key for key in _UNKNOWN if key in schema), None):
        raise UsageError(f"`{unknown}` cannot be checked in a string that is written between tags; remove it")
    parts = [_own(schema), *(_expression(one, root, steps) for one in schema.get("allOf") or ())]
    for key in ("anyOf", "oneOf"):
        if options := schema.get(key):
            found = [_expression(option, root, steps) for option in options]
            parts.append(_one_of([one for one in found if one is not None], exactly=key == "oneOf"))
    if "not" in schema and (refused := _expression(schema["not"], root, steps)) is not None:
        parts.append(f"~({refused})")
    said = [part for part in parts if part is not None]
    return _all(said) if len(said) == len(parts) else None


def _all(parts: Sequence[str]) -> str:
    said = [part for part in dict.fromkeys(parts) if part != ANY]
    return " & ".join(f"({part})" for part in said) or ANY


def _one_of(options: Sequence[str], *, exactly: bool) -> str | None:
    if not options:
        return None
    if not exactly or len(options) == 1:
        return " | ".join(f"({option})" for option in options)
    alone = [
        _all([option, *(f"~({other})" for other in [*options[:place], *options[place + 1 :]])])
        for place, option in enumerate(options)
    ]
    return " | ".join(f"({one})" for one in alone)


def _own(schema: Mapping[str, Any]) -> str | None:
    """What the schema itself says about strings, without its subschemas."""
    named = schema.get("type")
    if named is not None and "string" not in (named if isinstance(named, list) else [named]):
        return None
    parts = [ANY]
    for options in ([schema["const"]] if "const" in schema else None, schema.get("enum")):
        if isinstance(options, list):
            texts = [option for option in options if isinstance(option, str)]
            if not texts:
                return None
            if all(re.fullmatch(WITH_END, text) for text in texts):
                raise UsageError(f"the text {texts[0][:80]!r} cannot be written between the tags of a call")
            parts.append(" | ".join(map(json.dumps, texts)))
    low, high = schema.get("minLength", 0), schema.get("maxLength", "")
    if low or high != "":
        parts.append(f"/(?s:.{{{low},{high}}})/")
    if isinstance(pattern := schema.get("pattern"), str):
        parts.append(searched(pattern))
    if schema.get("format") in _FORMATS:
        parts.append(f"/{_escaped(_FORMATS[schema['format']])}/")
    return _all(parts)


def searched(pattern: str) -> str:
    """The strings in which a pattern is found; ``^`` and ``$`` are supported at the ends of its alternatives.

    Raises:
        UsageError: they are elsewhere.
    """
    options = []
    for option in _alternatives(pattern):
        starts, ends = option.startswith("^"), bool(re.search(r"(?<!\\)(\\\\)*\$$", option))
        body = option[starts : len(option) - ends]
        options.append(f"{'' if starts else '(?s:.*)'}(?:{body}){'' if ends else '(?s:.*)'}")
    return f"/{_escaped('|'.join(options))}/"


def _alternatives(pattern: str) -> list[str]:
    """The pattern, split at each ``|`` outside of groups and classes."""
    options, depth, in_class, start = [], 0, False, 0
    for token in re.finditer(r"\\.|[\[\]()|^$]", pattern, re.DOTALL):
        sign, place = token[0], token.start()
        if in_class:
            in_class = sign != "]"
        elif sign == "[":
            in_class = True
        elif sign in "()":
            depth += 1 if sign == "(" else -1
        elif sign == "|" and depth == 0:
            options.append(pattern[start:place])
            start = place + 1
        elif sign in "^$" and (depth or place != (start if sign == "^" else _end_of_option(pattern, place))):
            raise UsageError(
                f"the pattern {pattern[:80]!r} has {sign} in its middle, which cannot be enforced"
            )
    return [*options, pattern[start:]]


def _end_of_option(pattern: str, place: int) -> int:
    return place if pattern[place + 1 : place + 2] in ("", "|") else -1


def _escaped(pattern: str) -> str:
    return re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", pattern).replace("\n", "\\n")
