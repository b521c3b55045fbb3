"""Values of parameters that a model writes as plain text, typed by the schema."""

from __future__ import annotations

import ast
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from godwit.dialect.schema import fits, kind_of, kinds, resolved
from godwit.dialect.strict_json import parse_json

#: Limits of Python literals; beyond them Python's parser could run out of memory or stack.
MAX_LITERAL_CHARS = 1 << 16
MAX_LITERAL_BRACKETS = 100
_INTEGER = re.compile(r"[+-]?\d{1,300}")
_BRACKETS = "([{"


def is_text(schema: Any, root: Mapping[str, Any]) -> bool:
    """Whether any text is a valid value as it is, so it can be passed on before it is complete."""
    said = resolved(schema, root)
    listed = isinstance(said, Mapping) and not {"enum", "const"}.isdisjoint(said)
    return not listed and kinds(schema, root) in ([], ["string"])


def read_value(text: str, schema: Any, root: Mapping[str, Any]) -> Any:
    """The value that a text stands for, given the schema.

    A text can often be read in several ways. The first reading that fits wins: null, then objects and lists,
    then the types in the order in which the schema names them. If none fits, a value of a right type is
    returned, or else the text itself.
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
    """All values that a text can stand for."""
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
    """The value of a Python literal, which is how some templates write lists and objects; never evaluated.

    Raises:
        ValueError: it is not a literal, or JSON has no such value.
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
