"""Clients for a server under load: a small HTTP client, well-behaved requests, and hostile ones.

The client speaks plain HTTP/1.1 over asyncio's streams, one connection a request: it costs little beside the
server that it measures, and can do what well-made libraries refuse to, such as sending half a body.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


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
    """Send a request; the connection is closed at the end, whatever was read by then.

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
        yield await _head(reader)
    finally:
        writer.transport.abort()


async def _head(reader: asyncio.StreamReader) -> Reply:
    status = (await reader.readline()).split()
    if len(status) < 2:
        raise EOFError("the connection was closed without an answer")
    headers = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip().lower()
    return Reply(int(status[1]), headers, reader)


@dataclass
class Tally:
    """What came of many requests.

    Attributes:
        first, gaps: seconds to the first token, and from each to the next, of all answers.
        tokens: of answers, as far as they were received.
        finished, left, refused, hostile: requests that ended well, that their client left, that were refused
            since the server was busy, and that deserved no answer and got none.
        errors: what went wrong without the client's fault.
        slowest: seconds until the slowest hostile request was refused, by kind.
    """

    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    finished: int = 0
    left: int = 0
    hostile: int = 0
    errors: list[str] = field(default_factory=list)
    slowest: dict[str, float] = field(default_factory=dict)


def words(rng: random.Random, count: int) -> str:
    """So many words that no language has."""
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    return " ".join("".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(count))


@dataclass(frozen=True)
class Mix:
    """What requests are like.

    Attributes:
        leaving, hostile: shares of clients that leave in the middle, and of hostile ones.
        prompt_words, tokens: least and most.
        every_route: use all APIs, tools and forms, and go on with conversations; else plain chats only.
        extra: fields of every request.
        exact: answers have just as many tokens as they may.
    """

    leaving: float = 0.10
    hostile: float = 0.05
    prompt_words: tuple[int, int] = (3, 160)
    tokens: tuple[int, int] = (8, 160)
    every_route: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = False


class Client:
    """One client, which sends one request after another.

    Args:
        url: the server's.
        mix: what it sends.
        seed: the same gives the same requests.
        tally: takes in what comes of them.
    """

    def __init__(self, url: str, mix: Mix, seed: int, tally: Tally) -> None:
        self.url = url
        self.mix = mix
        self.rng = random.Random(seed)
        self.tally = tally
        self.history: list[dict[str, str]] = []

    async def run(self) -> None:
        """Go on until cancelled."""
        while True:
            await self.one()

    async def one(self) -> None:
        """One request."""
        try:
            if self.rng.random() < self.mix.hostile:
                await self._attack()
            else:
                await self._ask()
        except (OSError, EOFError, ValueError) as error:
            self.tally.errors.append(f"{type(error).__name__}: {error}"[:200])

    async def _attack(self) -> None:
        attack = self.rng.choice(ATTACKS)
        began = perf_counter()
        status = await attack.run(self.url, self.rng)
        self.tally.hostile += 1
        taken = perf_counter() - began
        self.tally.slowest[attack.name] = max(taken, self.tally.slowest.get(attack.name, 0.0))
        if status not in attack.statuses:
            self.tally.errors.append(f"{attack.name}: status {status}")

    async def _ask(self) -> None:
        path, body, limit = self._request()
        leaves = self.rng.random() < self.mix.leaving
        patience = self.rng.randrange(0, limit) if leaves else -1
        began = last = perf_counter()
        seen, ended = 0, False
        data = json.dumps({**body, **self.mix.extra, "stream": True}).encode()
        async with request(self.url, path, data) as reply:
            if reply.status != 200:
                self.tally.errors.append(f"{path}: status {reply.status}: {(await reply.body())[:150]!r}")
                return
            async for event in reply.events():
                if problem := error_in(event):
                    self.tally.errors.append(f"{path}: {problem}")
                    return
                if is_token(event):
                    now = perf_counter()
                    (self.tally.gaps if seen else self.tally.first).append(now - last)
                    last, seen = now, seen + 1
                    self.tally.tokens += 1
                ended = ended or is_end(event)
                if seen == patience:
                    break
        if not ended and seen != patience:
            self.tally.errors.append(f"{path}: the stream broke off after {perf_counter() - began:.1f} s")
        elif ended:
            self.tally.finished += 1
            # tokens whose text came together with that of others
            self.tally.tokens += limit - seen if self.mix.exact else 0
        else:
            self.tally.left += 1

    def _request(self) -> tuple[str, dict[str, Any], int]:
        """Path, body, and most tokens of the answer."""
        rng = self.rng
        text = f"Tell me about {words(rng, rng.randint(*self.mix.prompt_words))}."
        limit = rng.randint(*self.mix.tokens)
        kind = rng.random() if self.mix.every_route else 0.0
        messages = self._converse(text)
        if kind < 0.55:
            return CHAT, {"messages": messages, "max_tokens": limit}, limit
        if kind < 0.65:
            return MESSAGES, {"model": "godwit", "messages": messages[1:], "max_tokens": limit}, limit
        if kind < 0.75:
            return RESPONSES, {"input": text, "max_output_tokens": limit}, limit
        if kind < 0.85:
            return TEXT, {"prompt": text, "max_tokens": limit}, limit
        form = {"type": "json_schema", "json_schema": {"name": "person", "schema": _SCHEMA, "strict": True}}
        more: dict[str, Any] = {"response_format": form} if kind < 0.92 else {"tools": [_TOOL]}
        return CHAT, {"messages": messages, "max_tokens": limit, **more}, limit

    def _converse(self, text: str) -> list[dict[str, str]]:
        """Messages: one conversation in three goes on with the last one's."""
        if not self.mix.every_route or len(self.history) > 4 or self.rng.random() < 0.67:
            system = {"role": "system", "content": "You are Godwit, a helpful assistant."}
            self.history = [system]
        else:
            self.history.append({"role": "assistant", "content": f"I like {words(self.rng, 20)}."})
        self.history = [*self.history, {"role": "user", "content": text}]
        return self.history


