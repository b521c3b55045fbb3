"""HTTP connections: uvicorn's protocol with deadlines and limits."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, cast

import h11
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from godwit.server.connections.deadlines import Deadlines, Phase
from godwit.server.connections.pace import Share
from godwit.server.connections.places import Places
from godwit.server.errors import ApiError, respond
from godwit.server.limits import Limits
from godwit.server.log import id_headers, new_id

CLOSE = (b"connection", b"close")
#: Bytes that are parsed before other connections have their turn.
SLICE_BYTES = 4 << 10
#: Slices with more chunks are costly; together they get COSTLY_SHARE of the time.
MANY_CHUNKS = 64
COSTLY_SHARE = 0.1
#: How often data after the last response is read and discarded.
DISCARD_SECONDS = 0.05
_log = logging.getLogger("godwit.server.connections")
_REASONS = {
    400: "the request is not valid HTTP",
    413: "the body of the request is too large, or sent in too many small pieces",
    431: "the head of the request is too large",
}


class Parser(h11.Connection):
    """h11's parser, made stricter; it reports the progress of requests to the deadlines."""

    def __init__(self, limits: Limits, deadlines: Deadlines) -> None:
        super().__init__(h11.SERVER, limits.head_bytes)
        self._limits = limits
        self._deadlines = deadlines
        self._body_bytes = 0
        self._chunked = False
        self.num_chunks = 0
        self.fault = 400

    def next_event(self) -> Any:
        """As in h11.

        Raises:
            h11.RemoteProtocolError: the request is refused with the status ``fault``.
        """
        try:
            event = super().next_event()
            self._take(event)
        except h11.RemoteProtocolError as error:
            self.fault = error.error_status_hint
            raise
        return event

    def _take(self, event: Any) -> None:
        if isinstance(event, h11.Request):
            self._check_head(event)
            self._body_bytes = 0
            self._deadlines.head_read()
        elif isinstance(event, h11.Data):
            self._count(event)
        elif isinstance(event, h11.EndOfMessage):
            self._deadlines.body_read()

    def send(self, event: Any) -> Any:
        """As in h11. A response that begins before its request's body is complete closes the connection."""
        if (
            isinstance(event, h11.Response)
            and self.their_state is h11.SEND_BODY
            and CLOSE not in event.headers
        ):
            headers = [*event.headers.raw_items(), CLOSE]
            event = h11.Response(status_code=event.status_code, headers=headers, reason=event.reason)
        return super().send(event)

    def _check_head(self, request: h11.Request) -> None:
        size = len(request.method) + len(request.target)
        size += sum(len(name) + len(value) + 4 for name, value in request.headers.raw_items())
        if size > self._limits.head_bytes:
            raise h11.RemoteProtocolError("large head", error_status_hint=431)
        names = {name for name, _ in request.headers}
        self._chunked = b"transfer-encoding" in names
        if self._chunked and (b"content-length" in names or request.http_version < b"1.1"):
            # Proxies disagree on which of them counts, and so on where the request ends.
            raise h11.RemoteProtocolError("contradicting lengths")

    def _count(self, data: h11.Data) -> None:
        if not self._chunked:  # the application checks the length
            return
        self.num_chunks += 1  # or part of a chunk, which costs as much
        self._body_bytes += self._limits.chunk_bytes + len(data.data)
        if self._body_bytes > self._limits.body_bytes:
            raise h11.RemoteProtocolError("large body", error_status_hint=413)


class ControlledTransport(asyncio.Transport):
    """A transport whose protocol decides how to close it, and which can be paused for several reasons."""

    def __init__(self, transport: asyncio.Transport, protocol: LimitedProtocol) -> None:
        super().__init__()
        self.inner = transport
        self.pauses: set[str] = set()
        self._protocol = protocol

    def close(self) -> None:
        """Close the connection once the client could read the response."""
        self._protocol.finish()

    def is_closing(self) -> bool:
        return self.inner.is_closing() or self._protocol.deadlines.phase is Phase.CLOSING

    def write(self, data: Any) -> None:
        self.inner.write(data)

    def abort(self) -> None:
        self.inner.abort()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self.inner.get_extra_info(name, default)

    def get_write_buffer_size(self) -> int:
        return self.inner.get_write_buffer_size()

    def pause_reading(self) -> None:
        self.pause("application")

    def resume_reading(self) -> None:
        self.resume("application")
        self._protocol.parse_soon()

    def pause(self, reason: str) -> None:
        """Stop reading for a reason."""
        if not self.pauses and not self.inner.is_closing():
            self.inner.pause_reading()
        self.pauses.add(reason)

    def resume(self, reason: str) -> None:
        """Read again, if there is no other reason to pause."""
        self.pauses.discard(reason)
        if not self.pauses and not self.inner.is_closing():
            self.inner.resume_reading()


