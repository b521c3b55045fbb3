"""Tool calls as tags, in the form of Qwen3-Coder. The values are text; the tool's schema says their types.

::

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from godwit.server.calls import parse_json

FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
_END_CALL = "</tool_call>"
_ENDS_OF_VALUE = (END_PARAMETER, PARAMETER, END_FUNCTION)
MAX_NAME = 256
MAX_REFERENCES = 8
_INTEGER = re.compile(r"[+-]?\d{1,300}")


class XmlCall:
    """Reads one call; see :class:`~godwit.server.calls.CallReader`.

    Values of type string are given out as they come, others when they are whole. Closing tags may be missing
    where it is clear what was meant.

    Args:
        schemas: the parameters of each tool, by its name.
        opened: ``<function=`` is read already.
    """

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]], *, opened: bool = False) -> None:
        self.name: str | None = None
        self.failed = self.ended = self.complete = False
        self._schemas = schemas
        self._schema: Mapping[str, Any] = {}
        self._state: Callable[[bool], bool] = self._read_name if opened else self._open
        self._held = ""
        self._out = ""
        self._keys: set[str] = set()
        self._type = "string"
        self._value = ""
        self._begins = False
        self._skips = False
        self._cut = False

    def push(self, text: str) -> tuple[int, str]:
        self._held = text
        while not (self.failed or self.ended) and self._state(False):
            pass
        out, self._out = self._out, ""
        return len(text) - len(self._held), out

    def flush(self, rest: str, cut: bool) -> str:
        self._held, self._cut = rest, cut
        while not (self.failed or self.ended) and self._state(True):
            pass
        out, self._out = self._out, ""
        return out

    # The states, as in AnswerParser.

    def _open(self, final: bool) -> bool:
        rest = self._held.lstrip()
        if rest.startswith(FUNCTION):
            self._held = rest[len(FUNCTION) :]
            self._state = self._read_name
            return True
        self.failed = final or not FUNCTION.startswith(rest)
        return False

    def _read_name(self, final: bool) -> bool:
        name = self._read_to_bracket(final)
        if not name:
            return False
        self.name = name
        self._schema = self._schemas.get(name, {})
        self._state = self._read_body
        return True

    def _read_to_bracket(self, final: bool) -> str:
        """The name up to ``>``; "" where it is not there yet, or there is none."""
        end = self._held.find(">", 0, MAX_NAME)
        name = self._held[:end].strip() if end >= 0 else ""
        if end >= 0 and name and "\n" not in self._held[:end].strip() and "<" not in name:
            self._held = self._held[end + 1 :]
            return name
        self.failed = end >= 0 or final or len(self._held) >= MAX_NAME
        return ""

    def _read_body(self, final: bool) -> bool:
        """Between parameters; what is no tag there is left out."""
        place = self._held.find("<")
        rest = self._held[place:] if place >= 0 else ""
        for tag, state in ((PARAMETER, self._read_key), (END_FUNCTION, None), (_END_CALL, None)):
            if rest.startswith(tag):
                self._held = rest[len(tag) :] if tag != _END_CALL else rest
                return self._end() if state is None else self._go(state)
            if rest and not final and tag.startswith(rest):
                return False
        if rest:
            self._held = rest[1:]
            return True
        self._held = ""
        return self._end() if final else False

    def _go(self, state: Callable[[bool], bool]) -> bool:
        self._state = state
        return True

    def _end(self) -> bool:
        """The call is over; where the answer was cut off, parameters may be missing."""
        self.complete = not self._cut
        self.ended = True
        self._out += "}" if self._keys else "{}"
        return False

    def _read_key(self, final: bool) -> bool:
        key = self._read_to_bracket(final)
        if not key:
            return False
        self._skips = key in self._keys  # of two values for one parameter the first holds
        self._type = self._type_of(key)
        if not self._skips:
            self._out += f"{', ' if self._keys else '{'}{_dumps(key)}: "
            self._out += '"' if self._type == "string" else ""
            self._keys.add(key)
        self._value, self._begins = "", True
        return self._go(self._read_value)

    def _read_value(self, final: bool) -> bool:
        """One line break at either end belongs to the form."""
        if self._begins and self._held:
            self._held = self._held.removeprefix("\n")
            self._begins = False
        found = [place for tag in _ENDS_OF_VALUE if (place := self._held.find(tag)) >= 0]
        if found:
            place = min(found)
            self._take(self._held[:place].removesuffix("\n"))
            self._held = self._held[place:].removeprefix(END_PARAMETER)
            self._end_value()
            return self._go(self._read_body)
        if final:
            self._take(self._held.removesuffix("\n"))
            self._held = ""
            if self._cut:
                self.failed = True  # half a value: what was given out stays, and is not an object
                return False
            self._end_value()
            return self._go(self._read_body)
        keep = _open_end(self._held)
        self._take(self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]
        return False

    def _take(self, text: str) -> None:
        if self._skips:
            return
        if self._type == "string":
            self._out += _dumps(text)[1:-1]
        else:
            self._value += text

    def _end_value(self) -> None:
        if not self._skips:
            self._out += '"' if self._type == "string" else _dumps(convert(self._value, self._type))

    def _type_of(self, key: str) -> str:
        properties = self._schema.get("properties")
        return type_of(properties.get(key) if isinstance(properties, Mapping) else None, self._schema)


def _open_end(text: str) -> int:
    """Length of the end of ``text`` that may belong to the end of a value: a line break, a part of a tag."""
    sizes = [size for tag in _ENDS_OF_VALUE for size in range(1, len(tag)) if text.endswith(tag[:size])]
    size = max(sizes, default=0)
    return size + text[: len(text) - size].endswith("\n")


def type_of(schema: Any, root: Mapping[str, Any]) -> str:
    """The type that a JSON schema asks for, the first that is not null; "string" where it does not say."""
    for _ in range(MAX_REFERENCES):
        if not isinstance(schema, Mapping):
            return "string"
        if isinstance(reference := schema.get("$ref"), str):
            schema = _resolve(reference, root)
            continue
        kinds = schema.get("type")
        named = [kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if isinstance(kind, str)]
        if named:
            return next((kind for kind in named if kind != "null"), "null")
        options = schema.get("anyOf") or schema.get("oneOf")
        if not isinstance(options, list):
            return "string"
        schema = next((o for o in options if isinstance(o, Mapping) and o.get("type") != "null"), None)
    return "string"


def _resolve(reference: str, root: Mapping[str, Any]) -> Any:
    """What a reference within the same schema stands for; others are not followed."""
    value: Any = root
    for step in reference.removeprefix("#/").split("/") if reference.startswith("#/") else [""]:
        value = value.get(step) if isinstance(value, Mapping) else None
    return value


def convert(text: str, kind: str) -> Any:
    """A value of the type ``kind`` from its text, or the text itself where it is none."""
    plain = text.strip()
    if plain.lower() in ("null", "none"):
        return None
    if kind == "boolean":
        return {"true": True, "false": False}.get(plain.lower(), text)
    if kind == "integer":
        return int(plain) if _INTEGER.fullmatch(plain) else text
    if kind == "number":
        return _number(plain, text)
    try:
        return parse_json(text)
    except ValueError:
        return text


def _number(plain: str, text: str) -> int | float | str:
    if _INTEGER.fullmatch(plain):
        return int(plain)
    try:
        value = float(plain)
    except ValueError:
        return text
    return value if math.isfinite(value) and "_" not in plain else text


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
