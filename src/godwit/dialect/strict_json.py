"""JSON by the standard, without Python's extensions."""

from __future__ import annotations

import json
import math
from typing import Any


def parse_json(text: str, *, strict: bool = True) -> Any:
    """The value of a JSON text; ``strict`` refuses control characters in strings.

    Raises:
        ValueError: it is not JSON by the standard.
    """
    try:
        return json.loads(text, strict=strict, parse_constant=refuse_constant, parse_float=finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def object_text(text: str) -> str | None:
    """A text as a JSON object, with control characters in strings escaped; None if it is not an object."""
    for strict in (True, False):
        try:
            value = parse_json(text, strict=strict)
        except ValueError:
            continue
        return None if not isinstance(value, dict) else text if strict else json.dumps(value)
    return None


def refuse_constant(constant: str) -> None:
    """For ``json.loads``: refuse NaN and the infinities, which are not JSON.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{constant} is not valid in JSON")


def finite(text: str) -> float:
    """For ``json.loads``: a number as a float.

    Raises:
        ValueError: it is too large for a float.
    """
    if not math.isfinite(value := float(text)):
        raise ValueError("a number is too large")
    return value
