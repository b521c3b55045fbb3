"""Serving the application over HTTP, with limits on connections, until a signal stops it."""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import signal
import socket
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from godwit.errors import UsageError
from godwit.server.connections.pace import Share
from godwit.server.connections.places import MAX_REFUSED, Places
from godwit.server.connections.protocol import COSTLY_SHARE, LimitedProtocol
from godwit.server.errors import overloaded, respond
from godwit.server.limits import Limits
from godwit.server.log import Record, RequestLog
from godwit.server.service import Service
from godwit.server.settings import Settings

#: Time for the last answers to report that they were ended.
LAST_SECONDS = 5.0
#: Open files other than connections: listeners, pipes to workers, cache files, the log.
OTHER_FILES = 256
_log = logging.getLogger("godwit.server")


class Server(uvicorn.Server):
    """Shuts down in steps: refuse new requests, let answers finish for a while, end the rest."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self._stopped_by = "its program"

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal starts the shutdown; a second SIGINT ends the server at once."""
        self._stopped_by = signal.Signals(sig).name  # logged later: a handler must not write
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.draining = True
        limit = self.service.settings.drain_seconds
        stats = self.service.host.stats()
        count = 0 if stats is None else stats.num_running + stats.num_waiting
        _log.info(
            "shutting down (%s): no new requests; %d answers in progress have %g s; %d connections are open",
            self._stopped_by,
            count,
            limit,
            len(self.server_state.connections),
        )
        timer = asyncio.get_running_loop().call_later(limit, self._end_answers)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
            _log.info("stopped%s", " at once by a second signal" if self.force_exit else "")

    def _end_answers(self) -> None:
        _log.warning("answers are still in progress; ending them now")
        asyncio.get_running_loop().run_in_executor(None, self.service.host.close)


async def refuse_connection(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers requests on connections beyond the limits."""
    error = overloaded("too many connections are open; send the request again in a moment")
    error.headers["Connection"] = "close"
    record: Record = scope["state"]["record"]
    record.refused, record.error = True, error.message
    await respond(error, scope["path"])(scope, receive, send)


def make_server(app: Starlette, settings: Settings) -> Server:
    """A server for the application."""
    service: Service = app.state.service
    config = uvicorn.Config(
        app,
        http=limited_protocol(settings.limits, RequestLog(refuse_connection, service.metrics.observe)),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=int(settings.limits.idle_seconds),
        timeout_graceful_shutdown=int(settings.drain_seconds + LAST_SECONDS),
    )
    return Server(config, service)


def limited_protocol(limits: Limits, full: ASGIApp) -> type[LimitedProtocol]:
    """The protocol class of a server's connections, which share their limits."""
    more = {
        "limits": limits,
        "places": Places(limits),
        "full": staticmethod(full),
        "costly": Share(COSTLY_SHARE),
    }
    return type("Protocol", (LimitedProtocol,), more)


def allow_open_files(limits: Limits) -> None:
    """Raise the limit of open files, often 1,024, so that all connections fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.connections + MAX_REFUSED + OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Port 0 takes a free one.

    Raises:
        UsageError: the address is not available.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise UsageError(f"cannot listen at {host} ({error}); give another --host") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        other = "--host" if error.errno == errno.EADDRNOTAVAIL else "--port"
        raise UsageError(
            f"cannot listen at {host} port {port}: {error.strerror}; use another {other}"
        ) from None
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can reach a socket."""
    address: Any = listener.getsockname()
    return str(address[0]).startswith("127.") or address[0] == "::1"
