"""Renders one Jinja chat template in a limited process.

A downloaded template is untrusted code. The Jinja sandbox keeps it away from Python, but a single operation
(comparing nested lists, padding a string) can still take all memory, or run for years inside C code that
nothing in the same process can interrupt. So it is rendered in a :class:`godwit.worker.Worker`; this file is
its script and imports nothing of godwit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

MAX_REPEAT = 1 << 24  # the largest text, list or number (in bits) that one `*` or `**` may make


def build_environment() -> Any:
    """The Jinja environment that published chat templates are written for."""
    import jinja2
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, LoopControlExtension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """`{% generation %} ... {% endgeneration %}` marks what trainers learn; here only its body counts."""

        tags = {"generation"}  # noqa: RUF012 (declared like this in jinja2)

        def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Environment(ImmutableSandboxedEnvironment):
        # The memory limit stops large results as well, but not on every system, and with a worse message.
        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if _result_size(operator, left, right) > MAX_REPEAT:
                raise SecurityError("the result of an operation is too large")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, LoopControlExtension]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escaping of Jinja's own filter, so that the model sees what was sent."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _result_size(operator: str, left: Any, right: Any) -> int:
    if operator == "**":
        return left.bit_length() * right if isinstance(left, int) and isinstance(right, int) else 0
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() + right.bit_length()
    if isinstance(left, int):
        left, right = right, left
    return len(left) * right if hasattr(left, "__len__") and isinstance(right, int) else 0


def _render(template: Any, variables: dict[str, Any], limit: int) -> str:
    pieces: list[str] = []
    size = 0
    for piece in template.generate(**variables):
        size += len(piece)
        if size > limit:
            raise ValueError(f"the text is longer than {limit} characters")
        pieces.append(piece)
    return "".join(pieces)


def start(setup: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], dict[str, str]]:
    """Answers `{"source": name, "variables": {...}}` by `{"text": ...}`.

    `setup` holds `sources` by name, and `output_chars`.
    """
    environment = build_environment()
    templates: dict[str, Any] = {}

    def answer(request: Mapping[str, Any]) -> dict[str, str]:
        name = request["source"]
        if name not in templates:
            templates[name] = environment.from_string(setup["sources"][name])
        return {"text": _render(templates[name], request["variables"], setup["output_chars"])}

    return answer
