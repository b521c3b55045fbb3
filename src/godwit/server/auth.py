"""Who may use the server: API keys and their limits, and the Host header."""

from __future__ import annotations

import math
import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from godwit.server.errors import ApiError, rate_limited, respond
from godwit.server.keys import Holder, KeyRing
from godwit.server.log import STATIC, Record
from godwit.server.settings import ANY_HOST, Settings

#: Open without a key: the chat page has no private content, and asks its user for a key.
OPEN_PATHS = frozenset({"/", "/health", "/ready"})
#: Probes may use any host name; these reveal only whether the server works.
_PROBES = frozenset({"/health", "/ready"})
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(?::\d+)?")
#: Methods that do not count against a key's limits.
_FREE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class Guard:
    """Middleware that refuses requests without a valid key or host name.

    With keys, all but the open paths need one, whether they exist or not and whatever the method. Without
    keys, and with ``settings.hosts``, the Host header must name this machine or one of these hosts. Otherwise
    a web page could use the server through its visitor's browser (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._ring = KeyRing(settings.keys, settings.clock)
        self._hosts = _allowed_hosts(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            raise RuntimeError("only HTTP is served")
        state = scope.setdefault("state", {})
        headers = Headers(scope=scope)
        holder = self._ring.find(headers)
        error = self._check(scope, headers, holder)
        record: Record = state["record"]
        if holder is not None:
            record.key, record.spend = holder.key.label, holder.quota.spend
        if error is not None:
            record.refused, record.error = True, error.message
            return await respond(error, scope["path"])(scope, receive, send)
        state["salt"] = "" if holder is None else holder.salt
        await self._app(scope, receive, send)

    def _check(self, scope: Scope, headers: Headers, holder: Holder | None) -> ApiError | None:
        host = headers.get("host", "")
        if self._hosts is not None and scope["path"] not in _PROBES and not _is_among(host, self._hosts):
            return ApiError(
                403,
                "this server does not accept that host name; use another, or start it with --allow-host",
            )
        if self._ring and holder is None and not _is_open(scope["path"]):
            return ApiError(
                401,
                "this server needs an API key: send one as `Authorization: Bearer KEY` or `x-api-key: KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if holder is None or scope["method"] in _FREE_METHODS:
            return None
        short = holder.quota.admit()
        return None if short is None else rate_limited(short[0], math.ceil(short[1]))


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(STATIC)  # browsers cannot send a key for these files


def _allowed_hosts(settings: Settings) -> frozenset[str] | None:
    """Accepted host names in lower case; None: any."""
    if ANY_HOST in settings.hosts or (settings.keys and not settings.hosts):
        return None
    return _LOCAL_NAMES | {name.lower() for name in settings.hosts}


def _is_among(host: str, names: frozenset[str]) -> bool:
    match = _HOST.fullmatch(host)
    return match is not None and match[1].lower() in names
