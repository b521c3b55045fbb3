"""A small HTTP client on asyncio streams, with one connection per request.

It costs little compared with the server that it measures, and can do what proper libraries refuse to, such
as sending half a body.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Reply:
    """The head of a response; its body is read by :meth:`lines` or :meth:`body`."""

    status: int
    headers: Mapping[str, str]
    reader: asyncio.StreamReader

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes."""
        if self.headers.get("transfer-encoding") == "chunked":
            while size := int(await self.reader.readline() or b"0", 16):
                yield (await self.reader.readexactly(size + 2))[:-2]
        elif length := int(self.headers.get("content-length", "0")):
            yield await self.reader.readexactly(length)

    async def body(self) -> bytes:
        return b"".join([chunk async for chunk in self.chunks()])

    async def events(self) -> AsyncIterator[Any]:
        """The data of server-sent events, parsed; that of the last one may be the text [DONE]."""
        rest = b""
        async for chunk in self.chunks():
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if line.startswith(b"data: "):
                    data = line[6:].strip()
                    yield "[DONE]" if data == b"[DONE]" else json.loads(data)


@asynccontextmanager
async def request(
    url: str,
    path: str,
    body: bytes | None = None,
    *,
    method: str = "POST",
    headers: Mapping[str, str] | None = None,
    pause: float = 0.0,
) -> AsyncIterator[Reply]:
    """Send a request; the connection is closed at the end of the block, even if the response is unread.

    Args:
        url: of the server.
        path: on it.
        body: of JSON, unless the headers say otherwise.
        method: of HTTP.
        headers: in addition.
        pause: seconds between pieces of 16 bytes in which the body is sent; 0: all at once.

    Raises:
        OSError, EOFError: the server closed the connection.
    """
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=1 << 22)
    try:
        lines = {"Host": place.netloc, "Content-Type": "application/json", "Connection": "close"}
        if body is not None:
            lines["Content-Length"] = str(len(body))
        head = "".join(f"{name}: {value}\r\n" for name, value in {**lines, **(headers or {})}.items())
        writer.write(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode())
        for start in range(0, len(body or b""), 16) if pause else ():
            writer.write((body or b"")[start : start + 16])
            await writer.drain()
            await asyncio.sleep(pause)
        if body and not pause:
            writer.write(body)  # not drained: the server may answer before it has read all
        yield await read_head(reader)
    finally:
        writer.transport.abort()


async def read_head(reader: asyncio.StreamReader) -> Reply:
    """The status and headers that come next.

    Raises:
        EOFError: none come.
    """
    status = (await reader.readline()).split()
    if len(status) < 2:
        raise EOFError("the connection was closed without a response")
    headers = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip().lower()
    return Reply(int(status[1]), headers, reader)
