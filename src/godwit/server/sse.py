"""Server-sent events: the one loop that sends a stream, whatever the API."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

from starlette.responses import StreamingResponse

from godwit.server.answers import Answers, AnswerState, Update
from godwit.server.errors import ApiError, from_engine

Payload = dict[str, Any]
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


class StreamFormat(ABC):
    """Turns the updates of answers into the payloads of one API.

    Attributes:
        last: bytes that end a stream that did not fail.
    """

    last = DONE

    def begin(self, num_answers: int) -> Iterable[Payload]:
        """Payloads before the first update."""
        return ()

    @abstractmethod
    def update(self, update: Update) -> Iterable[Payload]:
        """Payloads for an update."""

    @abstractmethod
    def end(self, answers: Sequence[AnswerState]) -> Iterable[Payload]:
        """Payloads after the last update, with the usage where the API has it."""

    @abstractmethod
    def fail(self, error: ApiError) -> Iterable[Payload]:
        """Payloads that end a stream that failed."""

    def heartbeat(self) -> Payload | None:
        """The payload of a heartbeat; None: a comment will do."""
        return None


def dumps(value: Any) -> str:
    """Compact JSON in ASCII, so that no character can break a line."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def event(payload: Payload) -> bytes:
    """One event; a payload with a type is an event of that name."""
    head = f"event: {payload['type']}\n" if "type" in payload else ""
    return f"{head}data: {dumps(payload)}\n\n".encode()


async def send_events(answers: Answers, form: StreamFormat) -> AsyncIterator[bytes]:
    """The events of a stream. Closing the iterator, as when the client leaves, cancels the answers."""
    try:
        for payload in form.begin(len(answers.answers)):
            yield event(payload)
        async for update in answers.updates():
            if update is None:
                ping = form.heartbeat()
                yield KEEP_ALIVE if ping is None else event(ping)
            else:
                for payload in form.update(update):
                    yield event(payload)
        for payload in form.end(answers.answers):
            yield event(payload)
        yield form.last
    except Exception as error:
        answers.failed(error)
        for payload in form.fail(from_engine(error)):
            yield event(payload)
    finally:
        answers.cancel()


class EventStream(StreamingResponse):
    """Answers as server-sent events; the headers ask proxies not to buffer them."""

    def __init__(self, answers: Answers, form: StreamFormat) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(send_events(answers, form), headers=headers, media_type="text/event-stream")
