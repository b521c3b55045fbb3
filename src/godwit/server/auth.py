"""Who may use the server: API keys, and the Host header where there are none."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from godwit.errors import UsageError
from godwit.server.errors import ApiError, respond
from godwit.server.settings import Settings

#: Everyone may call these: the chat page holds nothing of anyone's, and asks its user for a key.
OPEN_PATHS = frozenset({"/", "/health", "/ready"})
#: The files that the chat page loads lie below it, and browsers cannot send a key for them.
OPEN_PREFIX = "/static/"
MIN_KEY_CHARS = 8
MAX_KEY_FILE_BYTES = 1 << 20
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(?::\d+)?")
_KEY = re.compile(r"[!-~]+")


def read_keys(file: Path | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The keys in a file, one a line and # before a remark, and the one in GODWIT_API_KEY.

    Raises:
        UsageError: the file cannot be read or holds none, or a key is no key.
    """
    keys: list[str] = []
    if file is not None:
        try:
            with file.open("rb") as stream:
                data = stream.read(MAX_KEY_FILE_BYTES + 1)
            lines = data.decode("ascii").splitlines() if len(data) <= MAX_KEY_FILE_BYTES else []
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{file}: cannot be read as a list of keys ({error})") from None
        keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not keys:
            raise UsageError(f"{file}: holds no keys; write one a line")
    if (single := environment.get("GODWIT_API_KEY")) is not None:
        keys.append(single.strip())
    for key in keys:
        if len(key) < MIN_KEY_CHARS or not _KEY.fullmatch(key):
            raise UsageError(
                f"an API key needs {MIN_KEY_CHARS} or more letters, digits or signs of ASCII, and no spaces"
            )
    return tuple(dict.fromkeys(keys))


class KeyRing:
    """Knows keys by their hashes, so that all comparisons take the same time."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def find(self, headers: Headers) -> str | None:
        """What stands for the key that a request brings; None where it brings none that is known."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        mine = _digest(given.encode("latin-1", "replace"))
        found = None
        for digest in self._digests:  # all of them, whichever fits
            if hmac.compare_digest(digest, mine):
                found = digest.hex()[:32]
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(b"godwit api key\0" + key).digest()


class Guard:
    """Lets only those requests through that may use the server.

    With keys, all but the open paths need one, whether they exist or not and whatever the method. Without
    keys a server for this machine only answers to the machine's own names: else a web page whose name was
    made to point here (DNS rebinding) could use it through its visitor's browser.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._ring = KeyRing(settings.keys)
        self._local_only = settings.loopback and not settings.keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            raise RuntimeError("only HTTP is served")
        headers = Headers(scope=scope)
        error = None
        salt = self._ring.find(headers) or ""
        if self._local_only and not _is_local(headers.get("host", "")):
            error = ApiError(403, "without API keys this server answers only to localhost; check the address")
        elif self._ring and not salt and not _is_open(scope["path"]):
            error = ApiError(
                401,
                "this server needs an API key: send one as `Authorization: Bearer KEY` or `x-api-key: KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if error is not None:
            return await respond(error, scope["path"])(scope, receive, send)
        scope.setdefault("state", {})["salt"] = salt
        await self._app(scope, receive, send)


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIX)


def _is_local(host: str) -> bool:
    match = _HOST.fullmatch(host)
    return match is not None and match[1].lower() in _LOCAL_NAMES
