"""The forms that an answer may be held to, written as grammars for llguidance: a dialect of Lark.

A grammar's rule ``answer`` is the form itself, and ``start`` may put thinking before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from godwit.errors import UsageError

Thinking = Literal["none", "optional", "opened"]
CallForm = Literal["hermes", "xml"]

MAX_SCHEMA_CHARS = 1 << 18
MAX_DEPTH = 48
MAX_REGEX_CHARS = 1 << 13
MAX_GRAMMAR_CHARS = 1 << 16
MAX_CHOICES = 10_000
#: More calls in one answer are a model that goes round in circles.
MAX_CALLS = 16

CALL, END_CALL, THINK, END_THINK = "<tool_call>", "</tool_call>", "<think>", "</think>"
#: Between the parts of a JSON text, besides nothing: one blank, or a new line, indented by up to eight steps.
#: All models write these, and small ones would go on with blanks for ever.
_BLANKS = r" |\n(  ){0,8}|\n\t{0,8}"
_TEXT = "TEXT: /(?s:.*)/"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,256}")
_DEFINITIONS = ("$defs", "definitions")


@dataclass(frozen=True)
class Rule:
    """The form of an answer, or of a part of it.

    Attributes:
        text: what stands behind the name of a rule.
        what: asked for it, in words for errors.
        inner: another grammar that the text refers to as ``@inner``; "" for none.
    """

    text: str
    what: str
    inner: str = ""


def quoted(text: str) -> str:
    """A text as a literal of a grammar.

    Raises:
        UsageError: it is no text that could be written.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("a text of the form holds half of a surrogate pair, which is no character") from None
    return json.dumps(text)


def json_rule(schema: Mapping[str, Any], *, lenient: bool = False) -> str:
    """What matches the JSON texts that fit a schema.

    Args:
        schema: whose ``x-guidance``, a matter of the library, is passed over.
        lenient: pass over what a grammar cannot check, instead of refusing it.

    Raises:
        UsageError: the schema is no JSON, too large, or too deep.
    """
    how = {"whitespace_pattern": _BLANKS, "lenient": lenient}
    text = checked_json({**schema, "x-guidance": how}, MAX_SCHEMA_CHARS)
    return f"%json {text}"


def choice_rule(options: Sequence[str]) -> str:
    """What matches one of some texts.

    Raises:
        UsageError: there are none, or too many.
    """
    if not 0 < len(options) <= MAX_CHOICES or not all(isinstance(option, str) for option in options):
        raise UsageError(f"a choice is between 1 and {MAX_CHOICES} texts")
    if sum(map(len, options)) > MAX_SCHEMA_CHARS:
        raise UsageError(f"the texts of a choice may have {MAX_SCHEMA_CHARS} characters in all")
    return " | ".join(map(quoted, options))


def whole(rule: Rule, more: Iterable[str] = (), *, thinking: Thinking = "none") -> str:
    """A grammar whose ``answer`` is ``rule``, behind what may be thought; ``more`` are further rules."""
    start, lines = "answer", [f"answer: {rule.text}", *more]
    if thinking != "none":
        start = "thoughts blanks answer"
        lines += [
            f"thoughts[suffix={quoted(END_THINK)}]: THOUGHTS",
            "THOUGHTS: /(?s:.*)/",
            "blanks: /\\n{0,4}/",
        ]
    if thinking == "optional":
        start = f"answer | {quoted(THINK)} {start}"
    text = "\n".join([f"start: {start}", *lines])
    if not rule.inner:
        return text
    outer = {"name": "outer", "lark_grammar": text}
    return json.dumps({"grammars": [outer, {"name": "inner", "lark_grammar": rule.inner}]})


def call_grammar(
    tools: Sequence[Mapping[str, Any]],
    choice: str,
    *,
    parallel: bool,
    form: CallForm,
    thinking: Thinking,
    otherwise: Rule | None,
) -> str:
    """Calls of tools; see :meth:`~godwit.engine.constraint.Constraints.tool_calls`.

    Raises:
        UsageError: a tool cannot be used, or there is none to call.
    """
    functions = [_function(tool) for tool in tools]
    if choice not in ("auto", "required"):
        functions = [function for function in functions if function[0] == choice]
    if not functions:
        raise UsageError("there is no such tool to call")
    rules: list[str] = []
    for index, (name, parameters) in enumerate(functions):
        write = _xml_call if form == "xml" else _hermes_call
        rules += write(f"call{index}", name, parameters)
    rules.append("body: " + " | ".join(f"call{index}" for index in range(len(functions))))
    most = MAX_CALLS if parallel else 1
    end = quoted(f"\n{END_CALL}")
    what = "a tool's schema"
    if choice == "auto" and otherwise is None:
        rules += [
            f"opener[suffix={quoted(CALL)}]: TEXT",
            f'call: opener "\\n" body {end}',
            "rest: REST",
            "REST: TEXT & ~/(?s:.*)<tool_call>(?s:.*)/",
            _TEXT,
        ]
        return whole(Rule(f"call{{0,{most}}} rest", what), rules, thinking=thinking)
    rules.append(f"call: {quoted(CALL + chr(10))} body {end}")
    calls = "call" + (f' ("\\n" call){{0,{most - 1}}}' if most > 1 else "")
    if choice != "auto" or otherwise is None:
        return whole(Rule(calls, what), rules, thinking=thinking)
    rules += [f"calls: {calls}", f"other: {otherwise.text}"]
    return whole(Rule("calls | other", what, otherwise.inner), rules, thinking=thinking)