def is_token(event: Any) -> bool:
    """Whether an event of any of the APIs brings a part of an answer."""
    if not isinstance(event, dict):
        return False
    if event.get("type") == "content_block_delta" or str(event.get("type", "")).endswith(".delta"):
        return True
    for choice in event.get("choices", ()):
        delta = choice.get("delta", {})
        if choice.get("text") or delta.get("content") or delta.get("tool_calls"):
            return True
    return False


def is_end(event: Any) -> bool:
    """Whether an event of any of the APIs says that all is well and over."""
    kinds = ("message_stop", "response.completed", "response.incomplete")
    return event == "[DONE]" or (isinstance(event, dict) and event.get("type") in kinds)


def error_in(event: Any) -> str | None:
    """The error that an event tells of."""
    if isinstance(event, dict) and (event.get("error") or event.get("type") == "response.failed"):
        return json.dumps(event)[:200]
    return None


# hostile requests


@dataclass(frozen=True)
class Attack:
    """A request that deserves no answer.

    Attributes:
        statuses: what may come of it; 0: the server closed the connection.
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


def _slowly(pieces: int, pause: float) -> Callable[..., Any]:
    """Sends a body a few bytes at a time, and leaves before its end."""

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
    """Sends bytes that are no request."""

    async def send(url: str, rng: random.Random) -> int:
        place = urlsplit(url)
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        try:
            writer.write(data)
            async with asyncio.timeout(30):
                return (await _head(reader)).status
        except (OSError, EOFError):
            return 0
        finally:
            writer.transport.abort()

    return send


def _costly_schema(rng: random.Random) -> bytes:
    """Forms that grow without end when they are worked out."""
    if rng.random() < 0.5:
        schema: dict[str, Any] = {"type": "string", "pattern": "((((a{1,99}){1,99}){1,99}){1,99}){1,99}"}
    else:
        schema = {"type": "string", "pattern": "(a|aa|aaa){1,900}(b{1,900}c{1,900}){1,900}"}
        for level in range(8):
            schema = {"allOf": [{"properties": {f"p{level}": schema}}, {"anyOf": [schema, {"not": schema}]}]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return _chat(response_format=form)(rng)


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
    Attack("slow body", _slowly(6, 0.4), (0,)),
    Attack("head of 100 KB", _raw(b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n"), (400, 431, 0)),
    Attack("no HTTP", _raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9 + b"\r\n\r\n"), (400, 0)),
)  # fmt: skip
