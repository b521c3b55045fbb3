"""Tool calls as JSON, ``{"name": ..., "arguments": {...}}``: their reader, and a grammar of them.

Hermes and Qwen put them between tags. Llama 3 writes them bare, with ``parameters`` instead of ``arguments``,
sometimes after ``<|python_tag|>``, and separates them by ``;``.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from typing import Any, Literal

from godwit.dialect.dialect import SPACE
from godwit.dialect.lark import json_rule, quoted
from godwit.dialect.strict_json import object_text, parse_json
from godwit.dialect.tags import ARGUMENTS, FIRST_KEYS

_CLOSERS = {"{": "}", "[": "]"}
#: Characters of JSON outside of strings.
_PLAIN = frozenset(SPACE + "{}[],:+-.0123456789eEtrufalsn")
#: First characters of a value.
_STARTS = frozenset('{["-0123456789tfn')
#: Characters that may follow a backslash, and how control characters are escaped.
_ESCAPES = frozenset('"\\/bfnrtu')
_CONTROLS = {"\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}

JsonPlace = Literal["start", "key or end", "key", "colon", "value", "comma or end"]


class JsonCall:
    """Reads one call, character by character; see :class:`~godwit.dialect.dialect.CallReader`.

    Once the name is known, arguments are returned as they come. Arguments before the name are held back until
    then, and so are arguments written as JSON within a JSON string, as some models do. Control characters and
    backslashes that JSON does not allow in strings are returned escaped.

    Args:
        names: of the tools; given where only a known name and arguments distinguish a call from other JSON.
    """

    def __init__(self, names: Container[str] | None = None) -> None:
        self._names = names
        self._num_keys = 0
        self.name: str | None = None
        self.failed = self.ended = self.complete = False
        self._place: JsonPlace = "start"
        self._key = ""
        self._name: str | None = None
        self._part = ""  # the current key or value
        self._stack: list[str] = []  # closing brackets still to come
        self._quoted = self._escaped = False
        self._arguments: str | None = None  # a whole object, held until the name is known
        self._streams = False

    def push(self, text: str) -> tuple[int, str]:
        out = ""
        for used, character in enumerate(text):
            out += self._read(character)
            if self.failed:  # this character is not part of the call
                return used, out
            if self.ended:
                return used + 1, out
        return len(text), out

    def flush(self, rest: str) -> str:
        """A call that ends after its arguments is whole."""
        self.ended = self.complete
        self.failed = not self.complete
        return ""

    def _read(self, character: str) -> str:
        if self._part:
            return self._read_part(character)
        if character in SPACE:
            return ""
        place = self._place
        if place == "start" and character == "{":
            self._place = "key or end"
        elif place == "colon" and character == ":":
            self._place = "value"
        elif place == "comma or end" and character == ",":
            self._place = "key"
        elif place in ("key or end", "comma or end") and character == "}":
            return self._close()
        elif place == "value" or (place in ("key", "key or end") and character == '"'):
            return self._begin_part(character)
        else:
            self.failed = True
        return ""

    def _begin_part(self, character: str) -> str:
        if character not in _STARTS:
            self.failed = True
            return ""
        self._part = character
        self._quoted = character == '"'
        self._stack = [_CLOSERS[character]] if character in _CLOSERS else []
        expected = self._place == "value" and self._key in ARGUMENTS and self.name is None
        self._streams = expected and self._name is not None and character == "{"
        if not self._streams:
            return ""
        self.name = self._name
        return character

    def _read_part(self, character: str) -> str:
        if not (self._quoted or self._stack) and character in SPACE + ",}":
            return self._end_part() + ("" if self.failed else self._read(character))
        if not self._quoted and character not in _PLAIN and character != '"':
            self.failed = True  # what was returned so far is not an object
            return ""
        written = self._repaired(character) if self._quoted else character
        self._part += written
        out = written if self._streams else ""
        if self._quoted:
            whole = self._ends_string(character) and not self._stack
        else:
            self._quoted = character == '"'
            whole = self._ends_brackets(character)
        return out + (self._end_part() if whole else "")

    def _repaired(self, character: str) -> str:
        """A character of a string as valid JSON; a backslash is held until the next character."""
        if self._escaped and character in _ESCAPES:
            return "\\" + character
        if character < " ":
            return _CONTROLS.get(character) or f"\\u{ord(character):04x}"
        if self._escaped:
            return character if character == "'" else f"\\\\{character}"
        return "" if character == "\\" else character

    def _ends_string(self, character: str) -> bool:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._quoted = False
            return True
        return False

    def _ends_brackets(self, character: str) -> bool:
        if character in _CLOSERS:
            self._stack.append(_CLOSERS[character])
        elif character in "]}":
            if not self._stack or self._stack.pop() != character:
                self.failed = True
                return False
            return not self._stack
        return False

    def _end_part(self) -> str:
        part, self._part = self._part, ""
        try:
            value = parse_json(part)
        except ValueError:
            self.failed = True
            return ""
        if self._place != "value":
            self._key, self._place = value, "colon"
            self._num_keys += 1
            self.failed = self._names is not None and self._num_keys == 1 and value not in FIRST_KEYS
            return ""
        self._place = "comma or end"
        if self._key == "name":
            return self._take_name(value)
        if self._key in ARGUMENTS:
            return self._take_arguments(value, part)
        return ""

    def _take_name(self, value: object) -> str:
        known = self._names is None or value in self._names
        if not isinstance(value, str) or not value or not known or self._name is not None:
            self.failed = True
            return ""
        self._name = value
        return self._give_whole(self._arguments) if self._arguments is not None else ""

    def _take_arguments(self, value: object, part: str) -> str:
        if self._streams:
            self._streams = False
            self.complete = True
            return ""
        nothing = value is None or (isinstance(value, str) and not value.strip())
        text = "{}" if nothing else object_text(value if isinstance(value, str) else part)
        if self.complete or self._arguments is not None or text is None:
            self.failed = True
            return ""
        if self._name is not None:
            return self._give_whole(text)
        self._arguments = text
        return ""

    def _give_whole(self, arguments: str) -> str:
        self.name = self._name
        self.complete = True
        return arguments

    def _close(self) -> str:
        if self._name is None or (self._names is not None and not self.complete):
            self.failed = True
            return ""
        self.ended = True
        return "" if self.name is not None else self._give_whole("{}")


def json_call(rule: str, name: str, parameters: Mapping[str, Any], key: str = "arguments") -> list[str]:
    """The grammar of such a call: rules, the first of which is called ``rule``."""
    head = quoted(f'{{"name": {json.dumps(name)}, "{key}": ')
    arguments = f"{rule}_arguments: {json_rule(parameters, lenient=True)}"
    return [f'{rule}: {head} {rule}_arguments "}}"', arguments]
