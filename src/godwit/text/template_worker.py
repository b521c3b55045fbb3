"""A separate process that renders one Jinja chat template within limits of time and memory.

A downloaded template is a program of a stranger. The Jinja sandbox keeps it away from Python, but one
operation (comparing nested lists, padding a string) can still take all memory, or run for years inside C
code that no check in the same process can interrupt. So the template runs here, in a process that can be
ended at any point. The file is started by path and imports nothing of godwit.

Protocol on stdin and stdout: frames of an 8-byte little-endian length and UTF-8 JSON. The first frame is
the set-up (`sys_path`, `sources`, `seconds`, `memory_bytes`, `output_chars`), answered by `{"ready":
true}`. Each later frame `{"source": name, "variables": {...}}` is answered by `{"text": ...}` or `{"error":
...}`. A process that ends without an answer has run into a limit.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import IO, Any

MAX_REPEAT = 1 << 24  # the largest text, list or number (in bits) that one `*` or `**` may make


def read_frame(stream: IO[bytes]) -> Any:
    """The next JSON value; raises EOFError when the other side is gone."""
    header = stream.read(8)
    size = int.from_bytes(header, "little")
    body = stream.read(size) if len(header) == 8 else b""
    if len(header) < 8 or len(body) < size:
        raise EOFError
    return json.loads(body)


def write_frame(stream: IO[bytes], value: Any) -> None:
    """Send one JSON value; raises TypeError or ValueError for what JSON cannot hold."""
    body = json.dumps(value).encode()
    stream.write(len(body).to_bytes(8, "little") + body)
    stream.flush()


def build_environment() -> Any:
    """The Jinja environment that published chat templates are written for."""
    import jinja2
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, LoopControlExtension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %} ... {% endgeneration %}` tells trainers what to learn; here it is its body."""

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
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, LoopControlExtension]
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


def _limit_memory(num_bytes: int) -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):  # not on every system
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _answer(work: Callable[[], str]) -> dict[str, str]:
    try:
        return {"text": work()}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except RecursionError:
        return {"error": "it is nested too deeply"}
    except Exception as error:  # whatever a stranger's program raises is an answer, not a crash
        return {"error": f"{type(error).__name__}: {error}"[:2000]}


def main() -> None:
    """Serve requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that asked
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    setup = read_frame(requests)
    sys.path[:] = setup["sys_path"]
    environment = build_environment()
    nowhere = open(os.devnull, "w")  # noqa: SIM115 (lives as long as the process)
    _limit_memory(setup["memory_bytes"])
    write_frame(answers, {"ready": True})
    templates: dict[str, Any] = {}
    while True:
        request = read_frame(requests)
        name, variables = request["source"], request["variables"]

        def work(name: str = name, variables: dict[str, Any] = variables) -> str:
            if name not in templates:
                templates[name] = environment.from_string(setup["sources"][name])
            return _render(templates[name], variables, setup["output_chars"])

        # A thread in C that needs no interpreter lock ends the process at the limit, whatever runs then.
        faulthandler.dump_traceback_later(setup["seconds"], exit=True, file=nowhere)
        answer = _answer(work)
        faulthandler.cancel_dump_traceback_later()
        write_frame(answers, answer)


if __name__ == "__main__":
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        main()
