"""Tool calls as grammars, in each of the dialects in which models write them.

The readers of the same dialects are in the server. What a grammar here lets through they read back as the
value that was meant; so what both have to agree on is defined here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from godwit.dialect.lark import Rule, Thinking, json_rule, quoted, whole
from godwit.dialect.schema import NO_PARAMETERS, kinds, members, prepared
from godwit.dialect.tags import (
    ARGS,
    CALL,
    END_CALL,
    END_FUNCTION,
    END_PARAMETER,
    FIRST_KEYS,
    FUNCTION,
    PARAMETER,
    TAG_NAME,
    TOOL_CALLS,
)
from godwit.dialect.text_patterns import ANY, WITH_END, text_expression
from godwit.errors import UsageError

#: "hermes", "xml": JSON, or Qwen3-Coder's tags, in ``<tool_call>``. "llama": Llama 3's bare JSON.
#: "mistral", "mistral_args": behind ``[TOOL_CALLS]`` a list of JSON, or a name, ``[ARGS]`` and JSON.
CallForm = Literal["hermes", "xml", "llama", "mistral", "mistral_args"]

#: More calls in one answer are a model that goes round in circles.
MAX_CALLS = 16

_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,256}")
_DEFINITIONS = ("$defs", "definitions")
#: What a list of tags cannot show to hold of the parameters as a whole.
_OF_THE_WHOLE = (
    "anyOf", "oneOf", "not", "if", "dependentRequired", "dependentSchemas", "minProperties", "maxProperties",
)  # fmt: skip


def call_grammar(
    tools: Sequence[Mapping[str, Any]],
    choice: str,
    *,
    parallel: bool,
    form: CallForm,
    thinking: Thinking,
    otherwise: Rule | None,
    mark: Callable[[str], str] = quoted,
) -> str:
    """Calls of tools; see :meth:`~godwit.engine.constraint.constraints.Constraints.tool_calls`.

    ``mark`` says how a mark of calls, which may be a special token, stands in a grammar.

    Raises:
        UsageError: a tool cannot be used, or there is none to call.
    """
    functions = [_function(tool) for tool in tools]
    if choice not in ("auto", "required"):
        functions = [function for function in functions if function[0] == choice]
    if not functions:
        raise UsageError("there is no such tool to call")
    rules: list[str] = []
    beside_json = otherwise is not None and otherwise.text.startswith("%json")
    for index, (name, parameters) in enumerate(functions):
        if form == "llama" and beside_json:  # of two rules that begin alike, both have to be JSON
            rules.append(f"call{index}: {json_rule(_as_json(name, parameters), lenient=True)}")
        else:
            rules += _call(f"call{index}", name, parameters, form, mark)
    rules.append("body: " + " | ".join(f"call{index}" for index in range(len(functions))))
    more = (MAX_CALLS if parallel else 1) - 1
    what = "a tool's schema"
    if choice == "auto" and otherwise is None:
        names = "|".join(re.escape(name).replace("/", r"\/") for name, _ in functions)
        text, free = _text_and_calls(form, more, names, mark)
        return whole(Rule(text, what), [*rules, *free], thinking=thinking)
    rules.append(f"calls: {_several(form, more, mark)}")
    if choice != "auto" or otherwise is None:
        return whole(Rule("calls", what), rules, thinking=thinking)
    rules.append(f"other: {otherwise.text}")
    return whole(Rule("calls | other", what, otherwise.inner), rules, thinking=thinking)


def _several(form: CallForm, more: int, mark: Callable[[str], str], start: str = "") -> str:
    """One call, and up to so many more. ``start`` stands for the first mark."""
    again = mark(TOOL_CALLS)
    start = start or again
    tagged = f"{quoted(CALL + chr(10))} body {quoted(chr(10) + END_CALL)}"
    first, other, last = {
        "mistral": (f'{start} " "? "[" body', '", " body', ' "]"'),
        "mistral_args": (f"{start} body", f"{again} body", ""),
        "llama": ("body", '"; " body', ""),
    }.get(form, (tagged, f'"\\n" {tagged}', ""))
    others = f" ({other}){{0,{more}}}" if more else ""
    return first + others + last


def _text_and_calls(
    form: CallForm, more: int, names: str, mark: Callable[[str], str]
) -> tuple[str, list[str]]:
    """Text with or without calls, in which the reader finds no others."""
    if form in ("hermes", "xml"):
        bare = rf" & ~/(?s:.*\n)?<function=({names})>(?s:.*)/" if form == "xml" else ""
        return f"call{{0,{more + 1}}} rest", [
            f"FREE: {ANY}{bare}",
            f"opener[suffix={quoted(CALL)}]: FREE",
            f'call: opener "\\n" body {quoted(chr(10) + END_CALL)}',
            "rest: REST",
            f"REST: {ANY}{bare} & ~/(?s:.*)<tool_call>(?s:.*)/",
        ]
    if form == "llama":
        head = rf"(?s:.*\n)?(<\|python_tag\|>)?\{{[ \t\r\n]*\"({'|'.join(FIRST_KEYS)})\"(?s:.*)"
        rules = [f"calls: {_several(form, more, mark)}", f"REST: {ANY} & ~/{head}/"]
    elif (literal := mark(TOOL_CALLS)).startswith('"'):
        opener = f"opener[suffix={literal}]: TEXT"
        rules = [f"calls: {_several(form, more, mark, 'opener')}", opener, f"TEXT: {ANY}"]
        rules.append(rf"REST: {ANY} & ~/(?s:.*)\[TOOL_CALLS\](?s:.*)/")
    else:
        rules = [f"calls: {_several(form, more, mark, f'rest? {literal}')}", f"REST: {ANY}"]
    return "calls | rest", [*rules, "rest: REST"]


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


def _call(
    rule: str, name: str, parameters: Mapping[str, Any], form: CallForm, mark: Callable[[str], str]
) -> list[str]:
    if form == "xml":
        return _xml_call(rule, name, parameters)
    arguments = f"{rule}_arguments: {json_rule(parameters, lenient=True)}"
    if form == "mistral_args":
        return [f"{rule}: {quoted(name)} {mark(ARGS)} {rule}_arguments", arguments]
    key = "parameters" if form == "llama" else "arguments"
    head = quoted(f'{{"name": {json.dumps(name)}, "{key}": ')
    return [f'{rule}: {head} {rule}_arguments "}}"', arguments]


def _as_json(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    shared = {key: parameters[key] for key in _DEFINITIONS if key in parameters}
    properties = {"name": {"const": name}, "parameters": parameters}
    return {**shared, "type": "object", "properties": properties, "required": ["name", "parameters"]}


def _xml_call(rule: str, name: str, parameters: Mapping[str, Any]) -> list[str]:
    """Parameters come in their order, the required ones always; others than the schema names, never."""
    parts_of_it = members(parameters, parameters, ("allOf",))
    properties = {k: v for member in parts_of_it for k, v in dict(member.get("properties") or {}).items()}
    required = {key for member in parts_of_it for key in member.get("required") or ()}
    for keyword in _OF_THE_WHOLE:
        if any(keyword in member for member in parts_of_it):
            raise UsageError(
                f"`{keyword}` of all parameters cannot be held to in calls that are tags; leave it out"
            )
    parts, rules = "", [f"CLOSER: {quoted(chr(10) + END_PARAMETER + chr(10))}"] if rule == "call0" else []
    for index, (key, schema) in enumerate(properties.items()):
        part = f"{rule}_p{index}"
        parts += f" {part}" if key in required else f" {part}?"
        rules += _xml_parameter(part, key, schema, parameters)
    head = quoted(f"{FUNCTION}{name}>\n")
    return [f"{rule}: {head}{parts} {quoted(END_FUNCTION)}", *rules]


def _xml_parameter(rule: str, key: str, schema: Any, root: Mapping[str, Any]) -> list[str]:
    """A text stands as it is, any other value as JSON."""
    if not TAG_NAME.fullmatch(key):
        raise UsageError(f"a parameter with the name {key[:80]!r} cannot be written in calls that are tags")
    found = kinds(schema, root)
    others = [kind for kind in found if kind != "string"]
    options, rules = [], []
    text = text_expression(schema, root) if not found or "string" in found else None
    if text is not None:
        terminal = rule.upper()
        options.append(terminal)
        rules += [
            f"{terminal}: {terminal}_TEXT CLOSER",
            f"{terminal}_TEXT: {ANY} & ({text}) & ~/{WITH_END}/",
        ]
    if others or text is None:
        narrowed = {"allOf": [schema, {"type": others}]} if text is not None else schema
        shared = {name: root[name] for name in _DEFINITIONS if name in root}
        options.append(f"{rule}_json CLOSER")
        rules.append(f"{rule}_json: {json_rule({**shared, **narrowed}, lenient=True)}")
    return [f"{rule}: {quoted(f'{PARAMETER}{key}>{chr(10)}')} ({' | '.join(options)})", *rules]
