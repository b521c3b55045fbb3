"""Serving an application over HTTP, with limits on connections, until it is told to end."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from godwit.errors import UsageError
from godwit.server.service import Service
from godwit.server.settings import Settings

#: After the last answers were told to end, they get so long to say so.
LAST_SECONDS = 5.0
#: An idle connection stays open longer than proxies and clients keep theirs (60 s are common).
KEEP_ALIVE_SECONDS = 75
_log = logging.getLogger("godwit.server")


class PatientlessProtocol(H11Protocol):
    """Closes a connection that does not send a whole head of a request in time."""

    head_seconds = 20.0
    _waiting: asyncio.TimerHandle | None = None

    @property
    def _asked(self) -> bool:
        return bool(self.cycle)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._waiting = self.loop.call_later(self.head_seconds, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        super().connection_lost(exc)

    def _give_up(self) -> None:
        if not self._asked and not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """Ends in steps: no new requests, time for the answers under way, an end for those that are left."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.draining = True
        limit = self.service.settings.drain_seconds
        timer = asyncio.get_running_loop().call_later(limit, self._end_answers)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def _end_answers(self) -> None:
        _log.warning("answers are still under way; they are ended now")
        asyncio.get_running_loop().run_in_executor(None, self.service.host.close)


def make_server(app: Starlette, settings: Settings) -> Server:
    """A server for the application, which knows its own limits."""
    limits = settings.limits
    protocol = type("Protocol", (PatientlessProtocol,), {"head_seconds": limits.head_seconds})
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        limit_concurrency=limits.connections,
        h11_max_incomplete_event_size=limits.head_bytes,
        timeout_graceful_shutdown=int(settings.drain_seconds + LAST_SECONDS),
    )
    return Server(config, app.state.service)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
        UsageError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise UsageError(f"{host} is no address to listen at ({error}); give another --host") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        other = "--host" if error.errno == errno.EADDRNOTAVAIL else "--port"
        raise UsageError(
            f"cannot listen at {host} port {port}: {error.strerror}; take another {other}"
        ) from None
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can reach a socket."""
    address: Any = listener.getsockname()
    return str(address[0]).startswith("127.") or address[0] == "::1"
