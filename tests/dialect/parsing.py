"""Answers taken apart by the server's parser, in a shape that tests can compare."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from godwit.dialect.detect import DIALECTS
from godwit.dialect.parser import (
    AnswerParser,
    CallArguments,
    CallEnd,
    CallStart,
    Delta,
    Text,
    Thinking,
)

BY_NAME = {dialect.name: dialect for dialect in DIALECTS}
SCHEMAS: dict[str, dict[str, Any]] = {
    "write": {
        "type": "object",
        "properties": {
            "path": {"type": "string"},
            "lines": {"type": "integer"},
            "share": {"type": ["null", "number"]},
            "force": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
            "tags": {"$ref": "#/$defs/Tags"},
            "loop": {"$ref": "#/$defs/Loop"},
        },
        "$defs": {"Tags": {"type": "array"}, "Loop": {"$ref": "#/$defs/Loop"}},
    }
}


def merged(deltas: Iterable[Delta]) -> list[Delta]:
    """Neighbours of one kind joined."""
    result: list[Delta] = []
    for delta in deltas:
        last = result[-1] if result else None
        if isinstance(delta, Text) and isinstance(last, Text):
            result[-1] = Text(last.text + delta.text)
        elif isinstance(delta, Thinking) and isinstance(last, Thinking):
            result[-1] = Thinking(last.text + delta.text)
        elif isinstance(delta, CallArguments) and isinstance(last, CallArguments):
            result[-1] = CallArguments(last.index, last.text + delta.text)
        else:
            result.append(delta)
    return result


def parse(
    pieces: Sequence[str],
    format: str | None = "hermes",
    *,
    thinking: bool = False,
    only_calls: bool = False,
    schemas: Mapping[str, Mapping[str, Any]] = SCHEMAS,
) -> list[Delta]:
    parser = AnswerParser(
        None if format is None else BY_NAME[format], schemas, thinking=thinking, only_calls=only_calls
    )
    deltas = [delta for piece in pieces for delta in parser.push(piece)]
    return merged([*deltas, *parser.flush()])


def call_of(deltas: list[Delta], index: int = 0) -> tuple[str, str, bool]:
    """(name, arguments, complete) of one call."""
    (name,) = (d.name for d in deltas if isinstance(d, CallStart) and d.index == index)
    arguments = "".join(d.text for d in deltas if isinstance(d, CallArguments) and d.index == index)
    (end,) = (d for d in deltas if isinstance(d, CallEnd) and d.index == index)
    return name, arguments, end.complete


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas if isinstance(delta, Text))


def calls_of(deltas: list[Delta]) -> list[tuple[str, Any]]:
    """(name, arguments) of the whole calls; the arguments parsed."""
    ends = [delta for delta in deltas if isinstance(delta, CallEnd)]
    calls = [call_of(deltas, end.index) for end in ends if end.complete]
    return [(name, json.loads(arguments)) for name, arguments, _ in calls]
