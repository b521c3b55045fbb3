"""The grammar of calls between ``<tool_call>`` tags, whatever stands between these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from godwit.dialect.fences import text_rules
from godwit.dialect.grammar import CallGrammar, Mark, alternatives, up_to
from godwit.dialect.lark import quoted
from godwit.dialect.tags import CALL, END_CALL

_OPENER, _CLOSER = quoted(f"{CALL}\n"), quoted(f"\n{END_CALL}")


class TaggedCalls(CallGrammar):
    """See the module.

    Args:
        body: the rules of what stands between the tags, by the name of the first rule.
        bare: a tag with which, before the name of a tool, the reader takes a line for a call without
            ``<tool_call>``; so free text must not have it.
    """

    def __init__(
        self, body: Callable[[str, str, Mapping[str, Any]], list[str]], bare: str | None = None
    ) -> None:
        self._body = body
        self._bare = bare

    def call(
        self, rule: str, name: str, parameters: Mapping[str, Any], mark: Mark, *, beside_json: bool
    ) -> list[str]:
        return self._body(rule, name, parameters)

    def calls(self, more: int, mark: Mark) -> str:
        call = f"{_OPENER} body {_CLOSER}"
        return call + up_to(more, f'"\\n" {call}')

    def text_and_calls(self, more: int, names: Sequence[str], mark: Mark) -> tuple[str, list[str]]:
        refused = f"[^\\n]*{CALL}[^\\n]*"
        if self._bare is not None:
            refused += f"|{self._bare}({alternatives(names)})>[^\\n]*"
        return f"call{{0,{more + 1}}} rest", [
            *text_rules(refused),
            f"opener[suffix={quoted(CALL)}]: FREE",
            f'call: opener "\\n" body {_CLOSER}',
            "rest: REST",
        ]
