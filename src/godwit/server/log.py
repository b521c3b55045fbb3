"""The request log: one record, and one line, for each request."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from godwit.engine.stream import Finish
from godwit.server.connections.pace import Sieve

_log = logging.getLogger("godwit.server")
_NOT_LOGGED = frozenset({"/", "/health", "/ready", "/metrics"})
#: The prefix of the chat page's files.
STATIC = "/static/"


def new_id() -> str:
    """A new id of a request."""
    return secrets.token_hex(12)


def id_headers(id: str) -> list[tuple[bytes, bytes]]:
    """Headers of every response: the request's id, under the names of both APIs."""
    return [
        (b"x-request-id", id.encode()),
        (b"request-id", id.encode()),
        (b"x-content-type-options", b"nosniff"),
    ]


@dataclass
class Record:
    """One request and its outcome.

    Attributes:
        path: as it was sent, so without spaces or control characters.
        id: in the log, and for the client as ``x-request-id``.
        first: seconds until the first part of an answer.
        finishes, reasons: how each of its answers ended; ``reasons`` as OpenAI's finish_reason.
        left: (tokens of the prompt, of the answers) when the client left early.
        error: what went wrong, for the log.
        key: label of the API key; "" without one.
        spend: charges tokens to the key.
        num_prompt, num_generated: tokens that were charged.
        refused: it was refused before any work was done.
    """

    method: str
    path: str
    id: str = field(default_factory=new_id)
    status: int = 0
    began: float = field(default_factory=perf_counter)
    first: float | None = None
    seconds: float = 0.0
    finishes: list[Finish] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    left: tuple[int, int] | None = None
    error: str = ""
    key: str = ""
    spend: Callable[[int], None] = lambda num_tokens: None
    num_prompt: int = 0
    num_generated: int = 0
    refused: bool = False

    def note_prompts(self, num_tokens: int) -> None:
        """Charge the tokens of the prompts."""
        self.num_prompt += num_tokens
        self.spend(num_tokens)

    def note_first(self) -> None:
        """The first part of an answer has come."""
        if self.first is None:
            self.first = perf_counter() - self.began

    def note_generated(self, num_tokens: int) -> None:
        """Charge new tokens of an answer."""
        self.num_generated += num_tokens
        self.spend(num_tokens)

    def line(self, held_back: int = 0) -> str:
        """The line in the log. ``held_back`` refused requests before it were not logged."""
        parts = [f"{self.id} {self.method} {self.path} {self.status} {self.seconds:.3f}s"]
        if self.key:
            parts.append(f"key={self.key}")
        if self.finishes:
            first, total = self.finishes[0], [f.completion_tokens for f in self.finishes]
            parts.append(f"prompt={first.prompt_tokens} cached={first.cached_tokens} generated={sum(total)}")
            parts.append("ttft=-" if self.first is None else f"ttft={self.first:.3f}s")
            rates = [rate for f in self.finishes if (rate := f.decode_tokens_per_second) is not None]
            parts.append(f"decode={sum(rates) / len(rates):.1f}tok/s" if rates else "decode=-")
            drafted, accepted = (sum(getattr(f, n) for f in self.finishes) for n in ("drafted", "accepted"))
            parts.append(f"drafted={drafted} accepted={accepted}")
            parts.append(f"finish={','.join(self.reasons or [f.reason for f in self.finishes])}")
            if first.reuse_note:
                parts.append(f"({first.reuse_note})")
        elif self.left is not None:
            parts.append(f"prompt={self.left[0]} generated={self.left[1]} finish=cancelled")
        if self.error:
            parts.append(f"error={json.dumps(self.error, ensure_ascii=False)}")
        if held_back:
            parts.append(f"({held_back} more refused requests were not logged)")
        return printable(" ".join(parts))


def printable(text: str) -> str:
    """``text`` on one line, without control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class OneLine(logging.Formatter):
    """Writes each record on one line, whatever its text; a traceback follows, indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        """The lines of a traceback."""
        lines = super().formatException(ei).splitlines()
        return "\n".join("    " + printable(line) for line in lines)


class RequestLog:
    """Middleware that logs and counts each request, and adds its id to the response."""

    def __init__(self, app: ASGIApp, observe: Callable[[Record, str], None]) -> None:
        self._app = app
        self._observe = observe
        self._refusals = Sieve()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        record = Record(scope["method"][:16], (scope.get("raw_path") or b"?").decode("latin-1")[:200])
        scope.setdefault("state", {})["record"] = record

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *id_headers(record.id)]
            await send(message)

        try:
            await self._app(scope, receive, with_id)
        except Exception as error:
            record.status = record.status or 500
            record.error = record.error or type(error).__name__
            raise
        finally:
            record.seconds = perf_counter() - record.began
            route = scope.get("route")
            self._observe(record, getattr(route, "path", "other"))
            if not _is_not_logged(scope["path"]) or record.refused:
                self._write(record)

    def _write(self, record: Record) -> None:
        """Log a request; refused ones, which anyone can send, at a limited rate."""
        held_back = self._refusals.passes() if record.refused else 0
        if held_back is not None:
            _log.info("%s", record.line(held_back))


def _is_not_logged(path: str) -> bool:
    return path in _NOT_LOGGED or path.startswith(STATIC)