def checked_json(value: object, max_chars: int) -> str:
    """The JSON text of a value.

    Raises:
        UsageError: it has none, or one that is too large or too deep.
    """
    check_depth(value)
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise UsageError("the schema has to be plain JSON") from None
    if len(text) > max_chars:
        raise UsageError(f"the schema has {len(text)} characters, but may have {max_chars}")
    return text


def check_depth(value: object) -> None:
    """Refuse what is nested too deeply, which cannot be found out by recursion.

    Raises:
        UsageError: it is.
    """
    level, depth = [value], 0
    while level := [child for parent in level for child in _children(parent)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise UsageError(f"the schema is nested more than {MAX_DEPTH} levels deep")


def _children(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def _function(tool: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and parameters of a tool, with or without OpenAI's wrapper around it."""
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError("a tool needs a name of letters, digits, '_', '-' and '.'")
    parameters = function.get("parameters") or {}
    if not isinstance(parameters, Mapping):
        raise UsageError(f"the parameters of the tool {name} have to be a JSON schema")
    return name, {**parameters, "type": "object"}


def _hermes_call(rule: str, name: str, parameters: Mapping[str, Any]) -> list[str]:
    head = quoted(f'{{"name": {json.dumps(name)}, "arguments": ')
    arguments = json_rule(parameters, lenient=True)
    return [f'{rule}: {head} {rule}_arguments "}}"', f"{rule}_arguments: {arguments}"]


def _xml_call(rule: str, name: str, parameters: Mapping[str, Any]) -> list[str]:
    """Parameters come in their order, the required ones always; others than the schema names, never."""
    properties = parameters.get("properties")
    required = parameters.get("required")
    shared = {key: parameters[key] for key in _DEFINITIONS if key in parameters}
    parts, rules = "", []
    for index, (key, schema) in enumerate(properties.items() if isinstance(properties, Mapping) else ()):
        part = f"{rule}_p{index}"
        optional = "" if isinstance(required, list | tuple) and key in required else "?"
        parts += f" {part}{optional}"
        rules += _xml_parameter(part, key, schema if isinstance(schema, Mapping) else {}, shared)
    head = quoted(f"<function={name}>\n")
    return [f'{rule}: {head}{parts} "</function>"', *rules]


def _xml_parameter(rule: str, key: str, schema: Mapping[str, Any], shared: Mapping[str, Any]) -> list[str]:
    """A text stands as it is, any other value as JSON."""
    head, end = quoted(f"<parameter={key}>\n"), "</parameter>"
    options = schema.get("enum")
    if not _is_text(schema, shared):
        value = [f"{rule}_value: {json_rule({**shared, **schema}, lenient=True)}"]
    elif isinstance(options, list) and options and all(isinstance(option, str) for option in options):
        value = [f"{rule}_value: {choice_rule(options)}"]
    else:
        text = [f"{rule}_value[suffix={quoted(end)}]: /(?s:.*)/"]
        return [f'{rule}: {head} {rule}_value "\\n"', *text]
    return [f"{rule}: {head} {rule}_value {quoted(chr(10) + end + chr(10))}", *value]


def _is_text(schema: Any, shared: Mapping[str, Any]) -> bool:
    """Whether the first type that a schema names, null aside, is a text, as it is where it names none."""
    for _ in range(MAX_DEPTH):
        if not isinstance(schema, Mapping):
            break
        if isinstance(reference := schema.get("$ref"), str):
            _, _, path = reference.partition("#/")
            group, _, name = path.partition("/")
            schema = dict(shared.get(group) or {}).get(name)
            continue
        kinds = schema.get("type")
        if named := [
            kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if isinstance(kind, str)
        ]:
            return next((kind for kind in named if kind != "null"), "null") == "string"
        options = schema.get("anyOf") or schema.get("oneOf")
        if not isinstance(options, list):
            break
        schema = next((o for o in options if isinstance(o, Mapping) and o.get("type") != "null"), None)
    return True
