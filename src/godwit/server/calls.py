"""What the readers of tool calls have in common."""

from __future__ import annotations

import json
import math
from typing import Any, Protocol


class CallReader(Protocol):
    """Reads one call, from behind its opening tag.

    Attributes:
        name: the function's, from when on the text is taken for a call of it.
        failed: the text is no call, or from here on none that can be read.
        ended: nothing more belongs to the call.
        complete: its arguments are a JSON object.
    """

    name: str | None
    failed: bool
    ended: bool
    complete: bool

    def push(self, text: str) -> tuple[int, str]:
        """Read on in ``text``: how many characters are used up, and what of the arguments is certain."""
        ...

    def flush(self, rest: str, cut: bool) -> str:
        """The text ends with ``rest``, which no push used up; ``cut``: before its time."""
        ...


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, also where only Python would take it.
    """
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def is_object(text: str) -> bool:
    """Whether a text is a JSON object."""
    try:
        return isinstance(parse_json(text), dict)
    except ValueError:
        return False


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError("the number is too large")
    return value
