"""Server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import StreamingResponse

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def dumps(value: Any) -> str:
    """JSON without spaces; all in ASCII, so that no character can break a line."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def event(value: Any, name: str | None = None) -> bytes:
    """One event with ``value`` as its JSON data."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {dumps(value)}\n\n".encode()


class EventStream(StreamingResponse):
    """A response of events as they come; proxies are asked not to collect them."""

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
