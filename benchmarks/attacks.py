"""Hostile requests that a server must refuse or survive while it serves others."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from benchmarks.plain_http import read_head, request

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
#: Seconds of a flood, unless the server ends it.
FLOOD_SECONDS = 2.0


@dataclass(frozen=True)
class Attack:
    """A hostile request.

    Attributes:
        statuses: expected statuses; 0: the server closed the connection.
    """

    name: str
    run: Callable[[str, random.Random], Any]
    statuses: Sequence[int] = (400,)


def _posting(path: str, make: Callable[[random.Random], bytes], **how: Any) -> Callable[..., Any]:
    async def post(url: str, rng: random.Random) -> int:
        try:
            async with request(url, path, make(rng), **how) as reply:
                await reply.body()
                return reply.status
        except (OSError, EOFError):
            return 0

    return post


def _chat(**fields: Any) -> Callable[[random.Random], bytes]:
    body = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8, **fields}
    data = json.dumps(body).encode()
    return lambda rng: data


def _many(path: str, start: str, item: str, end: str) -> Callable[..., Any]:
    """A body of 1,000,000 bytes that repeats one item."""
    data = (start + ",".join([item] * (1_000_000 // (len(item) + 1))) + end).encode()
    return _posting(path, lambda rng: data)


_ASKED = '{"messages": [{"role": "user", "content": "Hello!"}], '
_BLOCKS = '{"messages": [{"role": "user", "content": ['
_DESCRIBED = '{"name": "f", "description": "'


def _slowly(pieces: int, pause: float) -> Callable[..., Any]:
    """Sends a body a few bytes at a time, and leaves before the end."""

    async def send(url: str, rng: random.Random) -> int:
        data = _chat()(rng)
        headers = {"Content-Length": str(10 * len(data))}
        try:
            async with asyncio.timeout(1 + pieces * pause):
                async with request(url, CHAT, data[: 16 * pieces], headers=headers, pause=pause) as reply:
                    return reply.status
        except (TimeoutError, OSError, EOFError):
            return 0

    return send


def _raw(data: bytes) -> Callable[..., Any]:
    """Sends bytes that are not a request."""

    async def send(url: str, rng: random.Random) -> int:
        place = urlsplit(url)
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        try:
            writer.write(data)
            async with asyncio.timeout(30):
                return (await read_head(reader)).status
        except (OSError, EOFError):
            return 0
        finally:
            writer.transport.abort()

    return send


def _costly_schema(rng: random.Random) -> bytes:
    """Schemas that explode when they are compiled."""
    if rng.random() < 0.5:
        schema: dict[str, Any] = {"type": "string", "pattern": "((((a{1,99}){1,99}){1,99}){1,99}){1,99}"}
    else:
        schema = {"type": "string", "pattern": "(a|aa|aaa){1,900}(b{1,900}c{1,900}){1,900}"}
        for level in range(8):
            schema = {"allOf": [{"properties": {f"p{level}": schema}}, {"anyOf": [schema, {"not": schema}]}]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return _chat(response_format=form)(rng)


def _held(**outputs: Any) -> Callable[..., Any]:
    """Requests a schema that is costly to compile or to enforce."""
    return _posting(CHAT, _chat(structured_outputs=outputs))


def _flood(start: bytes, piece: bytes, seconds: float = FLOOD_SECONDS) -> Callable[..., Any]:
    """Sends ``start`` and then the same bytes as fast as it can, ignoring any answer."""

    async def send(url: str, rng: random.Random) -> int:
        place = urlsplit(url)
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        status = 0
        try:
            async with asyncio.timeout(seconds):
                writer.write(start)
                status = (await read_head(reader)).status if start.startswith(b"POST /v1/none") else 0
                while True:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
        except (OSError, EOFError, TimeoutError):
            return status
        finally:
            writer.transport.abort()

    return send


def _one_letter(count: int, seconds: float = FLOOD_SECONDS) -> Callable[..., Any]:
    """Keeps connections open with the first letter of a second request."""

    async def hold(url: str, rng: random.Random) -> int:
        place = urlsplit(url)
        async with asyncio.timeout(30):
            opened = [await asyncio.open_connection(place.hostname, place.port) for _ in range(count)]
            try:
                for reader, writer in opened:
                    writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    status = (await read_head(reader)).status
                    writer.write(b"G")
                await asyncio.sleep(seconds)
                return status
            except (OSError, EOFError):
                return 0
            finally:
                for _, writer in opened:
                    writer.transport.abort()

    return hold


def _never_reading(count: int, seconds: float = FLOOD_SECONDS) -> Callable[..., Any]:
    """Requests the chat page many times and reads none of it."""

    async def ignore(url: str, rng: random.Random) -> int:
        place = urlsplit(url)
        with socket.socket() as client:
            client.setblocking(False)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, (place.hostname, place.port))
            try:
                async with asyncio.timeout(seconds):
                    await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * count)
                    await asyncio.sleep(seconds)
            except (OSError, TimeoutError):
                pass
        return 0

    return ignore


def _head_of(*lines: str) -> bytes:
    head = ("POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", *lines)
    return "\r\n".join((*head, "", "")).encode()


_PROPERTIES = {f"property_{i}": {"type": "string"} for i in range(900)}
_NESTED = b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}"
ATTACKS = (
    Attack("body of 5 MiB", _posting(CHAT, lambda rng: b" " * (5 << 20)), (413, 0)),
    Attack("no JSON", _posting(CHAT, lambda rng: b'{"messages": [' + rng.randbytes(40))),
    Attack("nested JSON", _posting(CHAT, lambda rng: _NESTED)),
    Attack("NaN", _posting(CHAT, lambda rng: b'{"messages": [], "top_p": NaN}')),
    Attack("10^6 answers", _posting(CHAT, _chat(n=10**6))),
    Attack("temperature of 10^300", _posting(CHAT, _chat(temperature=1e300))),
    Attack("-5 tokens", _posting(CHAT, _chat(max_tokens=-5))),
    Attack("logit_bias of no token", _posting(CHAT, _chat(logit_bias={"999999999": 5}))),
    Attack("20 stop texts", _posting(CHAT, _chat(stop=["x" * i for i in range(1, 21)]))),
    Attack("unknown field", _posting(CHAT, _chat(exec="rm"))),
    Attack("900,000 letters", _posting(TEXT, lambda rng: b'{"prompt": "' + b"x" * 900_000 + b'"}')),
    Attack("wrong method", _posting(CHAT, _chat(), method="DELETE"), (405,)),
    Attack("unknown path", _posting("/v1/%00/../etc/passwd", _chat()), (404, 400)),
    Attack("form of a web page", _posting(CHAT, _chat(), headers={"Content-Type": "text/plain"}), (415,)),
    Attack("foreign host", _posting(CHAT, _chat(), headers={"Host": "evil.example"}), (403,)),
    Attack("costly schema", _posting(CHAT, _costly_schema), (400, 200)),
    Attack("ambiguous grammar", _held(grammar="start: s\ns: s s | s s s | /[a-z ]/ |\n"), (400, 200)),
    Attack("10,000 choices", _held(choice=[f"choice {i}" for i in range(10_000)]), (400, 200)),
    Attack("nested repetitions", _held(regex="(a{1,100}){1,100}"), (400, 200)),
    Attack("900 properties", _held(json={"type": "object", "properties": _PROPERTIES}), (400, 200)),
    Attack("ids that are none", _many(TEXT, '{"prompt": [', "-1", "]}")),
    Attack("nested lists", _many(TEXT, '{"prompt": [', "[[[[]]]]", "]}")),
    Attack("bad names of biases", _many(CHAT, _ASKED + '"logit_bias": {', '"abcdefgh": 0', "}}")),
    Attack("bad messages", _many(CHAT, '{"messages": [', '{"role": 1, "content": 2, "name": 3}', "]}")),
    Attack("bad blocks", _many("/v1/messages", _BLOCKS, '{"type": 1}', "]}]}")),
    Attack("halves of characters", _many(CHAT, _ASKED + '"stop": [', r'"\ud800"', "]}")),
    Attack(
        "a million letters in a tool",
        _many(CHAT, _ASKED + '"tools": [{"type": "function", "function": ' + _DESCRIBED, "abc", '"}}]}'),
    ),
    Attack("variable named self", _posting(CHAT, _chat(chat_template_kwargs={"self": 1}))),
    Attack("slow body", _slowly(6, 0.4), (0,)),
    Attack("head of 100 KB", _raw(b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n"), (400, 431, 0)),
    Attack("whole head of 17 KB", _raw(_head_of("X: " + "a" * 17_000)), (431,)),
    Attack("two lengths", _raw(_head_of("Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n")),
    Attack("chunks of one byte", _flood(_head_of("Transfer-Encoding: chunked"), b"1\r\n \r\n" * 100), (0,)),
    Attack(
        "chunks after a refusal",
        _flood(b"POST /v1/none HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        (403, 401),
    ),
    Attack("a letter at a time", _flood(b"GET /health HTTP/1.1\r\nX: ", b"x"), (0,)),
    Attack("one letter on 50 connections", _one_letter(50), (200, 0)),
    Attack("300 pages unread", _never_reading(300), (0,)),
    Attack("no HTTP", _raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9 + b"\r\n\r\n"), (400, 0)),
)  # fmt: skip
