"""What one request, and one client, may take of the server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MIN_BODY_BYTES = 1 << 20
BODY_BYTES_PER_TOKEN = 32
#: JSON values in a body: parsing more would block the interpreter for long, and no model could use them.
MIN_BODY_VALUES = 1 << 17
BODY_VALUES_PER_TOKEN = 4


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one request, checked before any work is done for it, and of connections.

    Attributes:
        body_bytes: size of the body.
        body_seconds: time for the whole body to arrive.
        chunk_bytes: what each chunk of a chunked body counts against ``body_bytes`` besides its data.
        head_bytes: size of the request line and headers together.
        head_seconds: time for them to arrive, from the connection or from their first byte after a response.
        idle_seconds: time between a response and the next request on the same connection.
        write_seconds: a client that reads next to nothing of its response for so long is disconnected.
        depth: nesting of the body's JSON.
        containers, values: objects and lists in it, and values of any kind.
        messages, tools: in a conversation.
        choices: answers to one request, over all its prompts.
        active: answers in progress in the whole server; beyond that, requests get 503.
        connections: open connections.
        per_address: of these from one address (one /64 network of IPv6) other than this machine.
    """

    body_bytes: int = MIN_BODY_BYTES
    body_seconds: float = 60.0
    chunk_bytes: int = 64
    head_bytes: int = 16 << 10
    head_seconds: float = 20.0
    idle_seconds: float = 75.0
    write_seconds: float = 30.0
    depth: int = 64
    containers: int = 1 << 16
    values: int = MIN_BODY_VALUES
    messages: int = 4096
    tools: int = 256
    choices: int = 16
    active: int = 512
    connections: int = 1024
    per_address: int = 256

    @staticmethod
    def of(context: int, **more: Any) -> Limits:
        """Limits for a model with a context of so many tokens; ``more`` sets others."""
        size = max(MIN_BODY_BYTES, BODY_BYTES_PER_TOKEN * context)
        return Limits(body_bytes=size, values=max(MIN_BODY_VALUES, BODY_VALUES_PER_TOKEN * context), **more)
