"""Tool calls as tags, in the form of Qwen3-Coder. The values are text; the tool's schema says their types.

::

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

The grammar of forced calls writes exactly this, with values in which :meth:`XmlCall._ends_value` finds no
end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from godwit.engine.constraint_calls import (
    CALL,
    END_CALL,
    END_FUNCTION,
    END_PARAMETER,
    FUNCTION,
    PARAMETER,
    TAG_NAME,
)
from godwit.engine.constraint_schema import members
from godwit.engine.stop_matcher import open_end
from godwit.server.values import is_text, read_value

MAX_NAME = 258
_SPACE = " \t\r\n"
_OPEN_PARAMETER = PARAMETER.removesuffix("=")
_TAGS = (END_PARAMETER, PARAMETER, END_FUNCTION, END_CALL)
_TAG = re.compile("|".join(map(re.escape, _TAGS)))
_ESCAPED = re.compile(r"\\.", re.DOTALL)
_SAME_OBJECT = ("allOf", "anyOf", "oneOf")
#: Whether a tag ends a value: it does, it is a part of it, or more text has to tell.
Verdict = Literal["end", "text", "wait"]


class XmlCall:
    """Reads one call; see :class:`~godwit.server.calls.CallReader`.

    Values that are texts are given out as they come, others when they are whole. Only parameters that the
    tool knows count. A closing tag may be missing where the next line goes on with another parameter.

    Args:
        schemas: the parameters of each tool, by its name.
        opened: ``<function=`` is read already, without ``<tool_call>``: only a known name makes that a call.
    """

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]], *, opened: bool = False) -> None:
        self.name: str | None = None
        self.failed = self.ended = self.complete = False
        self._schemas = schemas
        self._bare = opened
        self._schema: Mapping[str, Any] = {}
        self._known: dict[str, Any] = {}
        self._open = True  # parameters that the schema does not name are taken as texts
        self._state: Callable[[bool], bool] = self._read_name if opened else self._read_opening
        self._held = ""
        self._out = ""
        self._keys: set[str] = set()
        self._key = ""
        self._value: str | None = None  # of the parameter that is read; None: it is given out as it comes
        self._skips = self._fresh = False
        self._depth = 0  # parameters that the value itself seems to open

    def push(self, text: str) -> tuple[int, str]:
        return self._run(text, final=False)

    def flush(self, rest: str) -> str:
        return self._run(rest, final=True)[1]

    def _run(self, text: str, *, final: bool) -> tuple[int, str]:
        self._held = text
        while not (self.failed or self.ended) and self._state(final):
            pass
        self.failed |= final and not self.ended
        out, self._out = self._out, ""
        return len(text) - len(self._held), out

    # The states, as in AnswerParser.

    def _read_opening(self, final: bool) -> bool:
        rest = self._held.lstrip(_SPACE)
        if rest.startswith(FUNCTION):
            self._held = rest[len(FUNCTION) :]
            return self._go(self._read_name)
        self.failed = final or not FUNCTION.startswith(rest)
        return False

    def _read_name(self, final: bool) -> bool:
        """A name, and behind it what a call goes on with."""
        name, rest = _named(self._held, final)
        if name is None:
            return False
        follower = _tag_at(rest, (_OPEN_PARAMETER, END_FUNCTION, *(() if self._bare else (END_CALL,))), final)
        self.failed = not name or follower is None or (self._bare and name not in self._schemas)
        if not follower or self.failed:
            return False
        self.name, self._held = name, rest
        if name in self._schemas:
            self._learn(self._schemas[name])
        return self._go(self._read_body)

    def _learn(self, schema: Mapping[str, Any]) -> None:
        parts = members(schema, schema, _SAME_OBJECT)
        said = [part["properties"] for part in parts if isinstance(part.get("properties"), Mapping)]
        self._schema = schema
        self._known = {key: value for properties in said for key, value in properties.items()}
        more = any(part.get("additionalProperties") not in (None, False) for part in parts)
        closed = any(part.get("additionalProperties") is False for part in parts)
        self._open = more or any("patternProperties" in part for part in parts) or not (said or closed)

    def _knows(self, key: str) -> bool:
        return self._open or key in self._known

    def _read_body(self, final: bool) -> bool:
        """Between parameters; what is no tag there is left out."""
        place = self._held.find("<")
        self._held = self._held[place:] if place >= 0 else ""
        tag = _tag_at(self._held, (_OPEN_PARAMETER, END_FUNCTION, END_CALL), final) if self._held else ""
        if tag == "":
            return False
        if tag is None:
            self._held = self._held[1:]
            return True
        if tag == _OPEN_PARAMETER:
            return self._go(self._read_key)
        self._held = self._held.removeprefix(END_FUNCTION)
        self._out += "}" if self._keys else "{}"
        self.ended = self.complete = True
        return False

    def _go(self, state: Callable[[bool], bool]) -> bool:
        self._state = state
        return True

    def _read_key(self, final: bool) -> bool:
        """A parameter that is malformed, unknown or there already is read like others, and left out."""
        key, rest = _key_at(self._held, final)
        if key is None:
            return False
        self._held = rest if key else self._held[len(_OPEN_PARAMETER) :]
        self._key, self._depth = key, 0
        self._skips = not key or key in self._keys or not self._knows(key)
        self._value = None if is_text(self._known.get(key), self._schema) else ""
        if not self._skips:
            quote = '"' if self._value is None else ""
            self._out += f"{', ' if self._keys else '{'}{_dumps(key)}: {quote}"
            self._keys.add(key)
        return self._go(self._begin_value)

    def _begin_value(self, final: bool) -> bool:
        """One line break at either end of a value belongs to the form."""
        if not self._held:
            return False
        self._held = self._held.removeprefix("\n")
        self._fresh = True
        return self._go(self._read_value)

    def _read_value(self, final: bool) -> bool:
        ready = len(self._held) - open_end(self._held, _TAGS)
        for found in _TAG.finditer(self._held):
            place, tag = found.start(), found[0]
            verdict = self._ends_value(tag, place, final)
            if verdict == "end":
                self._take(place - self._held[:place].endswith("\n"))
                self._held = self._held.removeprefix("\n").removeprefix(END_PARAMETER)
                self._end_value()
                return self._go(self._read_body)
            if verdict == "wait":
                ready = place
                break
            self._depth += {PARAMETER: 1, END_PARAMETER: -1}.get(tag, 0)
            ready = max(ready, found.end())
        self._take(ready - self._held[:ready].endswith("\n"))
        return False

    def _ends_value(self, tag: str, place: int, final: bool) -> Verdict:
        line = self._held[place - 1] == "\n" if place else self._fresh
        rest = self._held[place + len(tag) :]
        if self._value is not None and not line and _in_string(self._value + self._held[:place]):
            return "text"
        if tag == END_PARAMETER:
            return self._ends_at_closer(rest, line, final)
        if tag == END_CALL:
            return "end" if line else "text"
        if tag == END_FUNCTION:
            follower = _tag_at(rest, (END_CALL, CALL, FUNCTION), final)
            if follower is None:
                return "end" if line and final and not rest.strip(_SPACE) else "text"
            return "wait" if not follower else "end" if line or follower == END_CALL else "text"
        key, _ = _named(rest, final) if line else ("", "")
        return "wait" if key is None else "end" if key and self._goes_on_with(key) else "text"

    def _goes_on_with(self, key: str) -> bool:
        return self._knows(key) and key not in self._keys and key != self._key

    def _ends_at_closer(self, rest: str, line: bool, final: bool) -> Verdict:
        follower = _tag_at(rest, (_OPEN_PARAMETER, END_FUNCTION, END_CALL), final)
        if not follower:
            at_end = final and not rest.strip(_SPACE)
            return "wait" if follower == "" else "end" if at_end else "text"
        if follower != _OPEN_PARAMETER:
            return "end"
        bare = rest.lstrip(_SPACE)
        key, _ = _key_at(bare, final)
        if key is None:
            return "wait"
        if key and self._knows(key):
            return "end"
        # An unknown parameter counts as one only where the layout is that of a call; else it is prose.
        own_line = line and "\n" in rest[: len(rest) - len(bare)]
        return "end" if own_line and self._depth <= 0 else "text"

    def _take(self, size: int) -> None:
        text, self._held = self._held[:size], self._held[size:]
        if not text:
            return
        self._fresh = False
        if self._skips:
            return
        if self._value is None:
            self._out += _dumps(text)[1:-1]
        else:
            self._value += text

    def _end_value(self) -> None:
        if self._skips:
            return
        if self._value is None:
            self._out += '"'
        else:
            self._out += _dumps(read_value(self._value, self._known.get(self._key), self._schema))


def _tag_at(text: str, tags: Sequence[str], final: bool) -> str | None:
    """Which of the tags comes next, blanks aside; "" where it is not certain yet, None for none of them."""
    rest = text.lstrip(_SPACE)
    for tag in tags:
        if rest.startswith(tag):
            return tag
    return "" if not final and any(tag.startswith(rest) for tag in tags) else None


def _named(text: str, final: bool) -> tuple[str | None, str]:
    """The name up to ``>`` and what follows; None where it is not complete yet, "" where there is none."""
    end = text.find(">", 0, MAX_NAME)
    raw = text[:end] if end >= 0 else text
    name = raw.strip()
    if end >= 0:
        return (name, text[end + 1 :]) if TAG_NAME.fullmatch(name) else ("", text)
    over = final or len(text) >= MAX_NAME or "<" in raw or "\n" in raw.lstrip()
    return "" if over else None, text


def _key_at(text: str, final: bool) -> tuple[str | None, str]:
    """The same of a parameter, from its ``<parameter`` on."""
    if text.startswith(PARAMETER):
        return _named(text[len(PARAMETER) :], final)
    return "" if final or len(text) > len(_OPEN_PARAMETER) else None, text


def _in_string(text: str) -> bool:
    """Whether JSON that begins like this is within a string."""
    if not text.lstrip(_SPACE).startswith(("{", "[", '"')):
        return False
    return _ESCAPED.sub("", text).count('"') % 2 == 1


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
