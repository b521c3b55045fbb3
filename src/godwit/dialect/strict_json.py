"""JSON as the standard has it, without the additions that Python takes."""

from __future__ import annotations

import json
import math
from typing import Any


def parse_json(text: str, *, strict: bool = True) -> Any:
    """The value of a JSON text; ``strict``: without control characters in its strings.

    Raises:
        ValueError: it is none, also where only Python would take it.
    """
    try:
        return json.loads(text, strict=strict, parse_constant=refuse_constant, parse_float=finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def object_text(text: str) -> str | None:
    """A text as a JSON object, None where it is none; line breaks and the like within strings are escaped."""
    for strict in (True, False):
        try:
            value = parse_json(text, strict=strict)
        except ValueError:
            continue
        return None if not isinstance(value, dict) else text if strict else json.dumps(value)
    return None


def refuse_constant(constant: str) -> None:
    """For ``json.loads``: NaN and the infinities, which Python would take, are no JSON.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{constant} is not a number that JSON has")


def finite(text: str) -> float:
    """For ``json.loads``: a number as a float.

    Raises:
        ValueError: it is beyond what a float holds.
    """
    if not math.isfinite(value := float(text)):
        raise ValueError("a number is too large")
    return value
