"""Tool calls as Mistral's models write them.

::

    [TOOL_CALLS] [{"name": NAME, "arguments": {...}}]
    [TOOL_CALLS]NAME[ARGS]{...}                        in newer models, maybe with [CALL_ID]ID before [ARGS]
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from godwit.dialect.json_calls import JsonCall

#: The ids of calls that the templates of these models take.
_ID = re.compile(r"[A-Za-z0-9]{9}")
_LIST = re.compile(r"\s*\[?\s*")
_NAME = re.compile(r"\s*([\w.:/-]+)\s*(?:\[CALL_ID\]\s*\w+)?\s*(?:\[ARGS\])?\s*")
#: What may become one of these.
_HEAD = re.compile(r"\s*\[?\s*|\s*[\w.:/-]{1,256}\s*(\[[A-Z_]{0,8}(\]\s*\w{0,64}\s*)?){0,2}")


class MistralCall:
    """Reads the call behind ``[TOOL_CALLS]``, of a list the first.

    See :class:`~godwit.dialect.reader.CallReader`.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.failed = self.ended = self.complete = False
        self._head = ""
        self._json: JsonCall | None = None
        self._named = False

    def push(self, text: str) -> tuple[int, str]:
        out = ""
        for used, character in enumerate(text):
            if self._json is None and not self._begin(character):
                return used, out
            if self._json is not None:
                taken, part = self._json.push(character)
                out += part
                self._follow(self._json)
                if self.failed or self.ended:
                    return used + taken, out
        return len(text), out

    def flush(self, rest: str) -> str:
        if self._json is not None:
            self._json.flush(rest)
            self._follow(self._json)
        self.failed |= not self.ended
        return ""

    def _begin(self, character: str) -> bool:
        """Take a character in front of the JSON, or begin to read that; False where it cannot be."""
        named = _NAME.fullmatch(self._head)
        if character != "{":
            self._head += character
            self.failed = _HEAD.fullmatch(self._head) is None
        elif named is not None or _LIST.fullmatch(self._head):
            self._named = named is not None
            self._json = JsonCall()
            if named is not None:
                self._json.push(f'{{"name": {json.dumps(named[1])}, "arguments": ')
        else:
            self.failed = True
        return not self.failed

    def _follow(self, call: JsonCall) -> None:
        self.name, self.failed, self.complete = call.name, call.failed, call.complete
        self.ended = call.ended or (self._named and call.complete)


def with_short_ids(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages in which the ids of calls are as short as the templates of these models want them."""
    result = []
    for message in messages:
        message = dict(message)
        if isinstance(id := message.get("tool_call_id"), str):
            message["tool_call_id"] = _short(id)
        if isinstance(calls := message.get("tool_calls"), list):
            message["tool_calls"] = [{**call, "id": _short(str(call.get("id")))} for call in calls]
        result.append(message)
    return result


def _short(id: str) -> str:
    return id if _ID.fullmatch(id) else hashlib.sha256(id.encode(errors="replace")).hexdigest()[:9]