class LimitedProtocol(H11Protocol):
    """A connection with deadlines and a place. Each server has a subclass with its own limits.

    Attributes:
        limits, places: the server's.
        full: answers requests on connections beyond the limits.
        costly: limits the time for slices of many chunks.
    """

    limits: Limits
    places: Places
    full: ASGIApp
    costly: Share
    transport: ControlledTransport
    conn: Parser

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.deadlines = Deadlines(self.limits, self.loop.time)
        self.conn = Parser(self.limits, self.deadlines)
        self._unparsed = bytearray()
        self._discarded_bytes = 0
        self._next_parse: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None

    # what asyncio calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(ControlledTransport(transport, self))
        address = "" if self.client is None else self.client[0]
        place = self.places.enter(self, address)
        if place is None:
            return self.drop()
        if not place:
            self.app = cast(Any, self.full)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self.places.leave(self)
        self.deadlines.closing()
        for handle in (self._timer, self._next_parse):
            if handle is not None:
                handle.cancel()
        self._timer = self._next_parse = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.deadlines.phase is Phase.CLOSING:
            return self._discard(len(data))
        self.deadlines.received()
        self._unparsed += data
        if self._next_parse is None:
            self._parse()

    def eof_received(self) -> None:
        """The client closed its side, which counts as leaving: asyncio closes the connection."""

    def pause_writing(self) -> None:
        super().pause_writing()
        self.deadlines.write_paused(self.transport.get_write_buffer_size())
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.deadlines.write_resumed()

    # reading

    def parse_soon(self) -> None:
        """Parse what has already come."""
        if self._unparsed and self._next_parse is None:
            self._next_parse = self.loop.call_soon(self._parse)

    def _parse(self) -> None:
        self._next_parse = None
        if self.transport.is_closing() or "application" in self.transport.pauses:
            return
        if not self._unparsed:  # after a wait; to the parser, no data means the end
            return self.transport.resume("parser")
        piece = bytes(self._unparsed[:SLICE_BYTES])
        del self._unparsed[:SLICE_BYTES]
        chunks, began = self.conn.num_chunks, self.loop.time()
        try:
            super().data_received(piece)
        except Exception:  # asyncio only logs what a callback raises
            self.drop()
            raise
        self._watch()
        if self.transport.is_closing():
            return
        costly = self.conn.num_chunks - chunks > MANY_CHUNKS
        if not self._unparsed and not costly:
            return self.transport.resume("parser")
        self.transport.pause("parser")
        wait = self.costly.spent(self.loop.time() - began) if costly else 0.0
        self._next_parse = self.loop.call_later(wait, self._parse)

    def send_400_response(self, msg: str) -> None:
        """Refuse invalid data; a response in progress ends here."""
        error = ApiError(self.conn.fault, _REASONS.get(self.conn.fault, _REASONS[400]))
        id, cycle = new_id(), self.cycle
        _log.warning("%s %d: %s", id, error.status, error.message)
        in_progress = cycle is not None and not cycle.response_complete
        if in_progress:
            cycle.disconnected = True
            cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = respond(error, self.scope["path"] if in_progress else "")
            headers = [*response.raw_headers, *id_headers(id), CLOSE]
            reason = STATUS_PHRASES[response.status_code]
            events = (
                h11.Response(status_code=response.status_code, headers=headers, reason=reason),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            )
            self.transport.write(b"".join(self.conn.send(event) for event in events))
        self.finish()

    # the end of a response, and of the connection

    def on_response_complete(self) -> None:
        self.deadlines.answered()
        super().on_response_complete()
        self._unset_keepalive_if_required()  # the deadlines replace it
        if self.conn.trailing_data[0] or self._unparsed:
            self.deadlines.received()
        self._watch()

    def shutdown(self) -> None:
        if not self.transport.is_closing():
            super().shutdown()

    def finish(self) -> None:
        """Close the connection. A client that still sends may read its response first: if the connection were
        closed at once, its system would discard what it has not read yet."""
        if self.deadlines.phase is Phase.CLOSING:
            return
        still_sends = self.conn.their_state in (h11.SEND_BODY, h11.ERROR) or bool(self._unparsed)
        self.deadlines.closing()
        self._unparsed.clear()
        if still_sends and self.transport.inner.can_write_eof():
            try:
                self.transport.inner.write_eof()
            except OSError:  # the client is gone
                return self.drop()
            self._discard(0)
        else:
            self.transport.inner.close()
        self._watch()

    def _discard(self, num_bytes: int) -> None:
        self._discarded_bytes += num_bytes
        if self._discarded_bytes > self.limits.body_bytes:
            return self.drop()
        self.transport.pauses.clear()
        self.transport.pause("closing")
        self._next_parse = self.loop.call_later(DISCARD_SECONDS, self.transport.resume, "closing")

    def drop(self) -> None:
        """Cut the connection."""
        self.transport.abort()

    # time

    def _watch(self) -> None:
        """Set a timer for the next deadline. An early timer costs less than a new one for each change."""
        due = self.deadlines.due
        idle = not self.transport.get_write_buffer_size()
        if due is None or (idle and self.transport.inner.is_closing()):
            return
        if self._timer is not None:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
        self._timer = self.loop.call_at(due, self._check_deadlines)

    def _check_deadlines(self) -> None:
        self._timer = None
        missed = self.deadlines.missed(self.transport.get_write_buffer_size())
        if missed is None:
            return self._watch()
        if self.deadlines.phase in (Phase.BODY, Phase.ANSWER):
            _log.warning("a connection was cut: %s", missed)
        self.drop()
