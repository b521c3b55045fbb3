"""Tool calls as Mistral's models write them.

::

    [TOOL_CALLS] [{"name": NAME, "arguments": {...}}]
    [TOOL_CALLS]NAME[ARGS]{...}                        newer models, sometimes with [CALL_ID]ID before [ARGS]
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from godwit.dialect.dialect import Dialect
from godwit.dialect.fences import text_rules
from godwit.dialect.grammar import CallGrammar, Mark, up_to
from godwit.dialect.json_calls import JsonCall, json_call
from godwit.dialect.lark import json_rule, quoted
from godwit.dialect.tags import ARGS, TOOL_CALLS

#: Call ids that these models' templates accept.
_ID = re.compile(r"[A-Za-z0-9]{9}")
_LIST = re.compile(r"\s*\[?\s*")
_NAME = re.compile(r"\s*([\w.:/-]+)\s*(?:\[CALL_ID\]\s*\w+)?\s*(?:\[ARGS\])?\s*")
#: What may become ``_LIST`` or ``_NAME``.
_HEAD = re.compile(r"\s*\[?\s*|\s*[\w.:/-]{1,256}\s*(\[[A-Z_]{0,8}(\]\s*\w{0,64}\s*)?){0,2}")


class MistralCall:
    """Reads the call after ``[TOOL_CALLS]``, the first one of a list.

    See :class:`~godwit.dialect.dialect.CallReader`.
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
        """Read a character before the JSON, or start reading it; False if it does not fit."""
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


class MistralCalls(CallGrammar):
    """The grammar of Mistral's calls.

    Args:
        named: calls are written ``NAME[ARGS]{...}``.
    """

    def __init__(self, *, named: bool) -> None:
        self._named = named

    def call(
        self, rule: str, name: str, parameters: Mapping[str, Any], mark: Mark, *, beside_json: bool
    ) -> list[str]:
        if not self._named:
            return json_call(rule, name, parameters)
        return [
            f"{rule}: {quoted(name)} {mark(ARGS)} {rule}_arguments",
            f"{rule}_arguments: {json_rule(parameters, lenient=True)}",
        ]

    def calls(self, more: int, mark: Mark) -> str:
        return self._several(more, mark, mark(TOOL_CALLS))

    def text_and_calls(self, more: int, names: Sequence[str], mark: Mark) -> tuple[str, list[str]]:
        literal = mark(TOOL_CALLS)
        start, rest = f"free? {literal}", ["free: FREE", *text_rules()]
        if literal.startswith('"'):  # not a special token, so text could hold it
            start, rest = (
                "opener",
                [
                    f"opener[suffix={literal}]: FREE",
                    *text_rules(r"[^\n]*\[TOOL_CALLS\][^\n]*"),
                ],
            )
        return "calls | rest", [f"calls: {self._several(more, mark, start)}", *rest, "rest: REST"]

    def _several(self, more: int, mark: Mark, start: str) -> str:
        if self._named:
            return f"{start} body" + up_to(more, f"{mark(TOOL_CALLS)} body")
        others = up_to(more, '", " body')
        return f'{start} " "? "[" body{others} "]"'


MISTRAL = Dialect(
    name="mistral",
    written_in=lambda template: TOOL_CALLS in template,
    reader=lambda opener, schemas: JsonCall() if opener == "{" else MistralCall(),
    grammar=MistralCalls(named=False),
    openers=(TOOL_CALLS,),
    chains=True,
    short_ids=True,
)
MISTRAL_ARGS = replace(
    MISTRAL,
    name="mistral_args",
    written_in=lambda template: TOOL_CALLS in template and ARGS in template,
    grammar=MistralCalls(named=True),
)


def with_short_ids(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages with call ids that these models' templates accept."""
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
