"""Values of parameters that a model writes as text: of what a text can mean, that which fits the schema."""

from __future__ import annotations

import ast
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from godwit.dialect.schema import fits, kind_of, kinds, resolved
from godwit.dialect.strict_json import parse_json

#: Python's literals are read up to this size and depth, so that their parser has no chance to fail badly.
MAX_LITERAL_CHARS = 1 << 16
MAX_LITERAL_BRACKETS = 100
_INTEGER = re.compile(r"[+-]?\d{1,300}")
_BRACKETS = "([{"


def is_text(schema: Any, root: Mapping[str, Any]) -> bool:
    """Whether every text is a value as it stands, so that it can be passed on before its end is known."""
    said = resolved(schema, root)
    listed = isinstance(said, Mapping) and not {"enum", "const"}.isdisjoint(said)
    return not listed and kinds(schema, root) in ([], ["string"])


def read_value(text: str, schema: Any, root: Mapping[str, Any]) -> Any:
    """What a text means where a schema asks for a value.

    Of the values that the text can stand for, the first that fits: null, then objects and lists, then others
    in the order in which the schema names their types. Where none does, a value of a right type is as good
    as it gets, and otherwise the text itself.
    """
    asked = kinds(schema, root)
    found = sorted(_meanings(text), key=lambda value: _rank(kind_of(value), asked))
    right = [value for value in found if not asked or _rank(kind_of(value), asked) <= len(asked)]
    for value in right:
        if fits(value, schema, root):
            return value
    if not asked or "string" in asked:
        return text
    if text.strip().lower() in ("null", "none"):
        return None
    return right[0] if right else text


def _rank(kind: str, asked: list[str]) -> int:
    if kind in asked or (kind == "integer" and "number" in asked):
        first = kind in ("null", "object", "array")
        return 0 if first else 1 + asked.index(kind if kind in asked else "number")
    return len(asked) + 1


def _meanings(text: str) -> Iterator[Any]:
    """All that a text can stand for."""
    yield text
    plain = text.strip()
    lower = plain.lower()
    if plain != text:
        yield plain
    if lower in ("null", "none"):
        yield None
    elif lower in ("true", "false"):
        yield lower == "true"
    elif (number := _number(plain)) is not None:
        yield number
    else:
        for read in (parse_json, _literal):
            try:
                yield read(plain)
            except ValueError:
                continue


def _number(plain: str) -> int | float | None:
    if _INTEGER.fullmatch(plain):
        return int(plain)
    try:
        value = float(plain)
    except ValueError:
        return None
    if not math.isfinite(value) or "_" in plain:
        return None
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _literal(plain: str) -> Any:
    """The value of a literal of Python, as templates write lists and objects; never evaluated.

    Raises:
        ValueError: it is none, or has no JSON.
    """
    if not plain or plain[0] not in "([{'\"" or len(plain) > MAX_LITERAL_CHARS:
        raise ValueError("no literal")
    if sum(map(plain.count, _BRACKETS)) > MAX_LITERAL_BRACKETS:
        raise ValueError("too many brackets")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _as_json(ast.literal_eval(plain))
    except (SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError("no literal") from None


def _as_json(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_as_json(one) for one in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _as_json(one) for key, one in value.items()}
    if (
        value is None
        or isinstance(value, bool | int | str)
        or (isinstance(value, float) and math.isfinite(value))
    ):
        return value
    raise ValueError("no JSON")
