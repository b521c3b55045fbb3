"""Grammars of tool calls: what all dialects have in common.

What a dialect's grammar lets through, its reader reads back as the value that was meant.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from godwit.dialect.lark import GrammarRule, ThinkingBefore, quoted, whole
from godwit.dialect.schema import NO_PARAMETERS, prepared
from godwit.errors import UsageError

#: A model that makes more calls in one answer is going in circles.
MAX_CALLS = 16

_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,256}")
#: Writes a tag, which may be a special token, as a part of a grammar.
Mark = Callable[[str], str]


class CallGrammar(ABC):
    """The grammar of one dialect's calls; :func:`call_grammar` adds a rule ``body``: any one call."""

    @abstractmethod
    def call(
        self, rule: str, name: str, parameters: Mapping[str, Any], mark: Mark, *, beside_json: bool
    ) -> list[str]:
        """The rules of one call of a tool, the first of which is called ``rule``.

        ``beside_json``: an answer without calls is JSON, too.
        """

    @abstractmethod
    def calls(self, more: int, mark: Mark) -> str:
        """An expression for one call and up to ``more`` others, with the tags around each ``body``."""

    @abstractmethod
    def text_and_calls(self, more: int, names: Sequence[str], mark: Mark) -> tuple[str, list[str]]:
        """An expression for text, with or without such calls, and its rules. The reader finds no other calls.

        ``names``: of the tools.
        """


def up_to(more: int, expression: str) -> str:
    """Up to ``more`` times the expression."""
    return f" ({expression}){{0,{more}}}" if more else ""


def alternatives(names: Sequence[str]) -> str:
    """A regular expression for one of the names."""
    return "|".join(re.escape(name).replace("/", r"\/") for name in names)


def call_grammar(
    tools: Sequence[Mapping[str, Any]],
    choice: str,
    *,
    parallel: bool,
    grammar: CallGrammar,
    thinking: ThinkingBefore,
    otherwise: GrammarRule | None,
    mark: Mark = quoted,
) -> str:
    """Calls of tools; see :meth:`~godwit.engine.constraint.constraints.Constraints.tool_calls`.

    Raises:
        UsageError: a tool cannot be used, or there is none to call.
    """
    functions = dict(map(_function, tools))
    if choice not in ("auto", "required"):
        functions = {name: parameters for name, parameters in functions.items() if name == choice}
    if not functions:
        raise UsageError("there is no such tool to call")
    rules: list[str] = []
    beside_json = otherwise is not None and otherwise.text.startswith("%json")
    for index, (name, parameters) in enumerate(functions.items()):
        rules += grammar.call(f"call{index}", name, parameters, mark, beside_json=beside_json)
    rules.append("body: " + " | ".join(f"call{index}" for index in range(len(functions))))
    more = (MAX_CALLS if parallel else 1) - 1
    what = "a tool's schema"
    if choice == "auto" and otherwise is None:
        text, free = grammar.text_and_calls(more, list(functions), mark)
        return whole(GrammarRule(text, what), [*rules, *free], thinking=thinking)
    rules.append(f"calls: {grammar.calls(more, mark)}")
    if choice != "auto" or otherwise is None:
        return whole(GrammarRule("calls", what), rules, thinking=thinking)
    rules.append(f"other: {otherwise.text}")
    return whole(GrammarRule("calls | other", what, otherwise.inner), rules, thinking=thinking)


def _function(tool: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and parameters of a tool, with or without OpenAI's wrapper around it."""
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError("a tool needs a name of letters, digits, '_', '-', '.', ':' and '/'")
    parameters = function.get("parameters") or NO_PARAMETERS
    if not isinstance(parameters, Mapping):
        raise UsageError(f"the parameters of the tool {name} have to be a JSON schema")
    return name, prepared({**parameters, "type": "object"})
