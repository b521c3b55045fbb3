"""Tool calls of Llama 3: bare JSON with ``parameters``, sometimes after ``<|python_tag|>``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from godwit.dialect.dialect import Dialect
from godwit.dialect.grammar import CallGrammar, Mark, up_to
from godwit.dialect.json_calls import JsonCall, json_call
from godwit.dialect.lark import json_rule
from godwit.dialect.schema import DEFINITIONS
from godwit.dialect.tags import CALL, FIRST_KEYS, PYTHON_TAG, TOOL_CALLS

_PARAMETERS_KEY = re.compile(r"""\\?["']parameters\\?["']\s*:""")
#: What the reader may take for the beginning of a call. Free text must not have it, not even in fenced code:
#: following this expression and fences together would exceed the grammar library's limits.
_BEGIN = (
    r"((?s:.*\n)?|(?s:.*)<\|python_tag\|>[ \t\r\n]*)"
    rf"\{{[ \t\r\n]*\"({'|'.join(FIRST_KEYS)})\"(?s:.*)"
)


class LlamaCalls(CallGrammar):
    """The grammar of Llama's calls."""

    def call(
        self, rule: str, name: str, parameters: Mapping[str, Any], mark: Mark, *, beside_json: bool
    ) -> list[str]:
        if beside_json:  # llguidance needs both of two rules that begin alike to be JSON
            return [f"{rule}: {json_rule(_as_json(name, parameters), lenient=True)}"]
        return json_call(rule, name, parameters, "parameters")

    def calls(self, more: int, mark: Mark) -> str:
        return "body" + up_to(more, '"; " body')

    def text_and_calls(self, more: int, names: Sequence[str], mark: Mark) -> tuple[str, list[str]]:
        rules = [f"calls: {self.calls(more, mark)}", "rest: REST", f"REST: /(?s:.*)/ & ~/{_BEGIN}/"]
        return "calls | rest", rules


def _as_json(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    shared = {key: parameters[key] for key in DEFINITIONS if key in parameters}
    properties = {"name": {"const": name}, "parameters": parameters}
    return {**shared, "type": "object", "properties": properties, "required": ["name", "parameters"]}


def _written_in(template: str) -> bool:
    tagged = CALL in template or TOOL_CALLS in template
    return not tagged and "name" in template and _PARAMETERS_KEY.search(template) is not None


LLAMA = Dialect(
    name="llama",
    written_in=_written_in,
    reader=lambda opener, schemas: JsonCall(schemas),
    grammar=LlamaCalls(),
    openers=(PYTHON_TAG,),
    line_openers=("{",),
    chains=True,
)
